"""Adam as a `LearnedOptimizer`: with a rule, or with its decays meta-learned."""

import math

import jax
import jax.numpy as jnp
import optax

from l2l.console.errors import UserError
from l2l.core import base
from l2l.optimizers import coordinates, features, ranges


def adam(
    learning_rate: float = 1e-3,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 1e-8,
    learned: bool = False,
) -> base.LearnedOptimizer:
    """`optax.adam` with a `rule`, for `by_parameter` and the first-order engine.

    Theta is the logarithm of the learning rate where it is `learned`, () where it is fixed.

    Raises:
      UserError: a setting is out of range.
    """
    (ranges.positive if learned else ranges.not_negative)("learning_rate", learning_rate)
    ranges.decay("b1", b1)
    ranges.decay("b2", b2)
    ranges.not_negative("eps", eps)
    ranges.not_negative("eps_root", eps_root)

    def rate(theta, step=None, num_steps=None):
        del step, num_steps
        return jnp.exp(theta) if learned else learning_rate

    def observe(gradient, moments, params, step):
        del params
        moments, hat = features.update_moments(
            gradient, moments, step, decays=(b1,), second_decay=b2
        )
        return hat.mu / features.root(hat.nu, eps_root, eps)[None], moments

    def propose(theta, rows, context, hidden):
        del context
        return -rate(theta) * rows[0], hidden

    rule = base.Rule(
        accumulators=lambda params, dtype: features.zero_moments(1, base.count(params), dtype),
        context=lambda step, num_steps: jnp.zeros((0,), jnp.float32),
        observe=observe,
        hidden=lambda theta, n: (),
        propose=propose,
        features=("m̂/√v̂",),
        rate=rate,
    )
    return coordinates.optimizer(
        lambda key: jnp.log(jnp.asarray(learning_rate, jnp.float32)) if learned else (), rule
    )


def learned_adam(
    *, learning_rate: float = 1e-3, b1: float = 0.9, b2: float = 0.999, eps_root: float = 1e-8
) -> base.LearnedOptimizer:
    """`optax.adam(eps_root=…)` whose learning rate and decays are meta-learned.

    theta: "log_learning_rate", and "log_odds_1" and "log_odds_2" of 1 − b1 and 1 − b2, which are
    their logarithms where they are small and keep the decays within (0, 1). `eps_root` is not
    learned: with 0 the exact meta-gradient is NaN at every coordinate whose gradient is zero.

    Raises:
      UserError: a learning rate that is not positive, a decay outside (0, 1), or a negative
        eps_root.
    """
    ranges.not_negative("eps_root", eps_root)
    if not (learning_rate > 0 and 0 < b1 < 1 and 0 < b2 < 1):
        raise UserError(
            f"learning_rate={learning_rate}, b1={b1}, b2={b2} cannot be learned in log space: "
            "use a positive rate and decays strictly between 0 and 1."
        )

    def init(key):
        del key

        def log_odds(decay):
            return math.log1p(-decay) - math.log(decay)

        theta = {
            "log_learning_rate": math.log(learning_rate),
            "log_odds_1": log_odds(b1),
            "log_odds_2": log_odds(b2),
        }
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), theta)

    def make(theta):
        adam = optax.adam(
            jnp.exp(theta["log_learning_rate"]),
            b1=jax.nn.sigmoid(-theta["log_odds_1"]),
            b2=jax.nn.sigmoid(-theta["log_odds_2"]),
            eps_root=eps_root,
        )
        # Decays that are arrays make float32 moments of half-precision gradients, from the first
        # step on: so they are float32 from the beginning.
        return optax.GradientTransformation(
            lambda params: adam.init(base.single(params)),
            lambda updates, state, params=None: adam.update(base.single(updates), state),
        )

    return base.lift(init, make)
