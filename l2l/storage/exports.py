"""Exports: trained optimizers as safetensors files, to give away.

An export is one file: theta and the specification that rebuilds its optimizer. Nothing in it is
ever executed: the optimizer is looked up in `optimizers.registry`, and what the file says is
checked (`export_header.py`) before memory is taken.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from l2l.console import errors
from l2l.console.errors import UserError
from l2l.core import base
from l2l.optimizers import registry, versions
from l2l.storage import export_header, files, trees

EXPORT = "optimizer.safetensors"  # Its name in a run directory.
# 2 holds every setting and the versions of its rules; 1 held the settings its configuration named.
# 3 is 2 with a start or a loss beside the optimizer, which older readers would not know of.
FORMAT, WITH_PARTS = 2, 3
_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_PARTS = ("start", "loss")  # What `base.Parts` holds beside the optimizer.


class NotExportable(UserError):
    """`read` would refuse the file, so it is not written."""


class _Unregistered(Exception):
    """An export is of an optimizer that is not in `registry.OPTIMIZERS`; `name`, to be printed."""

    def __init__(self, name):
        super().__init__(name)
        self.name = errors.printable(str(name))[:100]


def export(path, specification: dict, theta, metadata: dict | None = None) -> Path:
    """Writes theta [pytree of arrays] and its optimizer's specification as one safetensors file.
    Of `Parts` the start and the loss are written too, as dicts and lists. What was written is read
    back before it replaces an earlier file.

    Args:
      specification: a section `optimizer` of a configuration: a name of `optimizers.registry`, and
        settings. What it leaves out is written too, so that other defaults of a later l2l change
        nothing (`optimizers/versions.py`).
      metadata: what else to remember, as JSON allows: configuration, seed, meta-steps, cost. That
        of another export will do, as `read` returns it: what it says of its own theta is replaced.

    Returns:
      The path.

    Raises:
      UserError: theta cannot be exported (`exportable`), or has numbers that are not finite; or the
        metadata are too long, or cannot be read back. An earlier file then stays as it is.
    """
    from safetensors.numpy import save

    exportable(specification, theta)
    for name, x in _named(theta).items():
        if not _finite(np.asarray(x)):
            raise NotExportable(
                f"This theta has numbers in {name or 'its one array'} that are not finite: export "
                "an earlier one."
            )
    parts = theta if isinstance(theta, base.Parts) else base.Parts(theta)
    tensors = {name: np.asarray(x) for name, x in _named(parts.optimizer).items()}
    settings = versions.complete(specification)
    rules = versions.rules_of(settings)
    header = {key: value for key, value in (metadata or {}).items() if key != trees.HELD}
    if held := {name: trees.paths(tree) for name, tree in _beside(parts).items()}:
        header[trees.HELD] = held
        for name, tree in _beside(parts).items():
            tensors |= trees.tensors(name, tree)
    header |= {
        "format": WITH_PARTS if held else FORMAT,
        "optimizer": {"name": settings.pop("name"), "rules": rules, "settings": settings},
        "sha256": _digest(tensors),
    }
    content = save(tensors, {"l2l": json.dumps(header)})
    read_bytes = 8 + int.from_bytes(content[:8], "little")
    if read_bytes > export_header.LARGEST_HEADER:
        raise NotExportable(
            f"The metadata of {path} take {read_bytes} bytes: leave some of it out."
        )
    files.write(path, content, _read_back)
    return Path(path)


def exportable(specification: dict, theta) -> None:
    """Returns if a theta of these shapes and dtypes can be exported: a run asks before it begins,
    not when hours of training are over.

    Args:
      specification, theta: as `export` takes them; shapes will do for arrays.

    Raises:
      UserError: the specification names no optimizer, or settings that it does not have or that
        `read` would refuse; theta does not belong to that optimizer; or its start or loss has
        other than floating-point numbers, or paths that `read` would refuse.
    """
    parts = theta if isinstance(theta, base.Parts) else base.Parts(theta)
    expected, _ = _like(registry.optimizer(specification))
    if odd := _odd(_named(parts.optimizer), expected):
        name, have, want = odd
        raise NotExportable(
            f"This theta has {name}: {have}, where {specification['name']!r} with these settings "
            f"has {want}: export it with the settings it was made with."
        )
    beside = _beside(parts)
    for name, x in _named(beside).items():
        if _dtype(x) not in _TYPES.values():
            raise NotExportable(
                f"This theta has {name}: {_dtype(x)}, and exports hold floating-point numbers only "
                f"({', '.join(_TYPES.values())}): keep it out of the model's parameters."
            )
    held = {part: trees.paths(tree) for part, tree in beside.items()}
    try:
        for part, paths in trees.declared({trees.HELD: held}, _PARTS).items():
            trees.tree(part, paths, dict.fromkeys(trees.names(part, paths)))
    except ValueError as error:
        raise NotExportable(
            f"The model's parameters in this theta cannot be exported: {_reason(error)}. Nest or "
            "name them otherwise."
        ) from error
    try:
        settings = json.loads(json.dumps(versions.complete(specification)))
        export_header.plausible(settings, len(jax.tree.leaves(theta)))
    except ValueError as error:
        raise NotExportable(
            f"{specification['name']!r} with these settings cannot be exported: {_reason(error)}. "
            "Every file that is read is held to this limit, as it may be a stranger's: choose "
            "settings within it."
        ) from error


def _read_back(path) -> None:
    """NotExportable if `read` would refuse the file."""
    with open(path, "rb") as file:
        try:
            _whole(file, path)
        except OSError:
            raise
        except Exception as error:
            raise NotExportable(
                f"An export of this theta cannot be read back and is not kept: {_reason(error)}. "
                "Mend that in the theta, the settings or the metadata."
            ) from error


def read(path, *, other_rules: bool = False) -> tuple[base.LearnedOptimizer, Any, dict]:
    """An export, local or remote, as (optimizer, theta, metadata). Executes nothing in the file.
    `released()["lstm"]` is the path of a released one.

    Where it holds a start or a loss, theta is `Parts`, made of dicts and lists, and the optimizer
    binds that. Only the numbers of the loss are stored; the configuration in the metadata says
    what they are settings of.

    Args:
      other_rules: read it even if it was made for another version of its rule, so that its theta
        no longer gives the updates that it was trained for. `export` then declares it to be one
        of today's.

    Raises:
      UserError: the file is not an export, is incomplete, or cannot be opened; or it was made for
        a rule that acted differently.
    """
    path = files.readable(path)
    with files.reached(path), files.copied(path) as local, open(local, "rb") as file:
        try:
            return _whole(file, local, other_rules)
        except versions.OtherRule as error:
            raise UserError(f"{path} is not for this version of l2l: {_reason(error)}.") from None
        except _Unregistered as error:
            raise UserError(
                f"{path} holds weights of the optimizer {error.name!r} and not its code, and "
                "nothing is registered under that name: import the module that registers it first, "
                "or install the l2l that wrote the file."
            ) from None
        except OSError:  # It is not the file that is wrong: `reached` says what is.
            raise
        except Exception as error:  # Settings reach Haiku and JAX, which raise all kinds.
            raise UserError(
                f"{path} is not a complete export of l2l: {_reason(error)}. Copy it once more from "
                "where it came, or export it anew."
            ) from error


def _whole(file, path, other_rules: bool = False) -> tuple[base.LearnedOptimizer, Any, dict]:
    """What `read` returns, of a local file that is open; any exception where it is damaged."""
    metadata = _metadata(file)
    for part in versions.walk(specification_of(metadata)):
        if part["name"] not in registry.OPTIMIZERS:
            raise _Unregistered(part["name"])
    if not other_rules:
        versions.check_rules(specification_of(metadata), metadata["optimizer"]["rules"])
    return *_read(path, metadata), metadata


def _reason(error: Exception) -> str:
    """What is wrong with a file, within a sentence."""
    reason = f"no {error}" if isinstance(error, KeyError) else str(error).split("\n")[0]
    return errors.printable(reason)[:300].rstrip(". ")


def _metadata(file) -> dict:
    """The metadata of an open export, with every setting of its optimizer and `FORMAT`'s keys,
    whatever its format."""
    check = export_header.check
    about = export_header.header(file).get("__metadata__")
    check(isinstance(about, dict), "it has no metadata")
    assert about is not None
    metadata = export_header.table(about["l2l"])
    known = metadata["format"] in (1, FORMAT, WITH_PARTS)
    check(known, f"its format is {metadata['format']}, and this l2l reads those up to {WITH_PARTS}")
    stored = metadata["optimizer"]
    check(isinstance(stored, dict), "its optimizer is not a table")
    check(isinstance(stored["name"], str), "the optimizer's name is not text")
    own = stored["settings"]
    check(isinstance(own, dict) and "name" not in own, "its settings are not a table")
    section = versions.earlier(specification_of(metadata))
    rules = dict.fromkeys(versions.VERSIONS, 1) if metadata["format"] == 1 else stored["rules"]
    check(isinstance(rules, dict), "the versions of its rules are not a table")
    settings = {key: value for key, value in section.items() if key != "name"}
    metadata["optimizer"] = {"name": stored["name"], "rules": rules, "settings": settings}
    return metadata


def _read(path, metadata) -> tuple[base.LearnedOptimizer, Any]:
    from safetensors import safe_open

    check = export_header.check
    with safe_open(path, framework="numpy") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
        shapes = {name: tuple(x.get_shape()) for name, x in slices.items()}
        types = {name: x.get_dtype() for name, x in slices.items()}
        export_header.plausible(metadata["optimizer"]["settings"], len(shapes))
        optimizer = registry.optimizer(specification_of(metadata))
        expected, treedef = _like(optimizer)
        held = trees.declared(metadata, _PARTS)
        beside = {tensor for name, paths in held.items() for tensor in trees.names(name, paths)}
        check({*expected, *beside} == set(shapes), f"it has the tensors {sorted(shapes)[:9]}")
        check(all(types[name] in _TYPES for name in beside), "its start is not of real numbers")
        for name, x in expected.items():
            check(
                x.shape == shapes[name] and str(x.dtype) == _TYPES.get(types[name]),
                f"{name} is {types[name]} {shapes[name]}, not {x.dtype} {x.shape}",
            )
        found = {name: tensors.get_tensor(name) for name in (*expected, *sorted(beside))}
    check(_digest(found) == metadata["sha256"], "its numbers are not those written")
    check(all(map(_finite, found.values())), "not all of its numbers are finite")
    # One explicit transfer, which `jax.transfer_guard` permits.
    there = dict(zip(found, jax.device_put([*found.values()]), strict=True))
    theta = jax.tree.unflatten(treedef, [there[name] for name in expected])
    if not held:
        return optimizer, theta
    parts = {name: trees.tree(name, paths, there) for name, paths in held.items()}
    begin = (lambda key: parts["start"]) if "start" in parts else None
    return base.learner(optimizer, start=begin), base.Parts(theta, **parts)


def specification_of(metadata: dict) -> dict:
    """The section `optimizer` that an export was written with, from the metadata of `read`."""
    stored = metadata["optimizer"]
    return {**stored["settings"], "name": stored["name"]}


def fitted(tree, like, what: str) -> base.PyTree:
    """The arrays of a tree of dicts and lists in the structure of `like`, whose paths, shapes and
    dtypes they must have; or a UserError about `what`."""
    arrays, wanted = _named(tree), _named(like)
    if odd := _odd(arrays, wanted):
        name, have, want = odd
        raise UserError(
            f"{what} has {name}: {have}, where {want} is expected: use the model that it was "
            "trained for."
        )
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in wanted])


def _named(tree) -> dict[str, Any]:
    """{name: leaf}."""
    return {_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _odd(arrays, wanted) -> tuple[str, str, str] | None:
    """(name, its dtype and shape, those wanted) of the first array that is not as wanted."""
    have, want = (
        {name: f"{_dtype(x)} {np.shape(x)}" for name, x in named.items()}
        for named in (arrays, wanted)
    )
    for name in {**have, **want}:
        if have.get(name) != want.get(name):
            return name or "one array", have.get(name, "none"), want.get(name, "none")
    return None


def _dtype(x) -> str:
    return str(x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype)


def _finite(x: np.ndarray) -> bool:
    return bool(np.isfinite(x.astype(np.float64)).all())


def _beside(parts: base.Parts) -> dict[str, Any]:
    """{name: tree} of what there is beside the theta of the optimizer."""
    named = {part: getattr(parts, part) for part in _PARTS}
    return {name: tree for name, tree in named.items() if jax.tree.leaves(tree)}


def _like(optimizer: base.LearnedOptimizer):
    """({name: shape and dtype} of its theta, in order, the structure of theta)."""
    like = jax.eval_shape(lambda: optimizer.init(jax.random.key(0)))
    paths, treedef = jax.tree_util.tree_flatten_with_path(like)
    return {_name(path): x for path, x in paths}, treedef


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _digest(tensors: dict[str, np.ndarray]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        x = np.ascontiguousarray(tensors[name])
        total.update(f"{name} {x.dtype} {x.shape}\n".encode())
        total.update(x.tobytes())
    return total.hexdigest()
