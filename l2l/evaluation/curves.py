"""From any optax transformation, learned or hand-designed, to its loss curves.

Paired by design: problem i draws its initial parameters and every batch from `fold_in(key, i)`,
whatever the optimizer and the devices.
"""

import functools
import gc
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2l.cluster import environment
from l2l.console.errors import UserError
from l2l.core import base, unroll
from l2l.storage import exports

# Of a run, evenly spaced measurements of the validation loss, each on at most so many examples.
VALIDATIONS = 20
EXAMPLES = 1024


class Problems(NamedTuple):
    """Which problems of a family: `count` of them, decided by `key`, whatever the optimizer."""

    key: jax.Array
    count: int

    def keys(self) -> jax.Array:
        """[count], the key of each problem."""
        return jax.vmap(lambda i: jax.random.fold_in(self.key, i))(jnp.arange(self.count))


class Curves(NamedTuple):
    """The results of `num_problems` training runs as NumPy arrays: n runs, T steps, c checkpoints.

    losses:        [n, T], the loss of the training batch before each step.
    steps:         [c], the steps after which what follows was measured; the last one is T.
    train_loss:    [n, c], over the whole training split.
    test_loss:     [n, c], over the whole test split.
    test_accuracy: [n, c], in [0, 1]; NaN where the family has no accuracy.
    diverged:      [n, c], whether by then a batch loss was not finite, or the training loss ℓ is
                   not finite, or ℓ − ℓ₀ > (blowup − 1) |ℓ₀|, with ℓ₀ its value before the first
                   step: by default above twice a positive ℓ₀, above 0 for one of 0 or less.
    validation_steps: [v], the steps after which the validation loss was measured; the last is T.
    validation_loss:  [n, v], over the validation split, or over `EXAMPLES` evenly spaced ones of it
                   where there are more.

    If an optimizer averages its iterates (`optax.contrib.schedule_free`), the averages are what is
    measured. Families without data measure their one loss, so that train_loss equals test_loss.
    """

    losses: Any
    steps: Any
    train_loss: Any
    test_loss: Any
    test_accuracy: Any
    diverged: Any
    validation_steps: Any
    validation_loss: Any


def evaluate(
    key: jax.Array,
    optimizer: optax.GradientTransformation | base.LearnedOptimizer,
    family: base.TaskFamily,
    data,
    num_problems: int,
    num_steps: int,
    *,
    theta=None,
    **settings,
) -> Curves:
    """Trains `num_problems` problems of a family for `num_steps` steps each.

    Args:
      key: decides the problems and their batches, whatever the optimizer.
      optimizer: an optax transformation, learned or not, told the horizon as `num_steps=`; or a
        `LearnedOptimizer` with its `theta`, which compiles once for all theta.
      data: what `family.data()` returned.
      settings: of `compile_evaluation`.
    """
    if not isinstance(optimizer, base.LearnedOptimizer):
        optimizer, theta = _fixed(optimizer), ()
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    run = compiled(optimizer, family, num_problems, num_steps, **settings)
    return run(theta, key, data)


