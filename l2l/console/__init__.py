"""What stands between a person and the programs: configurations, checked; errors, in a sentence."""
