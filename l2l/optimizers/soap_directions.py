"""The directions of SOAP: Adam's, in the eigenbasis of each matrix's gradients (Vyas et al. 2024,
arXiv 2409.11321).

Coordinates hide how a layer's gradients are related; the eigenvectors of E[GGᵀ] and E[GᵀG] show
it. `observe` goes into their basis and `back` comes out of it. Between the two, `soap.py` does
nothing, and the learned rule of `per_tensor.py` chooses among several directions.

What is cheaper here than in the paper: the first moment stays in the basis and is turned when the
basis moves; the outer products and the bases are updated only every few steps; long sides are cut
into blocks; and every batch of blocks is one set of products, however many tensors it has.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from l2l.optimizers import matrices, meshes, ranges
from l2l.optimizers.matrices import Batch, Places, Plan, Stack, plan_of
from l2l.optimizers.orthogonal import orthonormal

# Added to means of about 1 before taking their roots, so that zeros have derivatives too.
TINY = 1e-12
# Arrays of up to this many numbers are summed together.
SMALL = 8192


class Settings(NamedTuple):
    """What decides the directions.

    decays: of the first moments; the first is the nominal one (b1).
    second_decay: of the second moment (b2).
    second_power: c; in step t that decay is 1 − t^−c where this is less than b2 (Shazeer and Stern
      2018, section 7.2), so that the moment remembers a shrinking part of the run; 0 for b2
      throughout.
    eps, eps_root: the denominator is √(ν + eps_root) + eps. Gradients below √eps_root count as
      none.
    nothing: second moments in the basis count as at least this fraction of their mean over the
      block: below it are directions in which the gradients contain nothing but rounding errors.
    block_size: sides longer than this are cut into equal blocks.
    longest: sides longer than this have no basis; a tensor with no basis at all, like every
      vector, moves as with Adam.
    basis_decay: of the averages of GGᵀ and GᵀG, per step.
    normalized: each gradient counts the same in these averages, however large it is.
    average_every, basis_every: steps between two updates of the averages, and of the bases.
    often: for this many steps at the start, both are updated every time.
    damping: of an update of a basis, relative to the mean eigenvalue. It keeps a null space where
      it is; undamped, rounding would turn the null space, differently on every machine.
    nesterov: the nominal direction is b1·m̂ + (1 − b1)·g, as in NAdam, instead of m̂.
    gradient: the gradient itself, over the same root, is one more direction.
    lookahead: a gradient takes part in the bases of its own step, not only in those of the next.
      The first step is then made in the basis of its gradient, and not among the coordinates, which
      costs a tenth of the loss at the end of runs of 600 steps.
    graft: a block's direction has the length |m̃|/√E|g|² instead of its own: 1 where the gradients
      are steady, √((1−b1)/(1+b1)) where they are noise, and the same in every basis.
    """

    decays: tuple[float, ...] = (0.9,)
    second_decay: float = 0.999
    second_power: float = 0.0
    eps: float = 1e-16
    eps_root: float = 1e-28
    nothing: float = 1e-9
    block_size: int = 256
    longest: int = 8192
    basis_decay: float = 0.95
    normalized: bool = True
    average_every: int = 1
    basis_every: int = 10
    often: int = 10
    damping: float = 1e-2
    nesterov: bool = True
    lookahead: bool = True
    gradient: bool = False
    graft: bool = True

    def checked(self) -> "Settings":
        """These, if those that `per_tensor` sets are in range."""
        ranges.decays("decays", self.decays)
        ranges.not_negative("second_power", self.second_power)
        if not (self.second_power and self.second_decay == 1):  # The power is below 1 by itself.
            ranges.decay("second_decay", self.second_decay)
        whole = ("block_size", "average_every", "basis_every")
        return self._replace(**{name: ranges.whole(name, getattr(self, name)) for name in whole})

    def plan(self, params) -> Plan:
        return plan_of(params, self.block_size, self.longest)


class Side(NamedTuple):
    """One side, d long, of the k blocks of a batch. average: of the outer products of the
    gradients over that side, [k, d, d]. vectors: [k, d, d], orthonormal rows, approximately the
    eigenvectors of these averages."""

    average: jax.Array
    vectors: jax.Array


Bases = tuple[tuple[Side | tuple, Side | tuple], ...]


class SoapState(NamedTuple):
    """count: steps taken, int32. mu: a pytree like the parameters for each decay. nu: one more.
    For matrices, mu and nu are kept in the basis. bases: (rows, columns) for each batch of blocks,
    () for a side that has none."""

    count: jax.Array
    mu: tuple[Any, ...]
    nu: Any
    bases: Any


# Means over a tensor, the same in every basis: of g·m (m the nominal first moment before this
# gradient), of m², g², of the square of the nominal numerator, and of the second moment.
POOLED = ("g·m", "m²", "g²", "m̃²", "ν̂")


class Seen(NamedTuple):
    """The directions of one step, before they leave the bases.

    blocks: for each group of the plan, [J, k, ...].
    scales: for each group, [J, k]: the factors by which these are still to be multiplied.
    bases: for each group, those that they are in; ((), ()) where there are none.
    pooled: [len(POOLED) + J, G], means over each tensor: `POOLED`, then the squares of the J
      directions.

    places: `matrices.places`.

    Row 0 is the nominal direction; then one for each further decay, and the gradient's if chosen.
    """

    blocks: tuple[jax.Array, ...]
    scales: tuple[jax.Array, ...]
    bases: Bases
    pooled: jax.Array
    places: Places


def accumulator_dtype(x) -> jnp.dtype:
    """float32 or float64: half precision is too coarse for averages over a thousand steps."""
    return jnp.promote_types(jnp.result_type(x), jnp.float32)


def start(settings: Settings, params) -> SoapState:
    """The state before the first step, in the shapes and shardings of the parameters."""

    def zeros():
        tree = jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), accumulator_dtype(x)), params)
        return meshes.beside(tree, params)

    leaves = jax.tree.leaves(params)
    if not leaves:
        # One leaf, since the bases depend on which tensors there are: so the state of no tensors is
        # a prefix of any other, which `optax.tree.map_params` requires.
        bases = jnp.zeros((0,))
        return SoapState(jnp.zeros((), jnp.int32), (params,) * len(settings.decays), params, bases)

    def side(d, batch, whitened):
        if not whitened:
            return ()
        dtype = jnp.result_type(*(accumulator_dtype(leaves[m.leaf]) for m in batch.members))
        eye = jnp.broadcast_to(jnp.eye(d, dtype=dtype), (batch.size, d, d))
        return Side(jnp.zeros_like(eye), eye)

    bases = tuple(
        tuple(side(d, batch, w) for d, w in zip(batch.block, batch.whitened, strict=True))
        for batch in settings.plan(params).batches
    )
    return SoapState(
        jnp.zeros((), jnp.int32), tuple(zeros() for _ in settings.decays), zeros(), bases
    )


def observe(settings: Settings, gradient, state: SoapState, floors=None) -> tuple[Seen, SoapState]:
    """The directions that a gradient (a pytree like the parameters) leads to, and the state after
    it. Derivatives treat the bases as constants: those of eigenvectors are infinite where two
    eigenvalues meet.

    floors: [G], one for each tensor, in place of `Settings.eps_root`.
    """
    plan = settings.plan(gradient)
    leaves, treedef = jax.tree.flatten(gradient)
    nu = jax.tree.leaves(state.nu)
    mu = [jax.tree.leaves(tree) for tree in state.mu]
    leaves = [_bounded(x.astype(kept.dtype)) for x, kept in zip(leaves, nu, strict=True)]
    after_mu: list[list] = [[None] * plan.count for _ in mu]
    after_nu: list = [None] * plan.count
    count = state.count + 1
    blocks, scales, bases, sums = [], [], [], []
    places = matrices.places(plan, count)
    pairs = (((), ()),) * len(plan.stacks) + state.bases
    for group, pair in zip(plan.groups, pairs, strict=True):
        g, second = group.gather(leaves), group.gather(nu)
        first = jnp.stack([group.gather(tree) for tree in mu])
        sides = group.sides
        if sides:
            pair, first = _follow(settings, g, pair, sides, first, state.count)
        floor = settings.eps_root if floors is None else floors[np.asarray(group.owners)]
        rows, first, second, own = _directions(
            settings, into(g, pair), first, second, count, sides, floor
        )
        scale, own = _grafted(settings, own, sides, floor)
        for found, one in zip((blocks, scales, bases, sums), (rows, scale, pair, own), strict=True):
            found.append(one)
        for tree, new in zip([*after_mu, after_nu], [*first, second], strict=True):
            for leaf, value in group.scatter(new, places).items():
                tree[leaf] = value.astype(nu[leaf].dtype)

    def unflatten(leaves):
        return meshes.beside(treedef.unflatten(leaves), gradient)

    pooled = plan.per_leaf(sums)
    pooled = pooled / jnp.asarray([[max(x.size, 1) for x in leaves]], pooled.dtype)
    kept = tuple(bases[len(plan.stacks) :])
    state = SoapState(count, tuple(map(unflatten, after_mu)), unflatten(after_nu), kept)
    return Seen(tuple(blocks), tuple(scales), tuple(bases), pooled, places), state


def _bounded(x: jax.Array) -> jax.Array:
    """Clipped to numbers whose squares and sums of squares are finite. What is not finite stays
    so: it is to be noticed."""
    most = float(jnp.finfo(x.dtype).max) ** 0.4
    return jnp.where(jnp.isinf(x), x, jnp.clip(x, -most, most))


def _areas(sides, dtype) -> jax.Array:
    """[k]: how many numbers each block has."""
    return jnp.asarray(np.prod(sides, 0), dtype)


def _directions(settings, g, mu, nu, count, sides, floor):
    """(directions [J, k, …], mu [D, k, …], nu, sums [S, k]) of k gradients and earlier moments.
    sums, over each of the k: g·m, m², g², ν̂, the squares of the J numerators, and those of the J
    directions. sides: of blocks in their bases; () of tensors that have none. floor: of each of the
    k, or of all."""
    b1, b2 = settings.decays[0], settings.second_decay
    step = count.astype(g.dtype)
    if settings.second_power:  # The first gradient is all of ν: no bias to correct.
        b2, whole = jnp.minimum(b2, 1 - step**-settings.second_power), 1
    else:
        whole = 1 / (1 - b2**step)
    over = tuple(range(1 - g.ndim, 0))
    decays = jnp.asarray(settings.decays, g.dtype).reshape(-1, *[1] * g.ndim)
    before = mu[0]
    mu = decays * mu + (1 - decays) * g[None]
    nu = b2 * nu + (1 - b2) * jnp.square(g)
    # One division, not one for every number.
    first = 1 / (1 - b1**step)
    rows = [first * mu[0]]
    # The parts of m and of g in this numerator, for its length.
    part, other = b1 * first, (1 - b1) * first
    if settings.nesterov:
        rows = [b1 * rows[0] + (1 - b1) * g]
        part, other = b1 * part, b1 * other + (1 - b1)
    if len(settings.decays) > 1:
        rows += list(mu[1:] * (1 / (1 - decays[1:] ** step)))
    rows += [g] if settings.gradient else []
    along, ahead, square, total, *further = _sums(
        (g * before, before * before, g * g, nu, *(row * row for row in rows[1:])), over
    )
    # The squared length of the nominal numerator, without a pass over it.
    length = part * part * ahead + 2 * part * other * along + other * other * square
    if sides:
        floor = floor + settings.nothing * (total * whole / _areas(sides, g.dtype))
    floor = jnp.broadcast_to(jnp.asarray(floor, g.dtype), total.shape)
    root = jnp.sqrt(nu * whole + floor.reshape(-1, *[1] * (g.ndim - 1))) + settings.eps
    directions = jnp.stack(rows) / root[None]
    squares = _sums([x * x for x in directions], over)
    lengths = [jnp.maximum(length, 0), *further]
    sums = jnp.stack([along, ahead, square, total * whole, *lengths, *squares])
    return directions, mu, nu, sums


def _sums(products, over) -> list[jax.Array]:
    """Sums over these axes: one after another, which needs no memory; or in one go if the arrays
    are small, where every operation costs as much as a thousand numbers."""
    if products[0].size > SMALL:
        return [jnp.sum(x, over) for x in products]
    return list(jnp.sum(jnp.stack(products), over))


def _grafted(settings, sums, sides, floor):
    """(the factors [J, k] on the directions whose sums `_directions` found, the sums that
    `Seen.pooled` are means of). What has no `sides`, like vectors, is not grafted."""
    own = (len(sums) - 4) // 2
    second, numerators, directions = sums[3], sums[4 : 4 + own], sums[4 + own :]
    scale = jnp.ones_like(directions)
    if sides and settings.graft:
        sizes = _areas(sides, scale.dtype)
        length = numerators / (second + sizes * floor)[None]
        scale = jnp.sqrt((length + TINY) / (directions / sizes[None] + TINY))
        directions = directions * jnp.square(scale)
    return scale, jnp.concatenate([sums[:3], numerators[:1], second[None], directions])


def _follow(settings, g, pair, sides, mu, step):
    """(the bases after another gradient [k, r, c], the first moments [D, k, r, c] in them)."""
    early = step < settings.often
    now = early | (step % settings.average_every == 0)
    moves = early | (step % settings.basis_every == 0)
    g, pair = jax.lax.stop_gradient((g, pair))
    averages, vectors = (tuple(side and side[i] for side in pair) for i in range(2))
    if settings.lookahead:
        averages = _average(settings, g, averages, sides, now, early)
    vectors, mu = _turn(settings.damping, sides, moves, averages, vectors, mu)
    if not settings.lookahead:
        averages = _average(settings, g, averages, sides, now, early)
    return tuple(
        () if isinstance(a, tuple) else Side(a, v) for a, v in zip(averages, vectors, strict=True)
    ), mu


def _once_if(condition, function, state):
    """function(state) if the condition holds, else state. This is a loop of one round or none,
    which overwrites what it reads; `lax.cond` would copy it in every step. Under `vmap` the
    function is skipped when the condition holds for none."""
    return jax.lax.while_loop(
        lambda carry: carry[0], lambda carry: (jnp.zeros_like(carry[0]), function(carry[1])),
        (condition, state),
    )[1]  # fmt: skip


def _average(settings, g, averages, sides, now, early):
    """The averages, with the outer products of another gradient added if `now`."""
    decay = settings.basis_decay**settings.average_every
    decay = jnp.where(early, settings.basis_decay, decay).astype(g.dtype)
    products = ("kab,kcb->kac", "kab,kac->kbc")

    def grow(averages):
        scale = 1.0
        if settings.normalized:
            mean = jnp.sum(jnp.square(g), (1, 2)) / _areas(sides, g.dtype)
            scale = 1 / (mean + 1e-30)[:, None, None]
        return tuple(
            ()
            if isinstance(a, tuple)
            else decay * a + (1 - decay) * (jnp.einsum(product, g, g) * scale)
            for a, product in zip(averages, products, strict=True)
        )

    return _once_if(now, grow, averages)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _turn(damping, sides, moves, averages, vectors, mu):
    """(bases, mu [D, k, r, c] in them), after a step of orthogonal iteration if `moves`."""

    def turn(state):
        vectors, mu = state
        new = tuple(
            () if isinstance(a, tuple) else _iterate(a, v, damping, own)
            for a, v, own in zip(averages, vectors, sides, strict=True)
        )
        return new, _rotated(mu, vectors, new)

    return _once_if(moves, turn, (vectors, mu))


@_turn.defjvp
def _turn_jvp(damping, sides, primals, tangents):
    # The bases are constants to every derivative; the moments turn with them.
    moves, averages, vectors, mu = primals
    new, after = _turn(damping, sides, moves, averages, vectors, mu)
    tangent = jax.lax.cond(moves, lambda t: _rotated(t, vectors, new), lambda t: t, tangents[-1])
    return (new, after), (jax.tree.map(jnp.zeros_like, new), tangent)


def _rotated(mu, old, new):
    """Moments [D, k, r, c] from the old bases to the new: what is U M Vᵀ becomes U′MV′ᵀ."""
    (rows, columns), (new_rows, new_columns) = old, new
    r, c = mu.shape[-2:]
    # The cheaper of two orders: one side may be much shorter than the other.
    if not isinstance(rows, tuple):
        mu = new_rows @ (rows.mT @ mu) if c < r else (new_rows @ rows.mT) @ mu
    if not isinstance(columns, tuple):
        mu = (mu @ columns) @ new_columns.mT if r < c else mu @ (columns @ new_columns.mT)
    return mu


def _iterate(average, vectors, damping, lengths):
    """One step of orthogonal iteration towards the eigenvectors. lengths: of the k sides."""
    trace = jnp.trace(average, axis1=1, axis2=2)
    mean = (trace / jnp.asarray(lengths, trace.dtype))[:, None, None]
    # Before the first gradient there is nothing to follow. In units of the mean eigenvalue the
    # squares of rows neither overflow nor vanish, however large or small gradients are.
    there = mean > 0
    with jax.default_matmul_precision("highest"):
        ahead = vectors @ jnp.where(there, average / jnp.where(there, mean, 1), 0)
    return orthonormal(ahead + jnp.where(there, damping, 1) * vectors)


def into(blocks: jax.Array, pair) -> jax.Array:
    """Blocks [..., r, c] in their bases."""
    rows, columns = pair
    blocks = rows.vectors @ blocks if rows else blocks
    return blocks @ columns.vectors.mT if columns else blocks


def out_of(blocks: jax.Array, pair) -> jax.Array:
    """The inverse of `into`."""
    rows, columns = pair
    blocks = rows.vectors.mT @ blocks if rows else blocks
    return blocks @ columns.vectors if columns else blocks


def parts(settings: Settings, seen: Seen, like) -> Iterator[tuple[Stack | Batch, Callable]]:
    """Every group of the tensors of a pytree `like`, with a function from coefficients [J', k], for
    the first J' directions, to Σⱼ cⱼ dⱼ of its k members or blocks, [k, ...], out of the bases."""
    groups = settings.plan(like).groups
    for group, *own in zip(groups, seen.blocks, seen.scales, seen.bases, strict=True):
        yield group, partial(_mixed, *own)


def _mixed(rows, scale, pair, coefficients):
    pair = jax.lax.stop_gradient(pair)
    own = coefficients * scale[: len(coefficients)]
    own = own.reshape(*own.shape, *[1] * (rows.ndim - 2))
    if len(own) == 1:  # A single factor goes along with what is done to the updates next.
        return own[0] * out_of(rows[0], pair)
    return out_of(jnp.sum(own * rows[: len(own)], 0), pair)


def back(settings: Settings, seen: Seen, coefficients, like) -> Any:
    """Σⱼ cⱼ dⱼ of each tensor, out of the bases: a pytree like `like`.

    coefficients: [J', G], for the first J' directions of each of the G tensors.
    """
    leaves, treedef = jax.tree.flatten(like)
    out: dict[int, jax.Array] = {}
    for group, mixed in parts(settings, seen, like):
        out |= group.scatter(mixed(coefficients[:, np.asarray(group.owners)]), seen.places)
    return treedef.unflatten([out[i].astype(x.dtype) for i, x in enumerate(leaves)])
