"""The second LSTM of `lstm`: it runs over whole tensors, and sends signals to their coordinates.

How noisy the gradients of a tensor are, whether its steps overshoot and how large its weights are
is hidden in the noise of one coordinate and plain in the mean over thousands. So a second network
runs once a step and tensor (after the hierarchy of Wichrowska et al. 2017 and the per-tensor LSTM
of Metz et al. 2022) and sends each coordinate of the tensor a few signals, of which the first is
added to the logarithm of its rate. It costs next to nothing: tensors are few. An optimizer that has
no network per coordinate at all is `per_tensor.py`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from l2l.core import base
from l2l.optimizers import features
from l2l.optimizers.network import FeatureMajorLinear, FeatureMajorLSTM

# Numbers a tensor sends to its coordinates: the logarithm of its scale, the decay of its weights,
# and inputs for their LSTM.
NUM_SIGNALS = 6
# The decay an untrained network asks for is the logistic function of this, 0.02.
NO_DECAY = -4.0
# Averages over time of what is pooled over a tensor.
FAST, SLOW = 0.9, 0.99
# The root of the mean square of a tensor counts as this if it is smaller: zero-initialised ones.
SMALLEST = 1e-3


class TensorAccumulators(NamedTuple):
    """alignment, log_gradient: [2, G], averaged fast and slow. log_start: [G], log rms θ at the
    start. fixed: [3, G], log size, log fan-in and whether it is a vector."""

    alignment: jax.Array
    log_gradient: jax.Array
    log_start: jax.Array
    fixed: jax.Array


def features_of(num_decays: int) -> tuple[str, ...]:
    """The names of what is seen of a tensor, in order."""
    dynamic = [f"rms m̂/√v̂ {i}" for i in range(num_decays)] + [
        *("alignment, fast", "alignment, slow", "rms g/√v̂", "trend of |g|"),
    ]
    own = ["rms θ", "growth of rms θ", "size", "fan-in", "vector"]
    return (*dynamic, *own, *(f"all tensors: {name}" for name in dynamic))


def tensor_signals(
    *,
    hidden_size: int,
    decays: tuple[float, ...],
    second_decay: float,
    eps_root: float,
    further: int = 0,
) -> tuple[base.TensorSignals, Callable]:
    """The signals, and (key, context) -> the weights, which belong in theta["tensors"].

    Seen of each tensor, pooled over its coordinates: the root mean square of m̂/√v̂ at every decay
    (1 for steady gradients, √((1−β)/(1+β)) for noise); the cosine between g/√v̂ and m̂/√v̂ (negative
    where steps overshoot), averaged over 10 and over 100 steps; that of g/√v̂, and the trend of |g|;
    the size of the weights, and how it has grown; the tensor's size and fan-in. The same of all
    tensors together. All are bounded, and none changes when the loss is multiplied.

    further: features that a preconditioner adds.
    """
    network = _Network(hidden_size, len(features_of(len(decays))) + further)
    view = _View(decays, second_decay, eps_root)
    signals = base.TensorSignals(view.accumulators, view.observe, network.hidden, network.propose)
    return signals, network.init


class _View(NamedTuple):
    """What is seen of whole tensors: `observe` and its accumulators."""

    decays: tuple[float, ...]
    second_decay: float
    eps_root: float

    def accumulators(self, params, dtype):
        leaves = jax.tree.leaves(params)
        fixed = [
            (
                (math.log(max(jnp.size(leaf), 1)) - 5.0) / 3.0,
                (math.log(max(math.prod(jnp.shape(leaf)[:-1]), 1)) - 3.0) / 3.0,
                float(jnp.ndim(leaf) < 2),
            )
            for leaf in leaves
        ]
        squares = [_mean(jnp.square(jnp.asarray(leaf, dtype))) for leaf in leaves]
        zeros = jnp.zeros((2, len(leaves)), dtype)
        return TensorAccumulators(
            *(zeros, zeros + 0, _log_rms(jnp.asarray(squares, dtype))),
            jnp.asarray(fixed, dtype).reshape(-1, 3).T,
        )

    def pooled(self, gradient, moments, params, step, sizes):
        """Means over each tensor: of m̂²/v̂ at every decay [J, G], and [4, G] of gm̂/v̂, g²/v̂, g² and
        θ²."""
        weight = partial(features.weight_of, count=jnp.maximum(step, 1), dtype=gradient.dtype)
        # The moments before this step: those after it are made block by block, later.
        corrected = [m / weight(d) for m, d in zip(moments.mu, self.decays, strict=True)]
        over = 1 / features.root(moments.nu / weight(self.second_decay), self.eps_root) ** 2
        products = [
            *(m * m * over for m in corrected),
            gradient * corrected[0] * over,
            gradient * gradient * over,
            gradient * gradient,
            params * params,
        ]
        means = features.pool(products, sizes)
        return means[: len(self.decays)], means[len(self.decays) :]

    def observe(self, gradient, moments, params, past, step, sizes):
        steady, (along, ahead, square, weights) = self.pooled(
            gradient, moments, params, step, sizes
        )
        began = step > 0
        cosine = along / (features.norm(ahead * steady[0]) + 1e-8)
        log_gradient = 0.5 * jnp.log(square + 1e-20)
        present = past._replace(
            alignment=_average(past.alignment, jnp.where(began, cosine, 0.0)),
            log_gradient=_average(
                jnp.where(began, past.log_gradient, log_gradient[None]), log_gradient
            ),
        )
        log_weights = _log_rms(weights)
        dynamic = jnp.stack(
            [
                *jnp.minimum(features.norm(steady), 3.0),
                *present.alignment,
                jnp.where(began, jnp.tanh(0.5 * jnp.log(ahead + 1e-8)), 0.0),
                jnp.tanh(present.log_gradient[0] - present.log_gradient[1]),
            ]
        )
        share = jnp.asarray(sizes, gradient.dtype) / max(sum(sizes), 1)
        own = [(log_weights + 2.0) / 2.0, jnp.tanh(log_weights - past.log_start), *past.fixed]
        together = jnp.broadcast_to((dynamic @ share)[:, None], dynamic.shape)
        return jnp.concatenate([dynamic, jnp.stack(own), together]), present


class _Network(NamedTuple):
    """What is said of them: `propose`, its recurrent state and its weights."""

    hidden_size: int
    num_inputs: int

    def transformed(self) -> hk.Transformed:
        """(rows, context, state) -> (outputs, state), as haiku's functions."""

        def network(rows, context, state):
            columns, state = FeatureMajorLSTM(self.hidden_size, name="lstm")(rows, state, context)
            # The features once more: how a rate follows the size of the weights is all but linear.
            columns = jnp.concatenate([columns, rows])
            return FeatureMajorLinear(NUM_SIGNALS, jnp.zeros, name="out")(columns, context), state

        return hk.without_apply_rng(hk.transform(network))

    def hidden(self, theta, num_tensors):
        zeros = jnp.zeros((self.hidden_size, num_tensors), jax.tree.leaves(theta)[0].dtype)
        return hk.LSTMState(zeros, zeros)

    def propose(self, theta, rows, context, state):
        signals, state = self.transformed().apply(theta["tensors"], rows, context, state)
        decay = jax.nn.sigmoid(signals[1:2] + NO_DECAY)
        return jnp.concatenate([signals[:1], decay, jnp.tanh(signals[2:])]), state

    def init(self, key, context):
        zeros = jnp.zeros((self.hidden_size, 1), jnp.float32)
        rows = jnp.zeros((self.num_inputs, 1), jnp.float32)
        return self.transformed().init(key, rows, context, hk.LSTMState(zeros, zeros))


def _average(past, new):
    """Averages over time [2, G], fast and slow, after another number of each tensor."""
    return jnp.stack([d * x + (1 - d) * new for d, x in zip((FAST, SLOW), past, strict=True)])


def _mean(x: jax.Array) -> jax.Array:
    """That of no numbers is 0."""
    return jnp.sum(x) / max(x.size, 1)


def _log_rms(mean_square: jax.Array) -> jax.Array:
    return 0.5 * jnp.log(mean_square + SMALLEST**2)
