"""Real data by name, read from files in their published layouts."""
