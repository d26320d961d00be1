"""A direction made of whole matrices: Adam in the eigenbasis of the gradients, with Adam's length.

Coordinates hide how a layer's gradients hang together; the eigenvectors of E[GGᵀ] and E[GᵀG] show
it. Dividing by the root of the second moment there in place of coordinate by coordinate is SOAP
(Vyas et al. 2024), after Shampoo (Gupta et al. 2018). Here it is one more thing that a learned
optimizer observes: free of theta, so that the first-order engine keeps it as it keeps a gradient.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from l2l import base, features

# Of the averages of GGᵀ/mean(G²) and of the second moment in the eigenbasis.
DECAY, SECOND_DECAY = 0.95, 0.999
# The basis follows by one step of orthogonal iteration in every step at first, then in every tenth.
OFTEN, EVERY = 10, 10
# Second moments below this part of the mean over the matrix are rounding: directions in which the
# gradients have nothing, which dividing by themselves would make as long as all others.
NOTHING = 1e-9
# Numbers a tensor gets from here: see `whitening`.
PER_TENSOR = 2


class Basis(NamedTuple):
    """average: of the outer products of the gradients over one side of a matrix, [d, d]. vectors:
    [d, d], orthonormal columns, about the eigenvectors of that."""

    average: jax.Array
    vectors: jax.Array


class Whitening(NamedTuple):
    """bases: a pair a tensor, of the rows and of the columns, () for a side left as it is. nu: [P],
    the second moment in the eigenbasis, each tensor as the matrix it is taken for."""

    bases: tuple[tuple[Basis | tuple, Basis | tuple], ...]
    nu: jax.Array


def matrix_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """The matrix a tensor is taken for: all axes but the last, by the last (kernels of haiku and
    flax have their outputs there); a vector is one row."""
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (1, math.prod(shape))


def whitening(*, largest: int, decay: float, second_decay: float, eps_root: float):
    """The preconditioner of rules whose statistics are `features.Moments`.

    The direction is m̃/√ν in the basis, back among the coordinates, with m̃ = b1·m̂ + (1 − b1)·g
    (Nesterov's, as in NAdam), times a number a tensor that gives it the length of m̃/√v̂: of what
    was tried on tasks like those of the release, this lost least with one rate for all. It is
    bounded by the length of Adam's step, and does not change when the loss is multiplied.

    Of each tensor: tanh of the logarithm of its root mean square before that (small where the
    gradients have few directions), and its cosine to m̃/√v̂.

    Args:
      largest: sides longer than this are left as they are; a matrix with two such sides, and every
        vector, keeps Adam's direction.
      decay, second_decay: of the first of the moments and of the second (b1, b2).
      eps_root: in every root.
    """

    def sides(shape):
        rows, columns = matrix_of(shape)
        matrix = rows > 1 and columns > 1
        return [size if matrix and size <= largest else () for size in (rows, columns)]

    def statistics(params, dtype):
        def basis(size):
            return size and Basis(jnp.zeros((size, size), dtype), jnp.eye(size, dtype=dtype))

        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]
        bases = tuple(tuple(map(basis, sides(shape))) for shape in shapes)
        return Whitening(bases, jnp.zeros((base.count(params),), dtype))

    def observe(gradient, moments, past, step, shapes):
        count = step + 1
        # The moments after this step, of which the rule's own are made later, block by block.
        mu = decay * moments.mu[0] + (1 - decay) * gradient
        nu = second_decay * moments.nu + (1 - second_decay) * jnp.square(gradient)
        ahead = decay * mu / (1 - decay**count) + (1 - decay) * gradient
        adam = ahead / features.root(nu / (1 - second_decay**count), eps_root)
        often = (step < OFTEN) | (step % EVERY == 0)
        bases, directions, after, told, start = [], [], [], [], 0
        for shape, pair in zip(shapes, past.bases, strict=True):
            size = math.prod(shape)
            g, m, plain, second = (
                x[start : start + size] for x in (gradient, ahead, adam, past.nu)
            )
            start += size
            if not any(pair):
                bases.append(pair)
                directions.append(plain)
                after.append(second)
                length = jnp.sqrt(jnp.sum(plain * plain) / max(size, 1) + 1e-12)
                told.append(jnp.stack([jnp.tanh(jnp.log(length)), jnp.ones_like(length)]))
                continue
            matrix = matrix_of(shape)
            # A constant, for derivatives too: those of eigenvectors are infinite where two
            # eigenvalues meet.
            still = jax.lax.stop_gradient(g.reshape(matrix))
            pair = _follow(still, pair, often)
            bases.append(pair)
            rotated = _into(g.reshape(matrix), pair)
            second = SECOND_DECAY * second + (1 - SECOND_DECAY) * jnp.square(rotated).reshape(-1)
            after.append(second)
            moment = second / (1 - SECOND_DECAY**count)
            root = features.root(moment + NOTHING * jnp.mean(moment), eps_root).reshape(matrix)
            direction = _back(_into(m.reshape(matrix), pair) / root, pair).reshape(-1)
            own = jnp.mean(direction * direction) + 1e-12
            adams = jnp.mean(plain * plain) + 1e-12
            directions.append(direction * jnp.sqrt(adams / own))
            cosine = jnp.mean(direction * plain) / jnp.sqrt(own * adams)
            told.append(jnp.stack([jnp.tanh(0.5 * jnp.log(own)), cosine]))
        present = Whitening(tuple(bases), jnp.concatenate(after))
        return jnp.concatenate(directions)[None], jnp.stack(told, 1), present

    return base.Preconditioner(statistics, observe, ("whitened m̃/√ν",))


def _follow(gradient, pair, often):
    """A pair of bases after another gradient."""
    # Each gradient counts the same, however large: a first one of 1e6 would else be all there is.
    scale = jnp.mean(jnp.square(gradient)) + 1e-30
    products = (gradient @ gradient.T, gradient.T @ gradient)
    pair = tuple(
        basis and Basis(DECAY * basis.average + (1 - DECAY) * product / scale, basis.vectors)
        for basis, product in zip(pair, products, strict=True)
    )

    def iterate(basis):
        # The last term decides where the gradients have no direction at all.
        turned = basis.average @ basis.vectors
        turned += 1e-9 * jnp.eye(len(turned), dtype=turned.dtype)
        return basis._replace(vectors=jnp.linalg.qr(turned)[0])

    def both(pair):
        return tuple(basis and iterate(basis) for basis in pair)

    return jax.lax.cond(often, both, lambda pair: pair, pair)


def _into(matrix, pair):
    """A matrix in its basis."""
    rows, columns = pair
    matrix = rows.vectors.T @ matrix if rows else matrix
    return matrix @ columns.vectors if columns else matrix


def _back(matrix, pair):
    rows, columns = pair
    matrix = rows.vectors @ matrix if rows else matrix
    return matrix @ columns.vectors.T if columns else matrix
