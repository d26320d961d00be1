"""The files of a run: checkpoints (Orbax) to go on from, and exports (safetensors) to give away.

A checkpoint holds the whole `MetaState`, free of the number of devices and processes, and what else
the loop needs. An export is one file: theta and the specification that
rebuilds its optimizer. Neither is ever executed: an export's optimizer is looked up in
`build.OPTIMIZERS`, and what it says is checked (`strangers.py`) before memory is taken.
"""

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from l2l import base, build, checks, cluster, files, strangers
from l2l.files import write
from l2l.optimizers import coordinates

EXPORT = "optimizer.safetensors"  # Its name in a run directory.
FORMAT = 1
_TIMES = "_CHECKPOINT_METADATA"  # Orbax's name.
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
      OSError: the directory cannot be written; from `save` and `close` too, which is where it is
        heard that an earlier checkpoint could not be written.
      ValueError: from `restore`, where there are checkpoints and none can be read.
    """
    import orbax.checkpoint as ocp  # A second and a half, which `load` does not need.

    # Orbax tells every file it writes, and its threads every error that `writing` tells as well.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    directory = Path(directory).absolute()
    directory.mkdir(exist_ok=True)
    opened = os.stat(directory)
    policies = ocp.checkpoint_managers
    options = ocp.CheckpointManagerOptions(
        save_decision_policy=policies.FixedIntervalPolicy(1),  # The loop decides.
        preservation_policy=policies.LatestN(keep),
        enable_async_checkpointing=True,
        # Else a thread of Orbax waits five minutes for a folder that could not be made.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    )

    def _set_times_aside():
        for file in directory.glob(f"*/{_TIMES}"):
            file.rename(file.with_name("damaged" + _TIMES))

    try:
        manager = ocp.CheckpointManager(directory, options=options)
    except OSError:
        raise
    except Exception:  # Of the times in any of these files, without which it opens them as well.
        cluster.together(_set_times_aside)
        manager = ocp.CheckpointManager(directory, options=options)

    def save(step, tree):
        tree = _to_data(tree)
        stored = _Stored(tree, checksum(tree))
        # Orbax knows a NamedTuple by its keys; a plain list needs no class to be read.
        with _writing(directory):
            # Orbax would make it anew, without what else the run had there.
            if not os.path.samestat(opened, os.stat(directory)):
                raise FileNotFoundError(errno.ENOENT, "another is in its place", str(directory))
            manager.save(step, args=ocp.args.StandardSave(_leaves(stored)))

    def restore(like, shardings):
        failed = {}
        # Process 0's list: another host may see a new directory later, or an old one longer.
        for step in cluster.together(lambda: sorted(manager.all_steps(), reverse=True)):
            try:
                tree = _open(step, like, shardings)
            except Exception as error:  # Orbax and what is below it raise all kinds.
                failed[step] = " ".join(files.printable(str(error)).split())[:200]
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
        with _writing(directory):
            manager.wait_until_finished()
            manager.close()

    return Saver(save, restore, close)


@contextlib.contextmanager
def _writing(directory):
    """What Orbax and TensorStore raise for a checkpoint that cannot be written, as an OSError."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        # The error holds on to half-done writes, which would complain when the program ends.
        error.__traceback__ = None
        code = re.search(r"os_error_code='(\d+)'", str(error))
        number = int(code[1]) if code else getattr(error, "errno", None)
        if number == errno.ENOENT or not directory.is_dir():
            raise OSError(
                f"{directory} is gone: it was removed, or its file system unmounted, while the run "
                f"was at work. Bring it back if you can and {files.AGAIN} there, or from the start."
            ) from error
        if number:
            raise OSError(number, os.strerror(number), str(directory)) from error
        reason = " ".join(str(error).split())[:300]
        raise OSError(
            f"No checkpoint could be written under {directory} ({reason}). Those before it are "
            f"kept: mend the cause, then {files.AGAIN}."
        ) from error


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
    if read_bytes > strangers.LARGEST_HEADER:
        raise ValueError(f"The metadata of {path} take {read_bytes} bytes: leave some out.")
    write(path, content)
    return Path(path)


