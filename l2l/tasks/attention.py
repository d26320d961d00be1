"""The block of transformers, for texts and for images, inside haiku."""

from collections.abc import Callable

import haiku as hk
import jax
import jax.numpy as jnp

from l2l.console.errors import UserError
from l2l.tasks import supervised


def check(width: int, layers: int, heads: int) -> None:
    """A UserError unless the heads share the width and there is something of everything."""
    if layers < 1 or heads < 1 or width < 1 or width % heads:
        raise UserError(
            f"layers={layers} and heads={heads} do not fit width={width}: "
            "use at least one of each, and a number of heads that divides the width."
        )


def block(
    x: jax.Array,
    activate: Callable[[jax.Array], jax.Array],
    name: str,
    heads: int,
    *,
    causal: bool = False,
    bias: bool = True,
    w_init: hk.initializers.Initializer | None = None,
    out_init: hk.initializers.Initializer | None = None,
) -> jax.Array:
    """x + attention(norm(x)), then x + mlp(norm(x)), the MLP four times as wide: [n, T, width].

    Args:
      activate: of the MLP's hidden layer.
      name: its parameters are called after it; queries, keys and values are one matrix, "…_qkv".
      causal: no place sees a later one.
      bias: of the linear layers, and an offset of the normalisations.
      w_init, out_init: of the weights; the second of those two that add to x. None: normal with
        the deviation 1/√inputs, truncated at two of them.
    """
    n, length, width = x.shape

    def linear(size, part, init):
        return hk.Linear(size, with_bias=bias, w_init=init, name=f"{name}_{part}")

    y = linear(3 * width, "qkv", w_init)(supervised.layer_norm(x, f"{name}_norm_0", offset=bias))
    q, k, v = jnp.moveaxis(y.reshape(n, length, 3, heads, width // heads), 2, 0)
    y = jax.nn.dot_product_attention(q, k, v, is_causal=causal).reshape(x.shape)
    x = x + linear(width, "attended", out_init)(y)
    y = linear(4 * width, "hidden", w_init)(supervised.layer_norm(x, f"{name}_norm_1", offset=bias))
    return x + linear(width, "out", out_init)(activate(y))
