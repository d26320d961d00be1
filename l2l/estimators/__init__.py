"""Estimators of the meta-gradient, one a file.

>>> from l2l.estimators import autodiff, first_order, mixture, pes
"""
