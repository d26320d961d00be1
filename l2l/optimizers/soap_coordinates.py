"""SOAP's direction as a feature of each coordinate, for `lstm`; the optimizer itself is `soap.py`.

The eigenvectors of E[GGᵀ] and E[GᵀG] show what coordinates hide, how the gradients of a layer hang
together: dividing by the root of the second moment in that basis, in place of coordinate by
coordinate, is SOAP (Vyas et al. 2024), after Shampoo (Gupta et al. 2018). `soap.py` has it as an
optax transformation with its own moments, in blocks, for large models. Here it is the
`Preconditioner` of a coordinate-by-coordinate rule, which shares the rule's moments and leaves
matrices whole: free of theta, so that the first-order engine keeps it as it keeps a gradient. The
released `lstm` depends on every constant here (`versions.py`).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from l2l.core import base
from l2l.optimizers import features
from l2l.optimizers.matrices import matrix_of
from l2l.optimizers.orthogonal import orthonormal

# Of the averages of GGᵀ/mean(G²) and of the second moment in the eigenbasis.
DECAY, SECOND_DECAY = 0.95, 0.999
# The basis follows by one step of orthogonal iteration in every step at first, then in every tenth.
OFTEN, EVERY = 10, 10
# What is added to every eigenvalue in that step, as a part of their mean: while it is often, and
# later. Gradients of a batch span less than the whole space, and rounding would span the rest, on
# every machine another; once a basis is near its eigenvectors there is little left to amplify.
DAMPING_OFTEN, DAMPING = 0.3, 1e-3
# Second moments below this part of the mean over the matrix are rounding: directions in which the
# gradients have nothing, which dividing by themselves would make as long as all others.
NOTHING = 1e-9
# Added to mean squares, so that those of zeros have roots and logarithms.
TINY = 1e-12
# Features of a tensor that come from here: see `soap_direction`.
PER_TENSOR = 2


class Basis(NamedTuple):
    """Of one side, d long, of k matrices of one shape. average: of the outer products of the
    gradients over that side, [k, d, d]. vectors: [k, d, d], orthonormal columns, about the
    eigenvectors of those."""

    average: jax.Array
    vectors: jax.Array


class SoapAccumulators(NamedTuple):
    """bases: a pair a shape, of the rows and of the columns, () for a side left as it is. nu: [P],
    the second moment in the eigenbasis, each tensor as the matrix it is taken for."""

    bases: tuple[tuple[Basis | tuple, ...], ...]
    nu: jax.Array


def soap_direction(*, largest: int, decay: float, second_decay: float, eps_root: float):
    """The preconditioner of rules whose accumulators are `features.Moments`.

    The direction is m̃/√ν in the basis, back among the coordinates, with m̃ = b1·m̂ + (1 − b1)·g
    (Nesterov's, as in NAdam), times one number per tensor that gives it the length of m̃/√v̂: of what
    was tried on tasks like those of the release, this lost least with one rate for all. It is
    bounded by the length of Adam's step, and does not change when the loss is multiplied.

    To a derivative the bases are constants: it is that of the direction with every basis held where
    it is, all else followed, the second moments in the bases and the lengths among it. Those of
    eigenvectors themselves are infinite where two eigenvalues meet, as in a null space they do.

    Of each tensor: tanh of the logarithm of its root mean square before that (small where the
    gradients have few directions), and its cosine to m̃/√v̂.

    Args:
      largest: sides longer than this are left as they are; a matrix with two such sides, and every
        vector, keeps Adam's direction.
      decay, second_decay: of the first of the moments and of the second (b1, b2).
      eps_root: in every root.
    """

    view = _View(largest, decay, second_decay, eps_root)
    return base.Preconditioner(view.accumulators, view.observe, ("SOAP's m̃/√ν",))


class _View(NamedTuple):
    """What is seen of matrices: `observe` and its accumulators."""

    largest: int
    decay: float
    second_decay: float
    eps_root: float

    def grouped(self, shapes):
        """{matrix: the numbers of the tensors taken for it}, of those with a side to have a basis.
        Matrices of one shape go together: what there is to compile grows with the shapes alone."""
        groups = {}
        for i, matrix in enumerate(map(matrix_of, shapes)):
            if min(matrix) > 1 and min(matrix) <= self.largest:
                groups.setdefault(matrix, []).append(i)
        return groups

    def accumulators(self, params, dtype):
        def basis(size, count):
            if size > self.largest:
                return ()
            eye = jnp.broadcast_to(jnp.eye(size, dtype=dtype), (count, size, size))
            return Basis(jnp.zeros_like(eye), eye)

        groups = self.grouped([jnp.shape(leaf) for leaf in jax.tree.leaves(params)])
        bases = tuple(
            tuple(basis(size, len(numbers)) for size in matrix)
            for matrix, numbers in groups.items()
        )
        return SoapAccumulators(bases, jnp.zeros((base.count(params),), dtype))

    def observe(self, gradient, moments, past, step, shapes):
        # The moments after this step, of which the rule's own are made later, block by block.
        first = features.Moments(moments.mu[:1], moments.nu)
        _, hat = features.update_moments(
            gradient, first, step, decays=(self.decay,), second_decay=self.second_decay
        )
        ahead = self.decay * hat.mu[0] + (1 - self.decay) * gradient
        adam = ahead / features.root(hat.nu, self.eps_root)
        groups = self.grouped(shapes)
        sizes = tuple(map(math.prod, shapes))
        # Few large operations in place of many small ones, of which each costs a microsecond: that
        # is most of a step of a small network.
        rows = jnp.stack([gradient, ahead, adam, past.nu])
        tensors = [rows[:, end - n : end] for end, n in zip(np.cumsum(sizes), sizes, strict=True)]
        own = [i for i in range(len(sizes)) if not any(i in group for group in groups.values())]
        lengths = features.pool([adam * adam], sizes, own) + TINY
        found, order, bases = [jnp.concatenate([lengths, jnp.ones_like(lengths)])], list(own), []
        after = {i: tensors[i][2:] for i in own}
        for (matrix, numbers), pair in zip(groups.items(), past.bases, strict=True):
            arrays = jnp.stack([tensors[i] for i in numbers], 1)
            arrays = arrays.reshape(4, len(numbers), *matrix)
            both, seen, pair = self.turned(arrays, pair, step)
            bases.append(pair)
            found.append(seen)
            order += numbers
            both = both.reshape(2, len(numbers), -1)
            after |= {i: both[:, j] for j, i in enumerate(numbers)}
        found = jnp.concatenate(found, 1)[:, np.argsort(order)]
        found = jnp.stack([jnp.tanh(0.5 * jnp.log(found[0])), found[1]])
        direction, nu = jnp.concatenate([after[i] for i in range(len(sizes))], 1)
        return direction[None], found, SoapAccumulators(tuple(bases), nu)

    def turned(self, arrays, pair, step):
        """The direction of k matrices of one shape.

        Args:
          arrays: [4, k, rows, columns], the gradient, m̃, m̃/√v̂ and the second moment in the bases.
          pair: their bases.

        Returns:
          ([2, k, rows, columns], the direction and the second moment; [2, k], the mean square of
          the direction before it got its length, and its cosine to m̃/√v̂; the bases).
        """
        g, m, flat, second = arrays
        pair = _follow(*jax.lax.stop_gradient((g, pair)), step)
        second = SECOND_DECAY * second + (1 - SECOND_DECAY) * jnp.square(_into(g, pair))
        moment = second / features.weight_of(SECOND_DECAY, step + 1, second.dtype)
        nothing = NOTHING * jnp.mean(moment, (1, 2), keepdims=True)
        direction = _back(_into(m, pair) / features.root(moment + nothing, self.eps_root), pair)
        length, adams, along = (
            jnp.mean(x, (1, 2)) for x in (direction**2, flat**2, direction * flat)
        )
        length, adams = length + TINY, adams + TINY
        scaled = direction * jnp.sqrt(adams / length)[:, None, None]
        seen = jnp.stack([length, along / jnp.sqrt(length * adams)])
        return jnp.stack([scaled, second]), seen, pair


def _follow(gradients, pair, step):
    """A pair of bases after another gradient of each of their matrices, [k, rows, columns]."""
    early = step < OFTEN
    # Each gradient counts the same, however large: a first one of 1e6 would else be all there is.
    scale = jnp.mean(jnp.square(gradients), (1, 2), keepdims=True) + 1e-30
    turned = gradients.mT
    products = (gradients @ turned, turned @ gradients)
    pair = tuple(
        basis and Basis(DECAY * basis.average + (1 - DECAY) * product / scale, basis.vectors)
        for basis, product in zip(pair, products, strict=True)
    )

    def iterate(basis):
        eigenvalue = jnp.trace(basis.average, axis1=-2, axis2=-1) / basis.average.shape[-1]
        # TINY where there has been no gradient yet: of nothing there is no basis.
        part = jnp.where(early, DAMPING_OFTEN, DAMPING).astype(eigenvalue.dtype)
        damping = (part * eigenvalue + TINY)[:, None, None]
        ahead = basis.average @ basis.vectors + damping * basis.vectors
        return basis._replace(vectors=orthonormal(ahead.mT).mT)

    def both(pair):
        return tuple(basis and iterate(basis) for basis in pair)

    return jax.lax.cond(early | (step % EVERY == 0), both, lambda pair: pair, pair)


def _into(matrices, pair):
    """Matrices in their bases."""
    rows, columns = pair
    matrices = rows.vectors.mT @ matrices if rows else matrices
    return matrices @ columns.vectors if columns else matrices


def _back(matrices, pair):
    rows, columns = pair
    matrices = rows.vectors @ matrices if rows else matrices
    return matrices @ columns.vectors.mT if columns else matrices
