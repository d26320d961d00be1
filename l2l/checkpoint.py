"""The files of a run: checkpoints (Orbax) to go on from, and exports (safetensors) to give away.

A checkpoint holds the whole `MetaState`, free of the number of devices and processes, and what else
the loop needs. An export is one file: theta and the specification that
rebuilds its optimizer. Neither is ever executed: an export's optimizer is looked up in
`build.OPTIMIZERS`, and its shapes are checked before memory is taken.
"""

import functools
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from l2l import base, build, checks, cluster

EXPORT = "optimizer.safetensors"  # Its name in a run directory.
FORMAT = 1
# No export of ours comes near: what is larger is not one, and is not read.
LARGEST_HEADER = 1 << 20
LARGEST_NUMBER = 4096
_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Saver(NamedTuple):
    """Checkpoints of one directory.

    save:    (step, tree) -> None. Returns once the arrays are copied; they are written behind.
    restore: (like, shardings) -> (tree, step) or None where there is no checkpoint. `like` and
             `shardings` are pytrees of jax.ShapeDtypeStruct and of NamedShardings. A checkpoint
             that cannot be read is set aside (renamed) and the one before it is taken.
    close:   () -> None, when all is on the disk; more than once if you like.
    """

    save: Callable[[int, Any], None]
    restore: Callable[[Any, Any], tuple[Any, int] | None]
    close: Callable[[], None]


class _Stored(NamedTuple):
    tree: Any
    checksum: Any


def saver(directory, keep: int = 3, say: Callable[[str], None] = logging.warning) -> Saver:
    """Opens (or creates) a directory of checkpoints, of which the last `keep` are kept.

    Raises:
      OSError: the directory cannot be written.
      ValueError: from `restore`, where there are checkpoints and none can be read.
    """
    import orbax.checkpoint as ocp  # A second and a half, which `load` does not need.

    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells every file it writes.
    directory = Path(directory).absolute()
    policies = ocp.checkpoint_managers
    manager = ocp.CheckpointManager(
        directory,
        options=ocp.CheckpointManagerOptions(
            save_decision_policy=policies.FixedIntervalPolicy(1),  # The loop decides.
            preservation_policy=policies.LatestN(keep),
            enable_async_checkpointing=True,
        ),
    )

    def save(step, tree):
        tree = _to_data(tree)
        stored = _Stored(tree, checksum(tree))
        # Orbax knows a NamedTuple by its keys; a plain list needs no class to be read.
        manager.save(step, args=ocp.args.StandardSave(_leaves(stored)))

    def restore(like, shardings):
        failed = {}
        # Process 0's list: another host may see a new directory later, or an old one longer.
        for step in cluster.together(lambda: sorted(manager.all_steps(), reverse=True)):
            try:
                tree = _open(step, like, shardings)
            except Exception as error:  # Orbax and what is below it raise all kinds.
                failed[step] = " ".join(str(error).split())[:200]
                continue
            # Moved only now that another is found to be good: where none is, nothing is touched.
            cluster.together(lambda: [_set_aside(step) for step in failed] and None)
            for bad, reason in failed.items():
                say(f"Checkpoint {bad} cannot be read ({reason}): set aside for that of {step}.")
            if failed:
                manager.reload()
            return tree, step
        if failed:
            raise ValueError(
                f"No checkpoint under {directory} can be read ({failed[max(failed)]}). "
                "Choose another --workdir, or move that directory away to start again."
            )
        return None

    def _open(step, like, shardings):
        data = jax.eval_shape(_to_data, like)
        where = jax.tree.leaves(shardings)
        same = NamedSharding(where[0].mesh, PartitionSpec())
        number = jax.ShapeDtypeStruct((), jnp.uint32, sharding=same)
        target = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
            for x, s in zip(jax.tree.leaves(data), where, strict=True)
        ]
        target = {str(i): x for i, x in enumerate([*target, number])}
        # Not through the manager: its processes wait for one another, also for one that failed.
        leaves, failure = {}, None
        try:
            leaves = ocp.StandardCheckpointHandler().restore(
                directory / str(step) / "default", args=ocp.args.StandardRestore(target)
            )
        except Exception as error:
            failure = error
        if cluster.largest(np.int32(failure is not None)):
            raise failure or ValueError("another process cannot read its part")
        *leaves, expected = (leaves[str(i)] for i in range(len(target)))
        tree = jax.tree.unflatten(jax.tree.structure(data), leaves)
        if int(checksum(tree)) != int(expected):
            raise ValueError("its checksum is wrong")
        return _from_data(tree, like)

    def _set_aside(step):
        (directory / str(step)).rename(directory / f"damaged-{step}")

    @functools.cache
    def close():
        manager.wait_until_finished()
        manager.close()

    return Saver(save, restore, close)


