"""Estimators of the meta-gradient, one a file, and the meta-losses they differentiate."""