# Nine: what is trained, where and how it is measured; `evaluate` hands most of it on.
def compile_evaluation(
    optimizer: base.LearnedOptimizer,
    family: base.TaskFamily,
    num_problems: int,
    num_steps: int,
    *,
    checkpoints: Sequence[int] = (),
    devices: Sequence[base.Device] | None = None,
    batch: int | None = None,
    blowup: float = 2.0,
    sweep: bool = False,
) -> Callable[[Any, jax.Array, Any], Curves]:
    """Makes (theta, key, data) -> Curves: compiled at the first call, and for no new theta again.

    Args:
      checkpoints: steps before `num_steps` at which to measure as well; the validation loss is
        measured at `VALIDATIONS` further ones, unless `sweep`.
      devices: the runs are split over them; by default all of this process.
      batch: runs at a time on one device. By default one on a CPU, where a small network's
        run stays in the cache, and all on an accelerator, which must be filled.
      blowup: see `Curves.diverged`.
      sweep: theta's leaves have a leading axis [s], of settings to be tried on the same problems,
        and so have the results (before [n]; the losses are left out, `()`). The settings
        share each step's batch and run side by side, which is several times faster than one by one.

    Raises:
      UserError: no problems, no steps, or checkpoints outside [1, num_steps].
    """
    if num_problems < 1 or num_steps < 1:
        raise UserError(
            f"num_problems={num_problems} and num_steps={num_steps} leave nothing to measure: "
            "both must be 1 or more."
        )
    steps = sorted({*checkpoints, num_steps})
    if steps[0] < 1 or steps[-1] > num_steps:
        raise UserError(
            f"checkpoints={tuple(checkpoints)} leave the run of {num_steps} steps: "
            f"give steps between 1 and {num_steps}."
        )
    validated = steps if sweep else validation_steps(num_steps, steps)
    devices = list(jax.local_devices() if devices is None else devices)[:num_problems]
    share = -(-num_problems // len(devices))
    if batch is None:
        batch = 1 if devices[0].platform == "cpu" else share
    # Where the devices do not divide the runs, the last run is done again and thrown away.
    numbers = np.minimum(np.arange(len(devices) * share), num_problems - 1)

    def one(theta, run, data):
        curves = one_run(optimizer, theta, family, run, data, steps, validated, blowup)
        return curves._replace(losses=()) if sweep else curves

    def on_device(theta, runs, data):
        with jax.default_device(devices[0].platform):
            return all_runs(theta, runs, data)

    def all_runs(theta, runs, data):
        rates_at_once = jax.vmap(one, (0, None, None)) if sweep else one

        def each(run):
            return rates_at_once(theta, run, data)

        if batch >= share:
            return jax.vmap(each)(runs)
        return jax.lax.map(each, runs, batch_size=batch if batch > 1 else None)

    # Axes are spelt out leaf by leaf: jax 0.10 takes (None, 0, None) for those of the leaves, not
    # of the arguments, whenever all arguments together happen to have three leaves.
    axes = (None, Beginning._make(0 for _ in Beginning._fields), None)
    mapped = jax.pmap(on_device, in_axes=axes, devices=devices)
    # A program of its own: half of what there is to compile, and the same for every horizon.
    begin = _begin(family)

    def evaluation(theta, key, data) -> Curves:
        out = jax.device_get(mapped(theta, begin(key, numbers.reshape(len(devices), share)), data))
        out = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num_problems], out)
        if sweep:
            out = jax.tree.map(lambda x: np.swapaxes(x, 0, 1), out)
        return out._replace(steps=np.asarray(steps), validation_steps=np.asarray(validated))

    return evaluation


