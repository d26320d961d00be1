"""Between a person and the programs: configurations are checked, and errors become sentences."""
