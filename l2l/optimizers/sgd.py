"""Gradient descent as a `LearnedOptimizer`: its rate fixed, learned, or learned for each tensor."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from l2l.console.errors import UserError
from l2l.core import base
from l2l.optimizers import ranges


def sgd(
    learning_rate: float = 0.01,
    *,
    momentum: float = 0.0,
    learned: bool = False,
    tensors: Sequence[str] = (),
) -> base.LearnedOptimizer:
    """`optax.sgd`, for inner training by gradient descent.

    theta: () where nothing is learned; the logarithm of the learning rate where it is `learned`;
    {tensor: its logarithm} where `tensors` are named, as Meta-SGD learns rates beside the start (Li
    et al. 2017, arXiv 1707.09835; there one a coordinate, of either sign).

    Args:
      learning_rate: of all tensors, where learning begins.
      momentum: of `optax.trace`; 0 for none.
      tensors: all of the optimizee's, as "linear_0/w", if each has a rate of its own. That implies
        `learned`.

    Raises:
      UserError: a setting is out of range, or a tensor is named twice; from `update`, the tensors
        are not those of the parameters.
    """
    tensors = tuple(tensors)
    learned = learned or bool(tensors)
    ranges.positive("learning_rate", learning_rate)
    ranges.decay("momentum", momentum)
    if len({*tensors}) < len(tensors):
        raise UserError(f"tensors={tensors} name a tensor twice: list each once.")

    def init(key):
        del key
        log_rate = jnp.asarray(math.log(learning_rate), jnp.float32)
        if not learned:
            return ()
        return dict.fromkeys(tensors, log_rate) if tensors else log_rate

    def make(theta):
        if not tensors:
            return optax.sgd(jnp.exp(theta) if learned else learning_rate, momentum or None)
        trace = optax.trace(momentum) if momentum else optax.identity()
        return optax.chain(trace, optax.stateless(lambda g, _: _by_tensor(theta, g)))

    return base.lift(init, make)


def _by_tensor(log_rates, gradient):
    """The gradient times −exp(log rate) of each tensor."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(gradient)
    own = [(jax.tree_util.keystr(path, simple=True, separator="/"), g) for path, g in paths]
    names, rated = {name for name, _ in own}, set(log_rates)
    # A tensor that has no gradient, or is masked, may have a rate too: its name is not known here.
    if names - rated or (rated - names and not _partial(gradient)):
        raise UserError(
            f"The tensors with a rate are {', '.join(sorted(log_rates))}, but those of the "
            f"parameters are {', '.join(name for name, _ in own)}: name all of these, and no "
            "others, in optimizer.tensors."
        )
    return treedef.unflatten([-jnp.exp(log_rates[name]) * g for name, g in own])


def _partial(tree) -> bool:
    """Whether anything is left out of it: None, or what `optax.masked` puts in its place."""

    def left_out(x):
        return x is None or isinstance(x, optax.MaskedNode)

    return any(map(left_out, jax.tree.leaves(tree, is_leaf=left_out)))
