"""Orthonormal bases of a batch of matrices, by what is fast on the device at hand.

On a CPU the batched LAPACK kernels of jaxlib 0.10 wait for the threads they run on: two of them at
once, of matrices some 200 long, stop a program for ever. So there it is Gram–Schmidt in loops over
rows, without LAPACK and as fast (256 × 256: 1.4 ms a matrix, LAPACK 2.9; one core). On a GPU such a
loop is thousands of kernels that each wait for the one before; there it is a few Cholesky factors.
"""

import jax
import jax.numpy as jnp

# Rows that are made orthonormal one after another: few enough for a first-level cache.
PANEL = 32
# What is added to the diagonal of a Gram matrix of rows of length 1, for each row, pass by pass.
# Rounding leaves errors of 1e-7 a row in it, and whoever adds less has no Cholesky factor of rows
# that are all but dependent. The last passes, of rows that are all but orthonormal, add nothing.
SHIFTS = (1e-6, 1e-6, 1e-6, 0.0, 0.0)


def orthonormal(rows: jax.Array) -> jax.Array:
    """Orthonormal rows that span, one after another, what those of [k, b, d] (of full rank) span:
    L⁻¹ of them, with L lower triangular and its diagonal positive.

    In full precision: what GPUs and TPUs multiply with by default would leave bases that are none.
    """
    with jax.default_matmul_precision("highest"):
        return jax.lax.platform_dependent(rows, cpu=gram_schmidt, default=cholesky)


def cholesky(rows: jax.Array) -> jax.Array:
    """`orthonormal`, by shifted Cholesky QR, repeated (Fukaya et al. 2020): L from the Gram matrix,
    plus a shift that bounds its condition, until the rows are orthonormal to rounding."""
    rows = rows * jax.lax.rsqrt(jnp.sum(rows * rows, 2, keepdims=True) + 1e-37)
    eye = jnp.eye(rows.shape[1], dtype=rows.dtype)[None]
    for shift in SHIFTS:
        gram = rows @ rows.mT + shift * rows.shape[1] * eye
        lower = jax.lax.linalg.cholesky(gram, symmetrize_input=False)
        rows = jax.lax.linalg.triangular_solve(lower, rows, left_side=True, lower=True)
    return rows


def gram_schmidt(rows: jax.Array, panel: int = PANEL) -> jax.Array:
    """`orthonormal`, every projection done twice (Giraud et al. 2005: orthogonal to rounding where
    the condition number is below its inverse), in panels of rows. What is compiled does not grow
    with the number of panels."""
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
