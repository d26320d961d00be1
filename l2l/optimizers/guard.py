"""A learned optimizer under guard: where it diverges, Adam takes over.

    optimizer = l2l.guard(l2l.load("mlp"), adam=optax.adam(3e-3))
    updates, state = optimizer.update(gradients, state, params, value=loss)
    state.falls  # how often Adam had to

Nothing here is particular to l2l's optimizers: any optax transformation can be guarded.
"""

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2l.console.errors import UserError
from l2l.core import base
from l2l.optimizers import coordinates, features, leaves, loss_record, meshes, ranges
from l2l.optimizers.loss_record import LossRecord


class GuardState(NamedTuple):
    """The state of a guarded optimizer. `optax.tree.get(state, "falls")` finds it in any chain.

    falls:     how often the learned optimizer was taken off, int32.
    strikes:   what speaks against it now, int32; it falls at `patience`.
    rest:      Adam's steps before it gets another chance, int32.
    returning: whether the last call fell, and this one mends what rounding left of the way back.
    longest:   the norm of the longest of Adam's steps since the last fall, or what counts as that
               where it is longer, float32.
    losses:    see `LossRecord`.
    anchor:    the parameters to go back to; like them.
    adam, learned: the states of the two.
    """

    falls: jax.Array
    strikes: jax.Array
    rest: jax.Array
    returning: jax.Array
    longest: jax.Array
    losses: LossRecord
    anchor: base.PyTree
    adam: base.PyTree
    learned: base.PyTree


# Parts of the state that lie on devices as the parameters do.
LIKE_PARAMS = ("anchor", "adam", "learned")

# Adam's steps count as at least this long in every parameter, and as those of at least so many
# parameters. Adam's rate says little about what the learned optimizer needs: in a warm-up it starts
# at 0, and does so again after every fall. And the smaller a network, the longer are the learned
# steps for each parameter: in networks of 4 to 300 parameters, the longest of the released
# optimizers had a norm of 4.
RATE, SMALLEST = 1e-3, 4096


