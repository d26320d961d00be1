"""Learned optimizers: what they observe, their networks, their steps."""