def validation_steps(num_steps: int, also: Sequence[int] = ()) -> list[int]:
    """The steps of a run after which its validation loss is measured: `VALIDATIONS` of them, evenly
    spaced, and those of `also`."""
    spaced = (-(-num_steps * i // VALIDATIONS) for i in range(1, VALIDATIONS + 1))
    return sorted({*spaced, *also})


class Beginning(NamedTuple):
    """A run before its optimizer is known. Every random number of it comes from `key`."""

    key: jax.Array
    problem: base.PyTree
    params: base.PyTree


def beginning(family: base.TaskFamily, key: jax.Array) -> Beginning:
    """The run that `key` decides; the same as meta-training would make of that key."""
    problem = family.sample(jax.random.fold_in(key, unroll.SAMPLE))
    return Beginning(key, problem, family.init(jax.random.fold_in(key, unroll.INIT), problem))


def opened(optimizer, run: Beginning, horizon: int) -> base.InnerState:
    """A run before its first step, with an optimizer that is told the horizon."""
    known = jnp.asarray(horizon, jnp.int32)
    return base.InnerState(
        params=run.params,
        opt_state=optimizer.init(run.params),
        problem=run.problem,
        key=run.key,
        step=jnp.zeros((), jnp.int32),
        num_steps=known,
        known_horizon=known,
    )


def started(optimizer: base.LearnedOptimizer, theta, run: Beginning) -> Beginning:
    """The run with the parameters that theta holds for the start of every run, if it holds some; a
    UserError where they are not those of the run's model."""
    if optimizer.start is None:
        return run
    params = exports.fitted(optimizer.start(theta), run.params, "The learned start")
    return run._replace(params=params)


# Eight: an optimizer, where its run begins, and what is measured on the way.
def one_run(
    optimizer: base.LearnedOptimizer,
    theta,
    family: base.TaskFamily,
    run: Beginning,
    data,
    steps: Sequence[int],
    validated: Sequence[int] = (),
    blowup: float = 2.0,
) -> Curves:
    """A run to the last of `steps` (increasing), measured at each, and its validation loss at those
    of `validated` too: `Curves` without [n], and with both kinds of steps left to the caller. The
    optimizer is told the last step. A start that theta holds takes the place of the run's own, and
    a loss that it holds is what the steps go down; whatever is measured is the family's."""
    transform = optax.with_extra_args_support(optimizer.bind(theta))
    training = unroll.trained_on(family, optimizer, theta)
    state = opened(transform, started(optimizer, theta, run), steps[-1])
    # Between two measurements are so many times `every` steps. One compiled loop over these pieces
    # serves any steps, where a loop for each of them would have to be compiled anew.
    marks = sorted({*steps, *validated})
    every = math.gcd(*marks)
    ends = np.arange(every, steps[-1] + 1, every)

    def measure(state):
        train = _whole(family.loss, family, state, data, "train")
        test = _whole(family.loss, family, state, data, "test")
        if family.accuracy is None:
            return train, test, jnp.full((), jnp.nan, train.dtype)
        return train, test, _whole(family.accuracy, family, state, data, "test")

    def validate(state):
        return _whole(family.loss, family, state, data, "validation")

    def trained(state):
        if training is family:
            return unroll.unroll(state, data, family, transform, every)

        def step(state, _):
            # What `unroll` returns would be the loss that theta makes of this one.
            batch = unroll.batch_at(family, state, data)
            loss = family.loss(state.params, state.problem, batch)
            return unroll.unroll(state, data, training, transform, 1)[0], loss

        return jax.lax.scan(step, state, None, every)

    def piece(state, due):
        state, losses = trained(state)
        measured, validation = due
        # The steps are those of all runs abreast, so that these stay branches under `vmap`.
        return state, (losses, _if(measured, measure, state), _if(validation, validate, state))

    initial = _whole(family.loss, family, state, data, "train")
    due = np.isin(ends, steps), np.isin(ends, marks)
    _, (losses, measured, validation) = jax.lax.scan(piece, state, due)
    losses = losses.reshape(-1)
    train, test, accuracy = (x[due[0]] for x in measured)
    finite = jnp.stack([jnp.all(jnp.isfinite(losses[:step])) for step in steps])
    # The comparison is False for NaN, so that NaN counts as diverged.
    kept = train <= initial + (blowup - 1) * jnp.abs(initial)
    curves = Curves(losses, (), train, test, accuracy, ~(finite & kept), (), validation[due[1]])
    return base.single(curves)  # What reads them knows no half precision.


def _if(now, measure, state):
    """measure(state) if `now`; otherwise zeros, which nobody reads."""
    like = jax.eval_shape(measure, state)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    return jax.lax.cond(now, measure, lambda _: zeros, state)


def _whole(measure, family, state, data, split):
    """A measure over a whole split, or over `EXAMPLES` evenly spaced ones of the validation split:
    of that a run has many measurements."""
    batch = family.batch(None, state.problem, data, split)
    if split == "validation":
        batch = spaced(batch, EXAMPLES)
    return measure(evaluated(state.opt_state, state.params), state.problem, batch)


def spaced(batch, count: int):
    """A batch of n examples cut to `count` of them, evenly spaced: row ⌊i n / count⌋ of every array
    for i = 0, …, count − 1. What is no array of examples, like the key of a noise, stays as it is,
    and so does a batch of fewer examples, or of arrays that differ in how many rows they have."""
    sizes = {len(x) for x in jax.tree.leaves(batch) if jnp.ndim(x)}
    if len(sizes) != 1 or max(sizes) <= count:
        return batch
    rows = np.arange(count) * max(sizes) // count
    return jax.tree.map(lambda x: x[rows] if jnp.ndim(x) else x, batch)


def evaluated(opt_state, params):
    """The parameters that an optimizer would be judged by: the averages of one that is made by
    `optax.contrib.schedule_free`, whose `params` are where gradients are taken; of others, params.
    """

    def averages(x):
        return isinstance(x, optax.contrib.ScheduleFreeState)

    for state in filter(averages, jax.tree.leaves(opt_state, is_leaf=averages)):
        params = optax.contrib.schedule_free_eval_params(state, params)
    return params


@functools.lru_cache(maxsize=64)
def _begin(family):
    """(key, numbers [devices, n]) -> the beginnings of those runs, [devices, n, ...]."""

    @jax.jit
    def begin(key, numbers):
        runs = jax.lax.map(
            lambda i: beginning(family, jax.random.fold_in(key, i)), numbers.reshape(-1)
        )
        return jax.tree.map(lambda x: x.reshape(*numbers.shape, *x.shape[1:]), runs)

    return begin


# A transformation is a pair of functions, so the same one is recognised when it comes again.
_fixed = functools.lru_cache(maxsize=64)(base.fixed)
# `compile_evaluation`, but one program for all that comes with the same arguments.
compiled = functools.lru_cache(maxsize=64)(compile_evaluation)


def forget() -> None:
    """Lets go of the compiled programs of this module; in a process of l2l's own, as its commands
    are, of all there are. A notebook's programs are not ours to drop.

    On a CPU each takes dozens of the 65,530 memory mappings that Linux allows a process by default
    (vm.max_map_count); after some hundreds of programs the compiler finds no memory.
    """
    for kept in (compiled, _begin, _fixed):
        kept.cache_clear()
    if environment.prepared:
        jax.clear_caches()
    gc.collect()
