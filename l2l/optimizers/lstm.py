"""Our LSTM optimizer, `lstm`: a network per coordinate that corrects Adam's or SOAP's step."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from l2l.console.errors import UserError
from l2l.core import base
from l2l.optimizers import coordinates, features, ranges, soap_coordinates
from l2l.optimizers.network import FeatureMajorLinear, stack, zero_states
from l2l.optimizers.per_tensor_signals import NUM_SIGNALS, tensor_signals

# The rate of a coordinate stays within a factor exp(±REACH) of the common one.
REACH = 3.0
# With an LSTM over whole tensors, which knows better how far it may go: 0.003 times e^±4 spans the
# rates at which Adam does best on anything.
TENSOR_REACH = 4.0
LONG_AGES, LONG_LENGTHS = (10.0, 100.0, 1000.0), (300.0, 3000.0)
# What is left of an annealed rate at the horizon and after it.
ANNEALED = 0.01
# What a network may see of a coordinate, and what it may say.
INPUTS = ("momentum", "gradient", "parameter", "scale")
OUTPUTS = ("mixture", "scale", "residual")


def lstm(
    *,
    hidden_size: int = 8,
    layers: int = 1,
    learning_rate: float = 1e-3,
    decays: Sequence[float] = (0.9, 0.99, 0.999),
    second_decay: float = 0.999,
    eps_root: float = 1e-8,
    weight_decay: float = 0.0,
    inputs: Sequence[str] = ("momentum", "gradient"),
    output: str = "mixture",
    tensor_size: int = 0,
    matrix_size: int = 0,
    anneal: float = 0.0,
) -> base.LearnedOptimizer:
    """A small LSTM that corrects a nominal Adam step (after STAR, Harrison et al. 2022).

    With a, b the network's outputs, zero at first, so that untrained it is
    `optax.adamw(learning_rate, decays[0], second_decay, eps_root=…, weight_decay=…)`:

        u = −exp(λ) · (exp(a) · (m̂/(√(v̂ + eps_root) + eps) + b · r) + weight_decay · θ)

    where |a| < REACH and |b| < 1 (each through a tanh of slope 1 at 0: without bounds a few runs in
    a hundred jump), and r are the normalised moments at every decay and the normalised gradient:
    the correction is a mixture of directions in which the loss has been seen to fall.

    Args:
      hidden_size, layers: of the LSTM; each coordinate carries 2 · hidden_size · layers numbers.
      learning_rate: exp(λ) at the start; λ is learned.
      decays: of the first moments; the first is the nominal Adam's b1.
      second_decay: of the second moment (b2).
      eps_root: in every root, of the features and of the nominal step.
      inputs: any of "momentum" (m̂/√v̂ at every decay), "gradient" (g/√v̂), "parameter" (θ, clipped
        to ±1), "scale" (log √v̂, scaled).
      output: "mixture" as above; "scale" has no b (Adam whose rate is learned coordinate by
        coordinate); "residual" has a free b in place of b · r.
      tensor_size: of a second LSTM, which sees whole tensors (`per_tensor_signals.py`) and moves a
        with them; 0 for none. |a| may then reach TENSOR_REACH, the context tells longer runs apart,
        and each tensor has a weight decay of its own beside `weight_decay`.
      matrix_size: the nominal step is SOAP's direction (`soap_coordinates.py`), for matrices whose
        sides are at most this long, in place of m̂/√v̂, which stays one of r; 0 for none. Untrained
        it then is SOAP with Nesterov's momentum and the length of NAdam's step.
      anneal: the rate is times ((1 + cos(π t/T))/2 + ANNEALED)^p where the horizon T is known; p is
        learned from this on. 0 for a rate that only the network lowers.

    Raises:
      UserError: a setting is unknown or out of range.
    """
    if unknown := set(inputs) - set(INPUTS):
        raise UserError(f"Unknown inputs {sorted(unknown)}: choose from {', '.join(INPUTS)}.")
    if output not in OUTPUTS:
        raise UserError(f"Unknown output {output!r}: choose mixture, scale or residual.")
    decays = tuple(decays)
    ranges.decays("decays", decays)
    ranges.decay("second_decay", second_decay)
    ranges.positive("learning_rate", learning_rate)
    for name, value in dict(eps_root=eps_root, weight_decay=weight_decay, anneal=anneal).items():
        ranges.not_negative(name, value)
    hidden_size, layers = ranges.whole("hidden_size", hidden_size), ranges.whole("layers", layers)
    tensor_size = ranges.whole("tensor_size", tensor_size, least=0)
    matrix_size = ranges.whole("matrix_size", matrix_size, least=0)
    moments = dict(second_decay=second_decay, eps_root=eps_root)
    matrices, signals, init_signals = None, None, None
    if matrix_size:
        matrices = soap_coordinates.soap_direction(largest=matrix_size, decay=decays[0], **moments)
    if tensor_size:
        signals, init_signals = tensor_signals(
            hidden_size=tensor_size,
            decays=decays,
            further=soap_coordinates.PER_TENSOR if matrix_size else 0,
            **moments,
        )
    network = _Network(
        hidden_size=hidden_size,
        layers=layers,
        learning_rate=learning_rate,
        decays=decays,
        weight_decay=weight_decay,
        inputs=tuple(inputs),
        output=output,
        anneal=anneal,
        matrices=matrices,
        signals=signals,
        init_signals=init_signals,
        **moments,
    )
    return coordinates.optimizer(network.init, network.rule())


class _Network(NamedTuple):
    """The two halves of the rule of `lstm`, and its weights: its settings, with the parts that look
    at matrices and at whole tensors built."""

    hidden_size: int
    layers: int
    learning_rate: float
    decays: tuple[float, ...]
    second_decay: float
    eps_root: float
    weight_decay: float
    inputs: tuple[str, ...]
    output: str
    anneal: float
    matrices: base.Preconditioner | None
    signals: base.TensorSignals | None
    init_signals: Callable | None

    def rule(self) -> base.Rule:
        return base.Rule(
            accumulators=self.accumulators,
            context=self.context,
            observe=self.observe,
            hidden=self.hidden,
            propose=self.propose,
            features=(*self.names, "θ"),
            matrices=self.matrices,
            tensors=self.signals,
            rate=self.rate,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Of the features of a coordinate, before θ itself, which only the weight decay reads."""
        return (*(f"m̂({d:g})/√v̂" for d in self.decays), "g/√v̂", "clipped θ", "log √v̂")

    @property
    def shown(self) -> list[int]:
        """The numbers of those that the network sees."""
        groups = ["momentum"] * len(self.decays) + ["gradient", "parameter", "scale"]
        return [i for i, group in enumerate(groups) if group in self.inputs]

    @property
    def num_directions(self) -> int:
        """From the preconditioner."""
        return len(self.matrices.names) if self.matrices else 0

    def context(self, step, num_steps):
        further = dict(ages=LONG_AGES, lengths=LONG_LENGTHS) if self.signals else {}
        return features.time_context(step, num_steps, **further)

    def accumulators(self, params, dtype):
        return features.zero_moments(len(self.decays), base.count(params), dtype)

    def hidden(self, theta, n):
        return zero_states(self.hidden_size, self.layers, n, coordinates.dtype_of(theta))

    def observe(self, gradient, moments, params, step):
        moments, hat = features.update_moments(
            gradient, moments, step, decays=self.decays, second_decay=self.second_decay
        )
        root = features.root(hat.nu, self.eps_root)
        rows = [
            *(hat.mu / root[None]),
            gradient / root,
            jnp.clip(params, -1.0, 1.0),
            jnp.log(root) / 10.0,
            params,
        ]
        return jnp.stack(rows), moments

    def transformed(self) -> hk.Transformed:
        """(rows, context, states) -> (outputs, states), as haiku's functions."""
        directions = len(self.decays) + 1 + self.num_directions
        num_outputs = {"mixture": 1 + directions, "scale": 1, "residual": 2}[self.output]

        def network(rows, context, states):
            columns, states = stack(rows, context, states, self.hidden_size, self.layers)
            return FeatureMajorLinear(num_outputs, jnp.zeros, name="out")(columns, context), states

        return hk.without_apply_rng(hk.transform(network))

    def propose(self, theta, rows, context, hidden):
        # The rows the network sees stand first unless the inputs were chosen otherwise.
        own = self.shown
        seen = rows[: len(own)] if own == list(range(len(own))) else rows[jnp.array(own)]
        parameter = len(self.names)
        soaps, signals = jnp.split(rows[parameter + 1 :], [self.num_directions])
        seen = jnp.concatenate([seen, soaps, signals[2:]])
        out, hidden = self.transformed().apply(theta["network"], seen, context, hidden)
        size = out[0] + signals[0] if self.signals else out[0]
        step = soaps[0] if self.matrices else rows[0]
        if self.output == "mixture":
            directions = jnp.concatenate([rows[: len(self.decays) + 1], soaps])
            step = step + jnp.sum(jnp.tanh(out[1:]) * directions, 0)
        elif self.output == "residual":
            step = step + jnp.tanh(out[1])
        reach = TENSOR_REACH if self.signals else REACH
        step = jnp.exp(reach * jnp.tanh(size / reach)) * step
        if self.signals:
            step = step + (self.weight_decay + signals[1]) * rows[parameter]
        elif self.weight_decay:
            step = step + self.weight_decay * rows[parameter]
        return -self.rate_in(theta, context) * step, hidden

    def rate(self, theta, step, num_steps):
        return self.rate_in(theta, self.context(step, num_steps))

    def rate_in(self, theta, context):
        log_rate = theta["log_learning_rate"]
        if self.anneal:
            # The first of the context is t/T, 0 where T is not known.
            left = 0.5 * (1 + jnp.cos(jnp.pi * context[0])) + ANNEALED
            log_rate = log_rate + theta["anneal"] * jnp.log(left / (1 + ANNEALED))
        return jnp.exp(log_rate)

    def init(self, key):
        context = jnp.zeros_like(self.context(jnp.int32(0), jnp.int32(0)))
        signals = NUM_SIGNALS - 2 if self.signals else 0
        rows = jnp.zeros((len(self.shown) + self.num_directions + signals, 1), jnp.float32)
        states = zero_states(self.hidden_size, self.layers, 1, jnp.float32)
        theta = {
            "network": self.transformed().init(key, rows, context, states),
            "log_learning_rate": jnp.log(jnp.asarray(self.learning_rate, jnp.float32)),
        }
        if self.init_signals:
            theta["tensors"] = self.init_signals(jax.random.fold_in(key, 1), context)
        if self.anneal:
            theta["anneal"] = jnp.asarray(self.anneal, jnp.float32)
        return theta
