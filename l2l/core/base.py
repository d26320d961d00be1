"""The nouns of l2l: what a task, an optimizer and a meta-gradient are, and nothing else.

A capital letter names a pytree: Problem, Params, Batch, Data, Theta. Shapes in square brackets:
P is the number of coordinates (scalar parameters) of the optimizee, n any number of them, F the
number of features a coordinate has, C the number of context values all coordinates share.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key

PyTree = Any
Device = Any  # jax.Device, which type checkers take for a variable.
Scalar = jax.Array | np.ndarray | float
RandomKey = Key[Array, ""]
Loss = Float[Array, ""]
Step = Int[Array, ""]
Features = Float[Array, "F n"]
Context = Float[Array, " C"]
Updates = Float[Array, " n"]


class TaskFamily(NamedTuple):
    """A distribution over problems (optimizees): four functions, a name, and optionally a score.

    In few-shot problems the training split of a problem is its support, which inner steps see, and
    its validation split the query, which the meta-loss is measured on.

    sample:   (key) -> Problem. A pytree of arrays (never Python strings) so that it can be mapped:
              an activation index, scales, a subset of the data.
    init:     (key, problem) -> Params.
    batch:    (key, problem, data, split) -> Batch. `split` is "train", "validation" or "test", a
              Python string; `key=None` asks for the whole split, in order.
    loss:     (params, problem, batch) -> scalar.
    accuracy: (params, problem, batch) -> scalar in [0, 1], or None where the family has no such
              thing.
    data:     () -> Data. Reads what `batch` reads; called once, outside jit. Arrays in it are
              passed to the compiled program as arguments, never embedded.
    outputs:  (params, problem, batch) -> what the model answers, for figures; None where there is
              nothing to draw.
    """

    sample: Callable[[RandomKey], PyTree]
    init: Callable[[RandomKey, PyTree], PyTree]
    batch: Callable[[RandomKey | None, PyTree, PyTree, str], PyTree]
    loss: Callable[[PyTree, PyTree, PyTree], Loss]
    accuracy: Callable[[PyTree, PyTree, PyTree], Float[Array, ""]] | None = None
    data: Callable[[], PyTree] = lambda: ()
    name: str = "task"
    outputs: Callable[[PyTree, PyTree, PyTree], jax.Array] | None = None


class TensorSignals(NamedTuple):
    """The part of a coordinate-by-coordinate rule that looks at whole tensors, in two halves like
    the rule's own. (A rule that acts on whole tensors alone is a `PerTensorRule`.)

    It runs once a step for each of the optimizee's G tensors and gives O signals, which every
    coordinate of that tensor finds below its features. Arrays end with the tensors, [..., G].

    accumulators: (params, dtype) -> TensorAccumulators at the start.
    observe:      (gradient [P], accumulators, params [P], TensorAccumulators, step, sizes) ->
                  (features [S, G], TensorAccumulators). `accumulators` are the coordinates', as
                  they were before this step; `sizes` G Python numbers, those of the tensors. No
                  theta. With a preconditioner its features come below these.
    hidden:       (theta, G) -> Hidden.
    propose:      (theta, features [S, G], context [C], hidden) -> (signals [O, G], hidden).
    """

    accumulators: Callable[[PyTree, Any], PyTree]
    observe: Callable[..., tuple[Float[Array, "S G"], PyTree]]
    hidden: Callable[[PyTree, int], PyTree]
    propose: Callable[
        [PyTree, Float[Array, "S G"], Context, PyTree], tuple[Float[Array, "O G"], PyTree]
    ]


class Preconditioner(NamedTuple):
    """Directions that take a whole matrix to make, which a coordinate finds below its features.

    accumulators: (params, dtype) -> MatrixAccumulators at the start.
    observe:      (gradient [P], accumulators, MatrixAccumulators, step, shapes) -> (directions
                  [E, P], features [S, G] of the tensors, MatrixAccumulators). `accumulators` are
                  the coordinates', as they were before this step; `shapes` G tuples. No theta.
    names:        of the E directions, for diagnostics.
    """

    accumulators: Callable[[PyTree, Any], PyTree]
    observe: Callable[..., tuple[Float[Array, "E P"], Float[Array, "S G"], PyTree]]
    names: tuple[str, ...]


class Rule(NamedTuple):
    """An update rule that acts coordinate by coordinate, in two halves.

    `observe` is free of theta and `propose` treats every coordinate alike, which is what lets the
    first-order engine (`estimators/first_order.py`) take the network through a whole window one
    block of coordinates at a time. Both are called with any subset of the coordinates, and must
    give each the same numbers as with all of them: they take no mean over the last axis, say.
    Arrays are feature-major: coordinates last.

    accumulators: (params, dtype) -> Accumulators at the start (moments, say), leaves [..., P] over
                  the flattened parameters (in the order of `jax.tree.leaves`).
    context:      (step, num_steps) -> [C]. `num_steps` 0 means that the horizon is unknown.
    observe:      (gradient [n], accumulators, params [n], step) -> (features [F, n], accumulators).
    hidden:       (theta, n) -> Hidden, the initial recurrent state, leaves [..., n].
    propose:      (theta, features [F, n], context [C], hidden) -> (updates [n], hidden).
    features:     the F names, in order, for diagnostics.
    matrices:     the preconditioner, or None. With it `propose` is given [F + E, n], the features
                  of a coordinate and below them its part of the directions.
    tensors:      what is seen of whole tensors, or None. With it the O signals of a coordinate's
                  tensor come below those.
    rate:         (theta, step, num_steps) -> the nominal learning rate, by which a decoupled weight
                  decay is multiplied. None where there is no one rate for all coordinates.
    """

    accumulators: Callable[[PyTree, Any], PyTree]
    context: Callable[[Step, Step], Context]
    observe: Callable[[Updates, PyTree, Updates, Step], tuple[Features, PyTree]]
    hidden: Callable[[PyTree, int], PyTree]
    propose: Callable[[PyTree, Features, Context, PyTree], tuple[Updates, PyTree]]
    features: tuple[str, ...]
    matrices: Preconditioner | None = None
    tensors: TensorSignals | None = None
    rate: Callable[..., Any] | None = None


class PerTensorRule(NamedTuple):
    """An update rule that acts tensor by tensor: uₜ = Σⱼ cₜⱼ dₜⱼ, with directions dⱼ that are free
    of theta and J coefficients for each of the optimizee's G tensors, which a network sets.

    An update meets theta in its coefficients alone, so that the first-order meta-gradient
    needs nothing of the coordinates but the inner products ⟨λₜ, dₜⱼ⟩ of each tensor.

    accumulators: (params) -> Accumulators before the first step.
    observe:      (gradient, params, accumulators) -> (directions, features [S, G], accumulators).
                  No theta. Directions are any pytree that `combine` knows.
    hidden:       (theta, G) -> Hidden.
    propose:      (theta, features [S, G], step, num_steps, hidden) -> (coefficients [J, G],
                  hidden). `num_steps` 0 means that the horizon is unknown.
    combine:      (directions, coefficients [J, G], params) -> updates, like params; linear in the
                  coefficients.
    rate:         as a `Rule`'s.
    features:     the S names, in order, for diagnostics.
    """

    accumulators: Callable[[PyTree], PyTree]
    observe: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, jax.Array, PyTree]]
    hidden: Callable[[PyTree, int], PyTree]
    propose: Callable[..., tuple[jax.Array, PyTree]]
    combine: Callable[[PyTree, jax.Array, PyTree], PyTree]
    rate: Callable[..., Any]
    features: tuple[str, ...]


class LearnedOptimizer(NamedTuple):
    """An optimizer as a function of theta; and where theta holds more of an inner run than its
    optimizer (see `learner`), the parameters that it starts from and the loss that it minimises.

    init:  (key) -> Theta.
    bind:  (theta) -> an optax transformation. Its `update` accepts `num_steps=` (the horizon, an
           int or scalar array; optional) and ignores every other extra argument.
    rule:  the two halves behind `bind` for optimizers that act coordinate by coordinate or tensor
           by tensor; None for others (see `lift`), whose meta-gradients are taken by plain
           automatic differentiation.
    start: (theta) -> Params that every run begins with; None where the family's `init` draws them.
    loss:  (theta, the family's loss) -> the loss that the steps of a run minimise, with the same
           arguments; None where that is the family's. The meta-loss is always the family's.
    """

    init: Callable[[RandomKey], PyTree]
    bind: Callable[[PyTree], optax.GradientTransformationExtraArgs]
    rule: Rule | PerTensorRule | None = None
    start: Callable[[PyTree], PyTree] | None = None
    loss: Callable[[PyTree, Callable], Callable] | None = None


class LearnedLoss(NamedTuple):
    """The loss of inner training as a function of theta.

    init:  (key, params) -> Theta; `params` may be shapes.
    bind:  (theta, the family's loss) -> a loss with the same arguments.
    check: (family) -> None; a UserError where it cannot be the loss of that family. None where
           it can be that of any.
    """

    init: Callable[[jax.Array, PyTree], PyTree]
    bind: Callable[[PyTree, Callable], Callable]
    check: Callable[[TaskFamily], None] | None = None


class Parts(NamedTuple):
    """A theta that holds more of an inner run than its optimizer; () for what it does not hold.

    optimizer: the theta of the optimizer.
    start:     Params.
    loss:      the theta of the loss.
    """

    optimizer: PyTree
    start: PyTree = ()
    loss: PyTree = ()


class InnerState(NamedTuple):
    """One inner training run. Every random number of it comes from `key` and `step`.

    num_steps: the horizon, int32; the run is replaced by a new one when `step` reaches it.
    known_horizon: what the optimizer knows of it: `num_steps`, or 0 where it is hidden.
    """

    params: PyTree
    opt_state: PyTree
    problem: PyTree
    key: jax.Array
    step: jax.Array
    num_steps: jax.Array
    known_horizon: jax.Array


class Stage(NamedTuple):
    """What the curriculum sets: the range of horizons [shortest, longest] drawn log-uniformly, and
    the weight of the imitation of Adam. Traced scalars, so that a new stage compiles nothing."""

    shortest: Scalar
    longest: Scalar
    imitation: Scalar


class MetaGradient(NamedTuple):
    """An estimator of the meta-gradient over a batch of inner problems.

    init:     (keys [n], theta, stage) -> state, every leaf [n, ...]. Key i alone decides all that
              is random about problem i, so the split over devices changes nothing.
    estimate: (theta, state, data, stage) -> (gradients, state, metrics), all with leading axis [n]:
              one meta-gradient for each problem (like theta, not clipped yet), the next states, and
              metrics of one number a problem: `meta_loss`; `loss`, at the end of the window; and
              `lowest`, of the losses that the meta-loss reads.
    """

    init: Callable[[jax.Array, PyTree, Stage], PyTree]
    estimate: Callable[[PyTree, PyTree, PyTree, Stage], tuple[PyTree, PyTree, dict[str, jax.Array]]]


class MetaState(NamedTuple):
    """The whole of a meta-training run: what a checkpoint holds.

    step:      meta-steps taken, int32.
    bad:       meta-steps in a row in which some family had no finite meta-gradient, int32.
    skipped:   meta-steps that changed nothing, as no problem had one, int32.
    dropped:   meta-gradients that were left out, of all problems and meta-steps, int32.
    estimator: the estimator's state, leaves [num_problems, ...]; split over devices.
    """

    step: jax.Array
    theta: PyTree
    opt_state: PyTree
    estimator: PyTree
    stage: Stage
    bad: jax.Array
    skipped: jax.Array
    dropped: jax.Array


def lift(
    init: Callable[[jax.Array], PyTree],
    make: Callable[[PyTree], optax.GradientTransformation],
) -> LearnedOptimizer:
    """Turns a hand-written optimizer with settings to meta-learn into a `LearnedOptimizer`.

    Its updates are in the dtypes of the parameters, where `update` is given those.

    >>> adam = lift(lambda key: jnp.log(1e-3), lambda log_lr: optax.adam(jnp.exp(log_lr)))
    """

    def bind(theta):
        made = optax.with_extra_args_support(make(theta))

        def update(updates, state, params=None, **extra_args):
            updates, state = made.update(updates, state, params, **extra_args)
            if params is not None:
                # theta is float32, and makes updates of half precision so.
                def cast(u, p):
                    return None if u is None else u.astype(jnp.result_type(p))

                updates = jax.tree.map(cast, updates, params, is_leaf=lambda x: x is None)
            return updates, state

        return optax.GradientTransformationExtraArgs(made.init, update)

    return LearnedOptimizer(init, bind)


def fixed(transform: optax.GradientTransformation) -> LearnedOptimizer:
    """An optimizer with nothing to learn, for code that expects a `LearnedOptimizer`."""
    return lift(lambda key: (), lambda theta: transform)


def learner(
    optimizer: LearnedOptimizer,
    *,
    start: Callable[[jax.Array], PyTree] | None = None,
    loss: LearnedLoss | None = None,
    params: PyTree = None,
) -> LearnedOptimizer:
    """A `LearnedOptimizer` whose theta, `Parts`, holds the start of a run (as in MAML; Finn et al.
    2017), settings of the loss that it minimises, or both, beside what that of `optimizer` holds.

    Args:
      start: (key) -> the Params that meta-training begins with.
      loss: needs `params`, or shapes like them, where there is no `start`.

    >>> maml = learner(fixed(optax.sgd(0.01)), start=lambda key: {"w": jnp.zeros(3)})
    """

    def init(key):
        keys = jax.random.split(key, 3)
        first = () if start is None else start(keys[1])
        like = params if start is None else first
        return Parts(
            optimizer.init(keys[0]), first, () if loss is None else loss.init(keys[2], like)
        )

    return LearnedOptimizer(
        init,
        lambda theta: optimizer.bind(theta.optimizer),
        start=None if start is None else lambda theta: theta.start,
        loss=None if loss is None else lambda theta, own: loss.bind(theta.loss, own),
    )


def count(tree: PyTree) -> int:
    """The number of scalars in a pytree of arrays, Python numbers or shapes."""
    return sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(tree))


def real(leaf) -> bool:
    """Whether a leaf is a real floating-point number, or an array or shape of them: what can be
    trained."""
    floating = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    return floating or isinstance(leaf, float)


def finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every number in a pytree is finite: a boolean scalar."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def single(tree: PyTree) -> PyTree:
    """A pytree of arrays or Python numbers: those of half precision as float32, all others as they
    are."""

    def of(x):
        dtype = jnp.result_type(x)
        half = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
        return x.astype(jnp.float32) if half else x

    return jax.tree.map(of, tree)


class RawKey(NamedTuple):
    """The numbers of random keys, where only plain arrays will do: in checkpoints, and in what
    `pmap` shares between processes."""

    data: jax.Array


def raw(tree: PyTree) -> PyTree:
    """A pytree of arrays with a `RawKey` in place of every random key."""

    def of(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return RawKey(jax.random.key_data(x)) if is_key else x

    return jax.tree.map(of, tree)


def typed(tree: PyTree) -> PyTree:
    """The inverse of `raw`."""
    wrap = jax.random.wrap_key_data
    return jax.tree.map(lambda x: wrap(x.data) if _is_raw(x) else x, tree, is_leaf=_is_raw)


# No function within `typed`: the checks of shapes in tests would compile it anew at every call, and
# reading a checkpoint is watched for whatever is executed.
def _is_raw(x) -> bool:
    return isinstance(x, RawKey)