def read(path) -> tuple[base.LearnedOptimizer, Any, dict]:
    """An export, local or remote, as (optimizer, theta, metadata). Executes nothing that it brings.

    Raises:
      ValueError: the file is no export, or not a whole one.
      OSError: it cannot be opened.
    """
    path = files.readable(path)
    with files.copied(path) as local, open(local, "rb") as file:
        try:
            return _read(local, file)
        except Exception as error:  # Settings reach Haiku and JAX, which raise all kinds.
            reason = f"no {error}" if isinstance(error, KeyError) else str(error).split("\n")[0]
            reason = files.printable(reason)[:300].rstrip(". ")
            raise ValueError(f"{path} is no whole export of l2l: {reason}.") from error


def _read(path, file):
    from safetensors import safe_open

    check = strangers.check
    about = strangers.header(file).get("__metadata__")
    check(isinstance(about, dict), "it has no metadata")
    metadata = strangers.table(about["l2l"])
    check(metadata["format"] == FORMAT, f"format {metadata['format']} is not {FORMAT}")
    stored = metadata["optimizer"]
    check(isinstance(stored, dict), "its optimizer is no table")
    check(isinstance(stored["name"], str), "the optimizer's name is no text")
    with safe_open(path, framework="numpy") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
        shapes = {name: tuple(x.get_shape()) for name, x in slices.items()}
        types = {name: x.get_dtype() for name, x in slices.items()}
        strangers.plausible(stored["settings"], len(shapes))
        optimizer = build.optimizer({**stored["settings"], "name": stored["name"]})
        like = jax.eval_shape(optimizer.init, jax.random.key(0))
        paths, treedef = jax.tree_util.tree_flatten_with_path(like)
        expected = {_name(p): x for p, x in paths}
        check(set(expected) == set(shapes), f"it has the tensors {sorted(shapes)[:9]}")
        for name, x in expected.items():
            check(
                x.shape == shapes[name] and str(x.dtype) == _TYPES.get(types[name]),
                f"{name} is {types[name]} {shapes[name]}, not {x.dtype} {x.shape}",
            )
        found = {name: tensors.get_tensor(name) for name in expected}
    check(_digest(found) == metadata["sha256"], "its numbers are not those written")
    fine = all(np.isfinite(x.astype(np.float32)).all() for x in found.values())
    check(fine, "not all of its numbers are finite")
    theta = jax.tree.unflatten(treedef, [jnp.asarray(found[name]) for name in expected])
    return optimizer, theta, metadata


def load(
    name_or_path, *, num_steps: int | None = None, state_dtype=None
) -> optax.GradientTransformationExtraArgs:
    """A trained optimizer as an optax transformation. It needs nothing else.

    Args:
      name_or_path: a released optimizer (`released()` lists them), an export, or the directory of a
        run that has ended; also at gs:// or s3://, where etils can read those.
      num_steps: the horizon to tell the optimizer where `update` is not given one.
      state_dtype: in which the recurrent state is kept between steps (`coordinates.bind`):
        jnp.bfloat16 takes 48 bytes a parameter of the default optimizer, not 80.

    Raises:
      ValueError: there is no such optimizer, or the file is damaged; or it has no recurrent state
        and `state_dtype` is given.
    """
    optimizer, theta, _ = read(locate(name_or_path))
    bound = optimizer.bind(theta)
    if state_dtype is not None:
        if optimizer.rule is None:
            raise ValueError(
                f"{name_or_path} has no recurrent state to keep in {jnp.dtype(state_dtype).name}: "
                "leave state_dtype out."
            )
        bound = coordinates.bind(optimizer.rule, theta, state_dtype=state_dtype)
    if num_steps is None:
        return bound

    def update(updates, state, params=None, **extra_args):
        return bound.update(updates, state, params, **{"num_steps": num_steps, **extra_args})

    return optax.GradientTransformationExtraArgs(bound.init, update)


def locate(name_or_path):
    """The path of an export, for `read`: from a released name, a file or a run directory (remote
    ones too); or a ValueError."""
    path = files.readable(name_or_path)
    with files.reached(path):
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
