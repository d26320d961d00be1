"""Optimizers beside tuned baselines: measured, summed up, shown."""
