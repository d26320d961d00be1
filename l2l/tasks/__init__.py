"""Families of problems to optimize, and wrappers that make any family more diverse."""

from l2l.tasks.mlp import mlp as mlp
from l2l.tasks.quadratic import quadratic as quadratic
from l2l.tasks.quadratic import simple as simple
from l2l.tasks.quadratic import simple_multi as simple_multi
