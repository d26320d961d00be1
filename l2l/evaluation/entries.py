"""From --optimizer to what is measured, and what each learned optimizer is compared with.

A released name, an export or a run; an optax expression; or a function of anybody's.
"""

import difflib
import functools
import inspect
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from l2l.console import modules, schema
from l2l.console.errors import UserError
from l2l.core import base
from l2l.evaluation import baselines
from l2l.evaluation.comparison import Entry
from l2l.optimizers import binding
from l2l.storage import exports, files, loading
from l2l.tasks.losses import LOSSES

# Of the nominal rate of an untrained optimizer: what its best single rate is looked for among.
MULTIPLIERS = (0.3, 1.0, 3.0)
# What an optimizer may be told of the length of a run, as the part of it.
TOLD = {"right": 1.0, "third": 1 / 3, "nothing": 0.0}


def read(text: str) -> Entry:
    """An entry from a released name, an optax expression, package.module:function, or the path of
    an export or run: what is meant by a name is not moved by what lies in the working directory.

    Raises:
      UserError: it is none of these; the message names the nearest, released ones first.
    """
    if (
        found := re.fullmatch(r"([\w.~/-]+):([A-Za-z_]\w*)\s*(\(.*\))?", text, re.DOTALL)
    ) is not None:
        return Entry(text, imported(*found.groups()))
    released = text in loading.released()
    expression = re.fullmatch(r"[A-Za-z_][\w.]*\s*(\(.*\))?", text, re.DOTALL) is not None
    name = baselines.plain_name(re.split(r"[\s(]", text)[0])
    if not released and expression and (name in baselines.OPTIMIZERS or "(" in text):
        return Entry(text, baselines.parse(text))
    path = files.readable(text)
    if not released and os.sep not in text and not path.exists():
        raise UserError(_unknown(text, name))
    optimizer, theta, metadata = exports.read(loading.locate(text))
    if isinstance(theta, base.Parts) and jax.tree.leaves(theta.loss):
        optimizer = _with_loss(optimizer, theta, metadata, text)
    stem = path.name if path.is_dir() else path.stem
    return Entry(text if released else stem, optimizer, theta)


def read_all(texts: Sequence[str]) -> list[Entry]:
    """The entry of each text, as `read` makes it, with names that differ: where files have one
    name, as all exports of runs do, they are called by as much of the end of their paths as tells
    them apart.

    Raises:
      UserError: two texts are the same; or of `read`.
    """
    if twice := [text for i, text in enumerate(texts) if text in texts[:i]]:
        raise UserError(f"--optimizer names {twice[0]} twice: leave one out.")
    found = [read(text) for text in texts]
    known = [_names(entry.name, text) for entry, text in zip(found, texts, strict=True)]
    lengths = [0] * len(known)
    while True:
        names = [own[length] for own, length in zip(known, lengths, strict=True)]
        same = [i for i, name in enumerate(names) if names.count(name) > 1]
        if not same:
            return [e._replace(name=name) for e, name in zip(found, names, strict=True)]
        for i in same:  # The longest are the texts, which differ.
            lengths[i] = min(lengths[i] + 1, len(known[i]) - 1)


def _names(shortest: str, text: str) -> list[str]:
    """What the entry of a text may be called, from the shortest on; the last is the text itself."""
    if shortest == text:  # All but paths.
        return [text]
    above = text.rstrip("/").split("/")[:-1]
    ends = ["/".join([*above[len(above) - i :], shortest]) for i in range(len(above) + 1)]
    return [*filter(None, ends), text]


def _with_loss(optimizer, theta: base.Parts, metadata, text) -> base.LearnedOptimizer:
    """An optimizer from an export with the loss that its theta holds settings of, which is looked
    up by the configuration that the export was trained with."""
    try:
        learned = schema.make("loss", LOSSES, metadata["config"]["theta"]["loss"])
    except (KeyError, TypeError, UserError) as error:
        raise UserError(
            f"{text} holds settings of a loss, and the configuration in its metadata does not say "
            f"of which ({error}): evaluate the run that it came from."
        ) from None

    def bind(theta, own):
        def loss(params, problem, batch):
            first = functools.partial(learned.init, jax.random.key(0))
            # Untrained, the loss is the one that learning began with. An export has dicts and lists
            # in place of whatever the task's parameters are made of.
            fitted = (
                first(params)
                if theta == ()
                else exports.fitted(theta, jax.eval_shape(first, params), "The learned loss")
            )
            return learned.bind(fitted, own)(params, problem, batch)

        return loss

    def init(key):
        fresh = optimizer.init(key)
        return base.Parts(fresh.optimizer, fresh.start)

    return optimizer._replace(init=init, loss=lambda theta, own: bind(theta.loss, own))