def _leaves(tree):
    return {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(tree))}


def _is_key(x) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _to_data(tree):
    """Typed random keys as the integers in them."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else jnp.asarray(x), tree)


def _from_data(tree, like):
    return jax.tree.map(lambda x, y: jax.random.wrap_key_data(x) if _is_key(y) else x, tree, like)


@jax.jit
def checksum(tree) -> jax.Array:
    """Σᵢ (2i + 1) xᵢ mod 2³² over the bits of all leaves: any one flipped bit changes it, and it is
    the same however the arrays are split over devices. A uint32 scalar."""
    total = jnp.zeros((), jnp.uint32)
    for number, x in enumerate(jax.tree.leaves(tree)):
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        width = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
        bits = jax.lax.bitcast_convert_type(x, width).reshape(-1).astype(jnp.uint32)
        odd = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1
        total += jnp.sum(odd * bits, dtype=jnp.uint32) * jnp.uint32(2 * number + 1)
    return total


def write(path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def export(path, specification: dict, theta, metadata: dict | None = None) -> Path:
    """Writes theta [pytree of arrays] and its optimizer's specification as one safetensors file.

    Args:
      specification: a section `optimizer` of a configuration: a name of `build.OPTIMIZERS`, and
        settings.
      metadata: what else to remember, as JSON allows: configuration, seed, meta-steps, cost.

    Returns:
      The path.
    """
    from safetensors.numpy import save

    tensors = {_name(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(theta)}
    specification = dict(specification)
    header = {
        "format": FORMAT,
        "optimizer": {"name": specification.pop("name"), "settings": specification},
        "sha256": _digest(tensors),
        **(metadata or {}),
    }
    content = save(tensors, {"l2l": json.dumps(header)})
    read_bytes = 8 + int.from_bytes(content[:8], "little")
    if read_bytes > LARGEST_HEADER:
        raise ValueError(f"The metadata of {path} take {read_bytes} bytes: leave some out.")
    write(path, content)
    return Path(path)


def read(path) -> tuple[base.LearnedOptimizer, Any, dict]:
    """An export as (optimizer, theta, metadata). Executes nothing that the file brings.

    Raises:
      ValueError: the file is no export, or not a whole one.
      OSError: it cannot be opened.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    with open(path, "rb") as file:  # Missing files and directories fail here, by name.
        length = int.from_bytes(file.read(8), "little")
    if length > LARGEST_HEADER:
        raise ValueError(f"{path} is no export of l2l: it declares a header of {length} bytes.")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = json.loads((file.metadata() or {})["l2l"])
            _check(metadata["format"] == FORMAT, f"format {metadata['format']} is not {FORMAT}")
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(x.get_shape()) for name, x in slices.items()}
            types = {name: x.get_dtype() for name, x in slices.items()}
            stored = metadata["optimizer"]
            _check(isinstance(stored["name"], str), "the optimizer's name is no text")
            _plausible(stored["settings"], len(shapes))
            optimizer = build.optimizer({**stored["settings"], "name": stored["name"]})
            like = jax.eval_shape(optimizer.init, jax.random.key(0))
            paths, treedef = jax.tree_util.tree_flatten_with_path(like)
            expected = {_name(p): x for p, x in paths}
            _check(set(expected) == set(shapes), f"it has the tensors {sorted(shapes)[:9]}")
            for name, x in expected.items():
                _check(
                    x.shape == shapes[name] and str(x.dtype) == _TYPES.get(types[name]),
                    f"{name} is {types[name]} {shapes[name]}, not {x.dtype} {x.shape}",
                )
            tensors = {name: file.get_tensor(name) for name in expected}
        _check(_digest(tensors) == metadata["sha256"], "its numbers are not those written")
        _check(
            all(np.isfinite(x.astype(np.float32)).all() for x in tensors.values()),
            "not all of its numbers are finite",
        )
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error).split("\n")[0]
        raise ValueError(f"{path} is no whole export of l2l: {reason[:300]}.") from error
    theta = jax.tree.unflatten(treedef, [jnp.asarray(tensors[name]) for name in expected])
    return optimizer, theta, metadata


