"""The outer loop's step: many problems on many devices, one meta-gradient, one update of theta."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import optax

from l2l.console.errors import UserError
from l2l.core import base

AXIS = "devices"


class Meta(NamedTuple):
    """What a meta-step is made of.

    clip: the largest norm of one problem's meta-gradient; longer ones are scaled to it before the
          mean over problems, so that no single run sets the direction.
    """

    estimator: base.MetaGradient
    optimizer: base.LearnedOptimizer
    meta_optimizer: optax.GradientTransformation
    num_problems: int
    clip: float = 1.0


def devices_for(num_problems: int, devices: Sequence[base.Device] | None = None) -> list:
    """All devices, checked to divide the problems; UserError names the nearest that fit."""
    devices = list(jax.devices() if devices is None else devices)
    n = len(devices)
    if num_problems < 1 or num_problems % n:
        below = num_problems // n * n
        fits = " or ".join(str(x) for x in (below, below + n) if x > 0)
        raise UserError(
            f"num_problems={num_problems} cannot be split evenly over {n} devices. "
            f"Try num_problems={fits}."
        )
    return devices


def meta_init(key: jax.Array, meta: Meta, stage: base.Stage) -> base.MetaState:
    """The state before the first meta-step, with leaves [num_problems, ...] in `estimator`.

    Problem i draws everything from `fold_in(key, i)`: the number of devices changes nothing.
    """

    @jax.jit
    def build(key, stage):
        theta = first_theta(key, meta.optimizer)
        problems = jax.random.fold_in(key, 1)
        keys = jax.vmap(lambda i: jax.random.fold_in(problems, i))(jnp.arange(meta.num_problems))

        zero = jnp.zeros((), jnp.int32)
        return base.MetaState(
            step=zero,
            theta=theta,
            opt_state=meta.meta_optimizer.init(theta),
            estimator=meta.estimator.init(keys, theta, stage),
            stage=stage,
            bad=zero,
            skipped=zero,
            dropped=zero,
        )

    return build(key, stage)


@partial(jax.jit, static_argnums=1)
def first_theta(key: jax.Array, optimizer: base.LearnedOptimizer) -> base.PyTree:
    """The theta that `meta_init` begins with, for its key."""
    return optimizer.init(jax.random.fold_in(key, 0))


def meta_step(meta: Meta, state: base.MetaState, data, mean: Callable = lambda x: x):
    """One update of theta: (state, metrics). `mean` averages over devices.

    A problem whose meta-loss or meta-gradient is not finite is left out: its gradient counts as
    zero in the mean over problems, as if it were clipped to that, so that the weight of the others
    stays the same. metrics["finite"] [problems] says whose, and `dropped` counts them. A step
    in which no problem is left changes neither theta nor the meta-optimizer, and is counted in
    `skipped`. `bad` counts the latest steps in a row in which some family had no problem left, so
    that theta learned nothing from it.
    """
    gradients, estimator, metrics = meta.estimator.estimate(
        state.theta, state.estimator, data, state.stage
    )
    fine = jax.vmap(base.finite)(gradients) & jnp.isfinite(metrics["meta_loss"])
    norms = jax.vmap(optax.tree.norm)(gradients)
    shrink = jnp.minimum(1.0, meta.clip / jnp.maximum(norms, 1e-30))

    def pull(g):
        by_row = (-1, *[1] * (g.ndim - 1))
        return jnp.mean(jnp.where(fine.reshape(by_row), g * shrink.reshape(by_row), 0), 0)

    # A mixture has the rows of one family after those of another.
    families = fine.reshape(-1, jax.tree.leaves(state.estimator)[0].shape[0])
    shares = jnp.mean(families.astype(jnp.float32), 1)
    # The only numbers, but for the metrics, that devices exchange.
    gradient, shares = mean((jax.tree.map(pull, gradients), shares))
    updates, opt_state = meta.meta_optimizer.update(gradient, state.opt_state, state.theta)
    theta = optax.apply_updates(state.theta, updates)
    good = jnp.any(shares > 0) & base.finite(gradient) & base.finite(theta)
    keep = partial(jax.tree.map, partial(jnp.where, good))
    bad = ~(good & jnp.all(shares > 0))
    missing = jnp.round(jnp.sum(1 - shares) * meta.num_problems).astype(jnp.int32)
    state = state._replace(
        step=state.step + 1,
        theta=keep(theta, state.theta),
        opt_state=keep(opt_state, state.opt_state),
        estimator=estimator,
        bad=jnp.where(bad, state.bad + 1, 0),
        skipped=state.skipped + ~good,
        dropped=state.dropped + missing,
    )
    return state, dict(metrics, gradient_norm=norms, finite=fine)


def compile_steps(meta: Meta, group: int, devices: Sequence[base.Device]) -> Callable:
    """(state, data) -> (state, metrics [group, num_problems]): `group` meta-steps in one pmapped
    call, with the estimator's state split over `devices` and all else replicated, metrics included.
    The state is in the layout of `spread`. Once compiled (`.lower(…).compile()`) the call takes
    global arrays and returns them, also where `devices` belong to several processes.

    Devices exchange theta-sized numbers once a meta-step, and add them up in their own order:
    however the same devices are shared out among processes, the result is the same to the bit,
    which no all-reduce promises.
    """
    axes = split_of(None, 0)

    def mean(tree):
        flat, unravel = jax.flatten_util.ravel_pytree(tree)
        return unravel(jnp.mean(jax.lax.all_gather(flat, AXIS), 0))

    def steps(state, data):
        with jax.default_device(devices[0].platform):  # Which decides how arrays are laid out.
            state, metrics = jax.lax.scan(
                lambda state, _: meta_step(meta, state, data, mean), base.typed(state), None, group
            )
        return base.raw(state), jax.lax.all_gather(metrics, AXIS, axis=1, tiled=True)

    return jax.pmap(
        steps, axis_name=AXIS, in_axes=(axes, None), out_axes=(axes, None), devices=devices
    )


def spread(state: base.MetaState, num_devices: int) -> base.MetaState:
    """[num_problems, ...] to `compile_steps`' layout, [devices, num_problems/devices, ...]."""

    def part(x):  # Not -1 of what may be of size 0.
        return x.reshape(num_devices, len(x) // num_devices, *x.shape[1:])

    return base.raw(state._replace(estimator=jax.tree.map(part, state.estimator)))


def gather(state: base.MetaState) -> base.MetaState:
    """The inverse of `spread`: the layout of checkpoints, the same for any number of devices."""
    state = base.typed(state)

    def whole(x):
        return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])

    return state._replace(estimator=jax.tree.map(whole, state.estimator))


def by_family(rows, num_devices: int, num_families: int):
    """[group, rows] of the metrics as [group, families, num_problems]: each device's rows are those
    of all families, and those of the first device come first."""
    each = rows.reshape(len(rows), num_devices, num_families, -1)
    return each.swapaxes(1, 2).reshape(len(rows), num_families, -1)


def split_of(same, problems) -> base.MetaState:
    """A `MetaState` with `problems` as the part of the inner problems, and `same` as all others."""
    parts = base.MetaState(*[same] * len(base.MetaState._fields))
    return parts._replace(estimator=problems)
