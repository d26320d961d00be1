"""Trained optimizers by name or path: `load` them as optax transformations, or their `start`."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax

from l2l.console import modules, schema
from l2l.console.errors import UserError
from l2l.core import base
from l2l.optimizers import binding, coordinates, leaves, registry
from l2l.storage import exports, files


def load(
    name_or_path,
    *,
    num_steps: int | None = None,
    epochs: float | jax.Array | None = None,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    weight_decay: float | jax.Array | None = None,
    mask: Any = None,
    state_dtype=None,
) -> optax.GradientTransformationExtraArgs:
    """A trained optimizer as an optax transformation. It needs nothing else.

    Args:
      name_or_path: a released optimizer (`released()` lists them), an export, or the directory of a
        run that has ended; also at gs:// or s3://, where etils can read those. The name of a
        released one means that, whatever the working directory holds: a file or folder of the
        same name is written with a slash (./lstm) or given as a `Path`.
      num_steps: the horizon that the optimizer is told when `update` is given none. `lstm` and
        `mlp` lower their rate towards its end and stay at the last, tiny one: a run that goes on
        all but stands still (updates of `lstm` are then 0.003 of the first). The state holds no
        horizon: to go on, keep it, and load with more steps or give `update` its own `num_steps`.
      epochs: how often the run goes through its data: its steps, times the batch size, over the
        number of examples. What is seen again and again is memorised, which the gradients do not
        show, so this sets `weight_decay` (`binding.repeated_decay`) to 0.1 for 10 epochs and 0.3
        from 20 on, times the nominal rate. It lowers validation losses where a model can memorise
        its data. Biases and the scales of norms decay as well, unless `mask` leaves them out.
      learning_rate: a factor on every update, or an optax schedule of factors.
      weight_decay: decoupled, as in `optax.adamw`, times the optimizer's own nominal rate; None
        for 0. It adds to the decay that a rule such as that of `lstm` has learned.
      mask: where `weight_decay` applies, as in `optax.adamw`. What a rule has learned is not
        masked.
      state_dtype: of optimizers that treat each coordinate alone, such as `dm`: the dtype of the
        recurrent state between steps (`coordinates.bind`). jnp.bfloat16 halves it.

    `lstm` and `mlp` see a tensor as a matrix, all axes but the last by the last: the layout of flax
    and haiku. A kernel of equinox or PyTorch, (out, in, height, width), has its width as columns.
    Layers stacked into one array (`flax.linen.scan`, haiku's `layer_stack`) are one tall matrix,
    and count as one where the rate falls with the number of matrices.

    Its updates are in the dtypes of the parameters. It computes in float32, and in float64 where
    any of the parameters is; with `jax_enable_x64` on or off theta is what the file holds.

    Raises:
      UserError: there is no such optimizer, or the file is damaged; `num_steps` is not a number
        of steps; a setting is out of range; `epochs` is given beside `weight_decay`, or either
        where the optimizer has no nominal rate, or `mask` without them; or `state_dtype` is not a
        floating-point type, or is given where there is no such state. From `init`: the parameters
        are no real floating-point numbers, or `mask` does not fit them.
    """
    if num_steps is not None:
        leaves.horizon(num_steps)
    if epochs is not None:
        if weight_decay is not None:
            raise UserError(
                f"epochs={epochs} sets the weight decay, and so does weight_decay={weight_decay}: "
                "give one of them."
            )
        weight_decay = binding.repeated_decay(epochs)
    state_dtype = leaves.state_type(state_dtype)
    optimizer, theta, metadata = exports.read(locate(name_or_path))
    if isinstance(theta, base.Parts):
        optimizer, theta = registry.optimizer(exports.specification_of(metadata)), theta.optimizer
    rule = optimizer.rule
    if isinstance(rule, base.Rule):
        bound = coordinates.bind(rule, theta, state_dtype=state_dtype, wide=True)
    elif state_dtype is None:
        bound = optimizer.bind(theta)
    else:
        raise UserError(
            f"{name_or_path} has no recurrent state for each coordinate to keep in {state_dtype}: "
            "leave state_dtype out."
        )
    rate = partial(rule.rate, theta) if rule is not None and rule.rate is not None else None
    bound = binding.with_knobs(
        bound, rate, learning_rate=learning_rate, weight_decay=weight_decay, mask=mask
    )
    if num_steps is None:
        return bound

    def update(updates, state, params=None, **extra_args):
        if extra_args.get("num_steps") is None:
            extra_args["num_steps"] = num_steps
        return bound.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(bound.init, update)


def start(path, *, like: Any = None) -> Any:
    """The learned start of training runs, from the directory of a run that has ended or its export:
    the parameters of the model, a pytree of arrays.

    Args:
      path: also at gs:// or s3://, where etils can read those.
      like: a pytree of arrays or shapes with the structure that you want. The default is one of
        dicts and lists: that of the task's parameters, if they are made of those. A list in which
        places hold no arrays comes back as a dict by place.

    Raises:
      UserError: there is no such file, it is damaged, or it holds no start (theta.start was not
        set); or the start does not fit `like`.
    """
    theta = exports.read(locate(path))[1]
    if not isinstance(theta, base.Parts) or not jax.tree.leaves(theta.start):
        raise UserError(
            f"{path} holds no start: theta.start was not set when it was trained. Use l2l.load for "
            "its optimizer."
        )
    if like is None:
        return theta.start
    return exports.fitted(theta.start, like, f"The start of {path}")


def locate(name_or_path):
    """The path of an export, for `read`: from a released name, a file or a run directory (remote
    ones too); or a UserError."""
    names = released()
    fault = None
    if not isinstance(name_or_path, str | os.PathLike):
        fault = f"A {type(name_or_path).__name__} is neither a name nor a path"
    elif not os.fspath(name_or_path):
        fault = "The name of the optimizer is empty"
    if fault:
        raise UserError(
            f"{fault}: give the path of an export, the directory of a run, or one of "
            f"{', '.join(names)}."
        )
    if isinstance(name_or_path, str) and name_or_path in names:
        return names[name_or_path]
    path = files.readable(name_or_path)
    with files.reached(path):
        if path.is_dir() and (path / exports.EXPORT).is_file():
            return path / exports.EXPORT
        if path.is_file():
            return path
        if path.is_dir():
            raise UserError(
                f"{path} has no {exports.EXPORT} yet: it is written when its training ends."
            )
    if isinstance(name_or_path, os.PathLike) or os.sep in name_or_path:
        near = "" if files.scheme(path) else modules.nearest_path(str(name_or_path))
        raise UserError(
            f"There is no optimizer at {name_or_path}: no such file or directory.{near} The "
            f"released ones are {', '.join(names)}."
        )
    raise UserError(
        schema.unknown("optimizer", name_or_path, names)
        + " A path to an export or to a run directory will do as well."
    )


def released() -> dict[str, Path]:
    """The optimizers that come with the package: {name: file}."""
    package = Path(__file__).parents[1]
    # In a wheel they are the package l2l.checkpoints; in a checkout a directory beside l2l.
    found: dict[str, Path] = {}
    for folder in (package.parent / "checkpoints", package / "checkpoints"):
        if (folder / "__init__.py").is_file():
            found |= {path.stem: path for path in sorted(folder.glob("*.safetensors"))}
    return found