def _unknown(text: str, name: str) -> str:
    released, optax = list(loading.released()), list(baselines.OPTIMIZERS)
    near = [m for kind in (released, optax) for m in difflib.get_close_matches(name, kind, 1)]
    hint = f"Did you mean {' or '.join(near)}?" if near else modules.nearest_path(text).strip()
    return (
        f"There is no optimizer {text!r}. {hint} The released ones are {', '.join(released)}; "
        f"those of optax {', '.join(optax)}; and any path to an export or to a run directory will "
        "do, or package.module:function."
    )


def imported(place: str, name: str, typed: str | None = None) -> Callable:
    """(num_steps) -> what a function of anybody's returns, called with `num_steps=` if it takes it.

    Args:
      place: "package.module" or "path/to/file.py"; imported, and so executed, as the user asks.
      name: the function's; or that of a transformation that is there already.
      typed: further arguments, like "(1e-2, b1=0.95)".

    Raises:
      UserError: at once, if there is no such function, or it does not take these arguments; and
        from the call, if it returns no optax transformation. What it raises itself is passed on.
    """
    found, full = modules.attribute(place, name, "optimizer"), f"{place}:{name}"
    if _transforms(found):
        return lambda num_steps: found
    if not callable(found):
        raise UserError(
            f"{full} is {found!r}, which is not a function: name one that makes an optimizer."
        )
    args, kwargs = baselines.arguments(f"{name}{typed or '()'}")
    try:
        signature = inspect.signature(found)
    except ValueError:  # Of something built in.
        signature = None
    tells = signature is not None and "num_steps" in signature.parameters
    if signature is not None:
        try:
            signature.bind(*args, **({"num_steps": 1} if tells else {}), **kwargs)
        except TypeError as error:
            raise UserError(
                f"{full} cannot be called with {typed or 'no arguments'} ({error}): write "
                f"them after it, like {full}(learning_rate=1e-3)."
            ) from None

    @functools.lru_cache(maxsize=64)
    def make(num_steps: int):
        made: Any = found(*args, **({"num_steps": num_steps} if tells else {}), **kwargs)
        if not _transforms(made):
            raise UserError(
                f"{full} returned {type(made).__name__}, not an optax transformation: return "
                "one, a pair of functions init and update."
            )
        return optax.with_extra_args_support(made)

    return make


def _transforms(x) -> bool:
    both = all(callable(getattr(x, half, None)) for half in ("init", "update"))
    return both and not inspect.isclass(x)


def variants(
    entry: Entry, told: Sequence[float] = (), multipliers: Sequence[float] = MULTIPLIERS
) -> list[Entry]:
    """What an entry is compared with: itself, told other horizons; and its untrained twin, at
    multiples of its nominal rate: the same optimizer with a fresh theta, as training would begin
    with, whose runs start where the task says. Nothing for one that is not learned.

    Args:
      told: fractions of the length of a run; the entry itself is told the whole length.
      multipliers: of the untrained twin's rate; with several it counts at the best one for all
        cells (`untrained.with_best_rates`).
    """
    optimizer, theta = entry.optimizer, entry.theta
    if not isinstance(optimizer, base.LearnedOptimizer):
        return []
    names = {share: name for name, share in TOLD.items()}
    out = [
        entry._replace(name=f"{entry.name}, told {names[share]}", told=share, variant_of=entry.name)
        for share in told
        if share != 1
    ]
    untrained = optimizer.init(jax.random.key(0))
    rated = _rated(optimizer)
    for factor in multipliers:
        theta = untrained, jnp.float32(factor)
        name = f"{entry.name}, untrained" + (f" × {factor:g}" if factor != 1 else "")
        out.append(Entry(name, rated, theta, variant_of=entry.name, multiplier=factor))
    return out


def _rated(optimizer: base.LearnedOptimizer) -> base.LearnedOptimizer:
    """The optimizer as a function of (theta, the multiplier of its rate). Of what theta holds
    beside its weights the loss is kept; the start is not, as the fresh one is what a task draws."""

    def bind(theta):
        inner, factor = theta
        return binding.with_knobs(optimizer.bind(inner), learning_rate=factor)

    learned = optimizer.loss
    return base.LearnedOptimizer(
        lambda key: (optimizer.init(key), jnp.ones(())),
        bind,
        loss=None if learned is None else lambda theta, own: learned(theta[0], own),
    )
