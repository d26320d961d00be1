"""What stands between a person and the programs: configurations, checked."""