def load(name_or_path, *, num_steps: int | None = None) -> optax.GradientTransformationExtraArgs:
    """A trained optimizer as an optax transformation. It needs nothing else.

    Args:
      name_or_path: a released optimizer (`released()` lists them), an export, or the directory of a
        run that has ended.
      num_steps: the horizon to tell the optimizer where `update` is not given one.

    Raises:
      ValueError: there is no such optimizer, or the file is damaged.
    """
    optimizer, theta, _ = read(locate(name_or_path))
    bound = optimizer.bind(theta)
    if num_steps is None:
        return bound

    def update(updates, state, params=None, **extra_args):
        return bound.update(updates, state, params, **{"num_steps": num_steps, **extra_args})

    return optax.GradientTransformationExtraArgs(bound.init, update)


def locate(name_or_path) -> Path:
    """The file of an export: from a released name, a file or a run directory; or a ValueError."""
    path = Path(name_or_path)
    if path.is_dir() and (path / EXPORT).is_file():
        return path / EXPORT
    if path.is_file():
        return path
    if path.is_dir():
        raise ValueError(f"{path} has no {EXPORT} yet: it is written when its training ends.")
    names = released()
    if str(name_or_path) in names:
        return names[str(name_or_path)]
    raise ValueError(
        checks.unknown("optimizer", str(name_or_path), names)
        + " A path to an export or to a run directory will do as well."
    )


def released() -> dict[str, Path]:
    """The optimizers that come with the package: {name: file}."""
    package = Path(__file__).parent
    # In a wheel they are the package l2l.checkpoints; in a checkout a directory beside l2l.
    found: dict[str, Path] = {}
    for folder in (package.parent / "checkpoints", package / "checkpoints"):
        if (folder / "__init__.py").is_file():
            found |= {path.stem: path for path in sorted(folder.glob("*.safetensors"))}
    return found


def _name(path: Sequence) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _digest(tensors: dict[str, np.ndarray]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        x = np.ascontiguousarray(tensors[name])
        total.update(f"{name} {x.dtype} {x.shape}\n".encode())
        total.update(x.tobytes())
    return total.hexdigest()


def _check(fine: bool, reason: str) -> None:
    if not fine:
        raise ValueError(reason)


def _plausible(settings, num_tensors: int) -> None:
    """Settings come from strangers: before anything is built, no number in them may be one that
    takes long to build."""
    _check(isinstance(settings, dict) and "name" not in settings, "its settings are no table")
    layers = settings.get("layers", 1)
    _check(not isinstance(layers, int) or layers <= num_tensors, f"layers={layers} is too many")

    def visit(value, depth):
        _check(depth < 6, "its settings are too deep")
        if isinstance(value, int | float):
            _check(abs(value) <= LARGEST_NUMBER, f"{value} is too large a setting")
        if isinstance(value, list):
            _check(len(value) <= 64, f"{len(value)} values are too many for a setting")
        children = value.values() if isinstance(value, dict) else value
        for child in children if isinstance(value, dict | list) else ():
            visit(child, depth + 1)

    visit(settings, 0)