# Nine settings: each is part of one of the promises below, so none can be left out.
def guard(
    optimizer: optax.GradientTransformation,
    *,
    adam: optax.GradientTransformation | None = None,
    longest_step: float = 100.0,
    deviations: float = 4.0,
    share: float = 0.02,
    window: int = 20,
    patience: int = 20,
    period: int = 100,
    max_falls: int = 5,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer, with Adam beside it, which takes over where the optimizer diverges.

    While the learned optimizer passes two tests, its updates are returned as they are. Each call
    on which it fails one of them is a strike; every other call takes one strike back:

    1. Its step. One that is not finite, leaves the parameters not finite, or is longer than

           `longest_step` · max(the longest step of Adam so far, 0.001 · √max(n, 4096))

       is not taken: Adam's is taken instead. (Lengths are Euclidean norms over all n parameters.
       The second is that of a first step of `optax.adam(1e-3)`; it is there for an Adam whose
       schedule starts near 0.) Gradients that are not finite strike too; no step is taken on
       them, and they enter no state, not even Adam's.
    2. The loss, where `update` is given `value=`. With m and s the running mean and deviation of
       the last `window` losses or so, and m* the lowest m so far, a loss strikes if it is not
       finite, or above

           limit = m* + max(deviations · s, share · (first loss − m*)),

       where the limit is the lowest of those found whenever m reached a new low.

    At `patience` strikes it falls: that is, when the losses have for some time been above the limit
    more often than below it; single bad batches do not count. A fall goes back to the parameters
    remembered at m*, and starts both optimizers and the record of losses anew (the gradients of a
    divergence would keep Adam's second moments large for thousands of steps). Then Adam steps,
    `period` times after the first fall, twice as often after each further one; the learned
    optimizer looks on, so that its own moments are warm when it gets another chance, and is then
    measured against what Adam reached. After `max_falls` falls the run is Adam's for good.

    It cannot diverge where Adam does not:

    - No step is taken that leaves the parameters other than finite.
    - Either the learned optimizer falls `max_falls` times. From then on the run is, number by
      number, that of a fresh Adam started at the remembered parameters; in between are finitely
      many stretches of Adam, each such a run too.
    - Or some stretch of it never ends. Then in every later part of the run the losses above the
      limit exceed those below it by less than `patience`, and the limit, fixed by the first
      `window` losses of the stretch, never rises: the loss keeps coming back to where it was.

    Without `value=` only the first test is made. It keeps the parameters finite and the steps
    within the length above; a slow divergence goes unseen. Neither test sees a learned optimizer
    that is merely slower than Adam, or stands still.

    It takes Adam's state and a copy of the parameters beside the learned state: 12 bytes a
    parameter in float32. Once the run is Adam's for good the learned optimizer costs no time.
    Compiling it takes about 0.2 CPU seconds for each tensor, which adds up with hundreds of them.
    Reverse-mode differentiation does not work through it.

    What it returns has to be exactly what is added to the parameters, or it cannot go back: in a
    chain, put clipping and the like before it, not after. Where a run is split over devices,
    `value` must be the mean over them, as the gradients are. Inside `jax.shard_map`, devices that
    share a parameter have one model between them: the guard takes the mean itself, and judges that
    model as one. Where they share none, each device is judged alone.

    Args:
      optimizer: any optax transformation. It receives all extra arguments.
      adam: what to fall back on; `optax.adam(1e-3)` by default. Its schedule, if it has one, counts
        from the last fall.
      longest_step: in steps of Adam, as above. The longest seen of a released optimizer on digits
        MLPs was 49 of `optax.adam(1e-3)`.
      deviations, share: how far the loss may rise, in units of its own noise and of what was gained
        so far; the larger of the two counts.
      window: losses to average over.
      patience: strikes that make a fall.
      period: Adam's steps after the first fall.
      max_falls: after which it is Adam for good.

    Raises:
      UserError: an option is out of range, or is not an optax transformation; from `update`, if
        `params` is None, the state was made by other optimizers, or `value` is not a real scalar.
    """
    own = _Guard(
        _transformation("optimizer", optimizer, "l2l.load(…)"),
        _transformation("adam", optax.adam(1e-3) if adam is None else adam, "optax.adam(1e-3)"),
        *(longest_step, deviations, share, window, patience, period, max_falls),
    ).checked()
    start, compiled = jax.jit(own.start, inline=True), jax.jit(own.step, inline=True)

    def init(params):
        if leaves.abstract(params):
            return jax.eval_shape(start, params)
        state = start(params)
        parts = [name for name in GuardState._fields if name not in LIKE_PARAMS]
        scalars = {name: getattr(state, name) for name in parts}
        return state._replace(**meshes.together(scalars, params, meshes.apart(params)))

    def update(updates, state, params=None, *, value=None, **extra_args):
        if params is None:
            raise UserError(
                "A guarded optimizer goes back to earlier parameters, and `params` is None: call "
                "update(gradients, state, params)."
            )
        given, params = leaves.trained(updates, params)
        if not isinstance(state, GuardState):
            raise UserError(
                f"The state is a {type(state).__name__}, and not that of a guarded optimizer: call "
                "`init` of the guarded one. To put a run under guard that has begun without, give "
                "init(params)._replace(learned=state)."
            )
        leaves.matched(state.anchor, params, "remembered parameters")
        if value is not None:
            loss_record.check(value)
        if base.count(params) == 0:
            return updates, state
        if "num_steps" in extra_args:
            extra_args["num_steps"] = leaves.horizon(extra_args["num_steps"])
        # A program takes numbers alone, and some optimizers ask for functions.
        run = compiled if _numbers(extra_args) else own.step
        out, state = run(given, state, params, value, extra_args)
        out = [None if g is None else u for g, u in zip(given, jax.tree.leaves(out), strict=True)]
        return jax.tree.unflatten(jax.tree.structure(params), out), state

    return optax.GradientTransformationExtraArgs(init, update)


class _Guard(NamedTuple):
    """The arguments of `guard`, and what it does with them."""

    learned: optax.GradientTransformationExtraArgs
    adam: optax.GradientTransformationExtraArgs
    longest_step: float
    deviations: float
    share: float
    window: int
    patience: int
    period: int
    max_falls: int

    def checked(self) -> "_Guard":
        """This, if its options are in range."""
        for name in ("longest_step", "deviations", "share"):
            ranges.positive(name, getattr(self, name))
        counts = ("window", "patience", "period", "max_falls")
        own = self._replace(**{name: ranges.whole(name, getattr(self, name)) for name in counts})
        if own.period << (own.max_falls - 1) >= 1 << 31:
            raise UserError(
                f"period={own.period} doubled after each of max_falls={own.max_falls} falls is "
                "more than an int32 can hold: lower one of them."
            )
        return own

    def start(self, params) -> GuardState:
        params = _strong(params)
        with meshes.within_mesh_of(params):
            learned = self.learned.init(params)  # Before the copy: it may say what is wrong here.
            adam = self.adam.init(params)
        return GuardState(
            falls=jnp.zeros((), jnp.int32),
            strikes=jnp.zeros((), jnp.int32),
            rest=jnp.zeros((), jnp.int32),
            returning=jnp.zeros((), bool),
            longest=jnp.asarray(_least(params), jnp.float32),
            losses=loss_record.empty(),
            learned=learned,
            adam=adam,
            # A copy: leaves that share a buffer with the parameters could not be donated.
            anchor=jax.tree.map(jnp.array, params),
        )

    def step(self, given, state: GuardState, params, value, extra_args):
        """A whole update: (updates, state)."""
        params = _strong(params)
        self.check_state(state, params)
        # `optax.contrib.sam` chooses between two states by arithmetic, which makes it a number.
        state = state._replace(returning=jnp.asarray(state.returning, bool))
        own = meshes.apart(params)
        gradients = meshes.shared(_whole(given, params), params)
        fine = _finite(gradients, own)
        if value is not None:
            value = meshes.over_model(jax.lax.pmean, jnp.asarray(value), own)
        heard = self.hear(state, value)
        if value is not None:
            extra_args["value"] = value
        bad = heard.above | ~fine
        open_ended = state.falls < self.max_falls
        driving = open_ended & (state.rest == 0) & ~state.returning
        falling = driving & (state.strikes + bad >= self.patience)
        going_back = falling | state.returning
        keeping = heard.good & fine & ~going_back
        anchor = jax.tree.map(lambda p, a: jnp.where(keeping, p, a), params, state.anchor)

        def back(carry):
            return *self.go_back(anchor, params), jnp.full_like(carry[-1], _least(params))

        def adam_steps(carry):
            return self.step_of_adam(carry, gradients, params, extra_args)

        def learned_steps(carry):
            return self.step_of_learned(carry, gradients, params, extra_args, driving, longest)

        stepping = fine & ~going_back
        out = jax.tree.map(jnp.zeros_like, params)
        carry = (out, state.adam, state.learned, state.longest)
        out, of_adam, of_learned, longest = _where(going_back, back, carry)
        out, of_adam, longest = _where(stepping, adam_steps, (out, of_adam, longest))
        carry = (out, of_learned, jnp.zeros_like(fine))
        out, of_learned, failed = _where(stepping & open_ended, learned_steps, carry)

        striking = jnp.where(bad | failed, state.strikes + 1, state.strikes - heard.informed)
        rest = jnp.maximum(state.rest - stepping, 0)
        fresh = loss_record.empty()._replace(first=heard.losses.first)
        return meshes.alike(out, params), GuardState(
            falls=state.falls + falling,
            strikes=jnp.where(driving & ~falling, jnp.maximum(striking, 0), 0),
            rest=jnp.where(falling, jnp.left_shift(self.period, state.falls), rest),
            returning=falling,
            longest=longest,
            losses=jax.tree.map(lambda a, b: jnp.where(going_back, a, b), fresh, heard.losses),
            anchor=anchor,
            adam=of_adam,
            learned=of_learned,
        )

    def check_state(self, state: GuardState, params) -> None:
        """Raises UserError if the state is that of other optimizers."""
        made = jax.eval_shape(self.start, params)
        for part, option in (("learned", "optimizer"), ("adam", "adam")):
            try:
                leaves.check_state(getattr(state, part), getattr(made, part))
            except leaves.Unfit:
                raise UserError(
                    f"`{part}` of the guarded state was not made by this `{option}`: guard the one "
                    "that made it, or call `init` again."
                ) from None

    def hear(self, state: GuardState, value) -> "_Heard":
        """What the loss says, if there is one."""
        if value is None:
            # Without losses every place with gradients will do; with some, only they tell.
            unheard = state.losses.seen == 0
            return _Heard(state.losses, jnp.zeros((), bool), unheard, unheard)
        bounds = (self.window, self.deviations, self.share)
        found = loss_record.heard(state.losses, value, state.falls == 0, *bounds)
        return _Heard(*found, jnp.ones((), bool))

    def go_back(self, anchor, params):
        """(the way back, both states as at the start)."""
        # p + (a − p) rounds. From where it ends a second such step is exact: a − p is then either
        # a itself or, both being within a factor of two, free of rounding.
        back = jax.tree.map(jnp.subtract, anchor, params)
        return back, self.adam.init(anchor), self.learned.init(anchor)

    def step_of_adam(self, carry, gradients, params, extra_args):
        """carry: (updates so far, Adam's state, its longest step), as it returns them."""
        _, before, longest = carry
        out, after = self.adam.update(gradients, before, params, **extra_args)
        out = _like(out, params)
        return out, _like(after, before), jnp.maximum(longest, _length(out, meshes.apart(params)))

    def step_of_learned(self, carry, gradients, params, extra_args, driving, longest):
        """carry: (Adam's updates, the learned state, whether its step failed), as it returns them;
        the updates are the learned ones where it drives and does not fail."""
        safe, before, _ = carry
        out, of_learned = self.learned.update(gradients, before, params, **extra_args)
        out, of_learned = _like(out, params), _like(of_learned, before)
        # Of anything that is not finite the norm is not either.
        own = meshes.apart(params)
        failed = ~(_length(out, own) <= self.longest_step * longest)
        failed |= ~_finite(optax.apply_updates(params, out), own)
        taken = driving & ~failed
        return jax.tree.map(lambda x, y: jnp.where(taken, x, y), out, safe), of_learned, failed


class _Heard(NamedTuple):
    """losses: the record. above: whether the loss is above the limit. good: whether the parameters
    are worth going back to. informed: whether a call without a strike takes one back."""

    losses: LossRecord
    above: jax.Array
    good: jax.Array
    informed: jax.Array


def _whole(given, params):
    """Gradients like the parameters, 0 where there are none."""
    values, treedef = jax.tree.flatten(params)
    own = [jnp.zeros_like(p) if g is None else g for g, p in zip(given, values, strict=True)]
    return jax.tree.unflatten(treedef, own)


def _where(condition, change: Callable, carry: base.PyTree) -> base.PyTree:
    """change(carry) if the condition holds, else carry, at no cost: `lax.cond` copies what it hands
    on, 1.5 times the time of a step for the states here; a loop of one round or none does not."""
    once = jax.lax.while_loop(lambda x: x[0], lambda x: (~x[0], change(x[1])), (condition, carry))
    return once[1]


def _least(params: base.PyTree) -> float:
    """What counts as the longest of Adam's steps at the least."""
    return RATE * max(meshes.count_over_model(params), SMALLEST) ** 0.5


def _flat(tree: base.PyTree) -> jax.Array:
    """All numbers, in the widest of their dtypes, where finite ones stay finite."""
    # Flattened: one operation for each tensor would be as many programs to compile.
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(tree))
    return coordinates.flatten(meshes.together(tree), dtype)


def _finite(tree: base.PyTree, own: frozenset[str]) -> jax.Array:
    """Whether all numbers are finite, on all devices that have the model between them: these must
    take a step, fall and go back as one, or some would wait for the others. own: `meshes.apart` of
    the parameters."""
    finite = jnp.all(jnp.isfinite(_flat(tree))).astype(jnp.int32)
    return meshes.over_model(jax.lax.pmin, finite, own) > 0


def _length(tree: base.PyTree, own: frozenset[str]) -> jax.Array:
    """The Euclidean norm, float32, over all of a model, as in `_finite`: not finite where any
    number is not."""
    parts = list(map(_flat, meshes.parts(tree)))
    # Squares of numbers from 2e19 on overflow, and those of their ratios to the largest do not.
    most = [meshes.over_model(jax.lax.pmax, jnp.max(jnp.abs(x)), own) for x in parts]
    largest = reduce(jnp.maximum, most)
    unit = jnp.where(jnp.isfinite(largest) & (largest > 0), largest, 1)
    squares = [jnp.sum(jnp.square(x / unit)) for x in parts]
    square = reduce(jnp.add, [meshes.over_model(jax.lax.psum, x, own) for x in squares])
    return (unit * features.norm(square)).astype(jnp.float32)


def _like(tree: base.PyTree, other: base.PyTree) -> base.PyTree:
    """In the dtypes of the other: those of the parameters, of the state before. Adam's own state
    changes its dtype under gradients of another precision."""
    return jax.tree.map(lambda x, y: x if x.dtype == y.dtype else x.astype(y.dtype), tree, other)


def _strong(params: base.PyTree) -> base.PyTree:
    """Arrays, of Python numbers too, whose dtype does not yield to that of others."""
    return jax.tree.map(lambda p: jnp.asarray(p, jnp.result_type(p)), params)


def _numbers(tree: base.PyTree) -> bool:
    """Whether all leaves are numbers or arrays of them."""
    kinds = jax.Array | np.ndarray | np.generic | float | int | complex
    return all(isinstance(x, kinds) for x in jax.tree.leaves(tree))


def _transformation(name: str, given, example: str) -> optax.GradientTransformationExtraArgs:
    """What was given, if it is an optax transformation; else a UserError."""
    if not all(isinstance(getattr(given, part, None), Callable) for part in ("init", "update")):
        bound = " It is not bound to a theta: call its bind." if hasattr(given, "bind") else ""
        raise UserError(
            f"{name}={str(given)[:60]} is a {type(given).__name__}, not an optax transformation: "
            f"give one, like {example}.{bound}"
        )
    return optax.with_extra_args_support(given)
