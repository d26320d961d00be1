"""SOAP as an optax transformation (Vyas et al. 2024, arXiv 2409.11321).

optimizer = l2l.soap(learning_rate=3e-3, weight_decay=0.01)
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2l.console.errors import UserError
from l2l.core import base
from l2l.optimizers import binding, leaves, meshes, ranges, soap_directions
from l2l.optimizers.soap_directions import Settings, SoapState

# The paper's algorithm, step for step, except for a damping that keeps a null space in place.
PUBLISHED = Settings(
    decays=(0.95,),
    second_decay=0.95,
    eps_root=0.0,
    nothing=0.0,
    normalized=False,
    often=1,
    damping=1e-6,
    nesterov=False,
    lookahead=False,
    graft=False,
)


def scale_by_soap(settings: Settings = PUBLISHED) -> optax.GradientTransformation:
    """The direction of SOAP, before the rate; its sign is that of the gradient."""

    fixed, arrays = _parted(settings)

    def init(params):
        leaves.check(params)
        if leaves.abstract(params):
            return jax.eval_shape(partial(_begin, fixed), params)
        return meshes.together(_begin(fixed, params), params)

    def update(updates, state, params=None):
        if not isinstance(state, SoapState):
            raise UserError(
                f"The state is a {type(state).__name__}, and not that of SOAP: begin with what "
                "`init` of this optimizer makes."
            )
        like = state.nu if params is None else params
        gradients, like = leaves.trained(updates, like)
        leaves.matched(state.nu, like, "moments")
        if base.count(like) == 0:
            return updates, state
        try:
            return _advance(fixed, arrays, gradients, state, None if params is None else like)
        except leaves.Unfit as unfit:
            raise UserError(unfit.sentence({}, {})) from None

    return optax.GradientTransformation(init, update)


def _parted(settings: Settings) -> tuple[Settings, Settings]:
    """(the settings that are fixed, those that are arrays), None for the others: what is fixed is
    the key of a compiled program."""

    def arrays(x):
        return isinstance(x, jax.Array | np.ndarray)

    return (
        jax.tree.map(lambda x: None if arrays(x) else x, settings),
        jax.tree.map(lambda x: x if arrays(x) else None, settings),
    )


# One program each when called outside of `jax.jit`, since there are loops in them.
@partial(jax.jit, static_argnums=0, inline=True)
def _begin(fixed: Settings, params):
    return soap_directions.start(fixed, params)


@partial(jax.jit, static_argnums=0, inline=True)
def _advance(
    fixed: Settings, arrays: Settings, gradients: list, state: SoapState, params: base.PyTree
):
    """(directions, state). The directions have the dtypes of the parameters and lie on devices as
    they do, or as the gradients where params is None. `gradients` are those of `leaves.matched`:
    None counts as zero, and gets none."""
    # While it is traced: once, not in every step.
    like = state.nu if params is None else params
    leaves.check_state(state, jax.eval_shape(partial(_begin, fixed), like))
    settings = jax.tree.map(
        lambda x, array: array if x is None else x, fixed, arrays, is_leaf=lambda x: x is None
    )
    kept, treedef = jax.tree.flatten(state.nu)
    pairs = zip(gradients, kept, strict=True)
    given = [jnp.zeros_like(x) if g is None else g for g, x in pairs]
    likes = given if params is None else jax.tree.leaves(params)
    given, state = meshes.together((given, state), likes)
    given = treedef.unflatten(given)
    seen, state = soap_directions.observe(settings, given, state)
    # In the dtypes of `like`: gradients may be of half precision where parameters are not.
    like = treedef.unflatten(likes)
    directions = soap_directions.back(settings, seen, jnp.ones((1, len(kept))), like)
    out = meshes.alike(treedef.flatten_up_to(directions), likes)
    out = [None if g is None else d for g, d in zip(gradients, out, strict=True)]
    return treedef.unflatten(out), state


def soap(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    *,
    block_size: int | None = None,
    longest: int | None = None,
    precondition_frequency: int = 10,
) -> optax.GradientTransformation:
    """SOAP (Vyas et al. 2024): Adam in the slowly turning eigenbasis of each matrix's gradients.

    With G the gradient of a matrix and M, V its moments,

        L ← b2 L + (1 − b2) GGᵀ,  R ← b2 R + (1 − b2) GᵀG,  their eigenvectors Q_L, Q_R,
        G′ = Q_Lᵀ G Q_R,  M′ = Q_Lᵀ M Q_R,  V ← b2 V + (1 − b2) G′∘G′,
        W ← W − learning_rate · (Q_L (M̂′/(√V̂ + eps)) Q_Rᵀ + weight_decay · W).

    The bases take one step of orthogonal iteration every `precondition_frequency` steps. Tensors of
    more than two axes are treated as matrices, all axes but the last by the last: the layout of
    flax and haiku. A kernel of equinox or PyTorch, (out, in, height, width), has its width as
    columns, and layers stacked into one array are one tall matrix. Scalars and vectors move as with
    Adam. Updates are in the dtypes of the parameters, whatever those of the gradients.

    Args:
      learning_rate: a number or an optax schedule.
      b1, b2: decays of the first moment and of everything of second order.
      eps: added to the root of the second moment.
      weight_decay: decoupled, times the rate.
      mask: where weight decay applies, as in `optax.adamw`.
      block_size: sides longer than this are cut into equal blocks, each with its own basis; None
        for 256.
      longest: sides longer than this (such as an embedding's rows) get no basis; None for 8192.
      precondition_frequency: steps between two updates of the bases.

    Under `optax.inject_hyperparams` every number may change from step to step but `block_size` and
    `longest`, which decide shapes: where they are not left out, they belong in its `static_args`.

    Raises:
      UserError: a setting is out of range; from `init`, for parameters that are no real
        floating-point numbers, or a mask that does not fit them; from `update`, the gradients or
        the state do not fit the parameters.
    """
    ranges.decay("b1", b1)
    ranges.decay("b2", b2)
    ranges.not_negative("eps", eps)
    ranges.not_negative("weight_decay", weight_decay)
    if not callable(learning_rate):
        ranges.not_negative("learning_rate", learning_rate)
    if not isinstance(precondition_frequency, jax.Array):
        precondition_frequency = ranges.whole("precondition_frequency", precondition_frequency)
    # Not their defaults: `optax.inject_hyperparams` would make arrays of them.
    sizes = {"block_size": block_size, "longest": longest}
    sizes = {name: ranges.whole(name, x) for name, x in sizes.items() if x is not None}
    settings = PUBLISHED._replace(
        decays=(b1,),
        second_decay=b2,
        basis_decay=b2,
        eps=eps,
        basis_every=precondition_frequency,
        **sizes,
    )
    return optax.chain(
        scale_by_soap(settings),
        binding.masked(optax.add_decayed_weights(weight_decay), mask),
        optax.scale_by_learning_rate(learning_rate),
    )
