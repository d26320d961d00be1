"""Orthonormal bases from matrix products alone: no LAPACK, so nothing that can hang.

On a CPU the batched LAPACK kernels of jaxlib 0.10 wait for the threads they run on: two of them at
once, of matrices some 200 long, stop a program for ever. What is here is as fast there
(256 × 256: 1.4 ms a matrix, LAPACK 2.9; one core), takes a batch of any size in one loop, and is
the same program on every kind of device.
"""

import jax
import jax.numpy as jnp

# Rows that are made orthonormal one after another: few enough for a first-level cache.
PANEL = 32


def orthonormal(rows: jax.Array, panel: int = PANEL) -> jax.Array:
    """Orthonormal rows that span, one after another, what those of [k, b, d] (of full rank) span:
    L⁻¹ of them, with L lower triangular and its diagonal positive.

    Gram–Schmidt, every projection done twice (Giraud et al. 2005: orthogonal to rounding where the
    condition number is below its inverse), in panels of rows. What is compiled does not grow with
    the number of panels. In full precision: what GPUs and TPUs multiply with by default would
    leave bases that are none.
    """
    count = rows.shape[1]
    panels = max(-(-count // panel), 1)
    size = -(-count // panels)
    # Rows of zeros at the end stay what they are.
    rows = jnp.pad(rows, ((0, 0), (0, panels * size - count), (0, 0)))

    def taken(rows, i):
        return jax.lax.dynamic_slice_in_dim(rows, i * size, size, 1)

    def one(i, rows):
        def project(j, new):
            done = taken(rows, jax.lax.rem(j, i))
            return new - jnp.einsum("kab,kcb->kac", new, done) @ done

        new = _panel(jax.lax.fori_loop(0, 2 * i, project, taken(rows, i)))
        return jax.lax.dynamic_update_slice_in_dim(rows, new, i * size, 1)

    with jax.default_matmul_precision("highest"):
        if panels == 1:
            return _panel(rows)
        return jax.lax.fori_loop(0, panels, one, rows)[:, :count]


def _panel(rows: jax.Array) -> jax.Array:
    """Rows [k, b, d], one after another made orthogonal to those before and of length 1."""
    places = jnp.arange(rows.shape[1])

    def one(j, rows):
        row = jax.lax.dynamic_index_in_dim(rows, j, 1, keepdims=False)
        before = (places < j).astype(rows.dtype)[None]
        for _ in range(2):
            along = jnp.einsum("kbd,kd->kb", rows, row) * before
            row = row - jnp.einsum("kbd,kb->kd", rows, along)
        row = row * jax.lax.rsqrt(jnp.sum(row * row, 1, keepdims=True) + 1e-37)
        return jax.lax.dynamic_update_index_in_dim(rows, row, j, 1)

    return jax.lax.fori_loop(0, rows.shape[1], one, rows)
