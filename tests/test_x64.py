"""Meta-training with `jax_enable_x64`: theta and what is kept of it stay float32, whatever the
precision of a task, and no dtype changes from one meta-step to the next."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from quick import xla_flags

import l2l
from l2l.core import base
from l2l.training.experiment import build_experiment
from l2l.training.meta_step import meta_init, meta_step

OPTIMIZERS = {
    "lstm": {"name": "lstm", "hidden_size": 2},
    "lstm of the release": {
        "name": "lstm",
        "hidden_size": 2,
        "tensor_size": 2,
        "matrix_size": 8,
        "anneal": 1.0,
    },
    "dm": {"name": "dm", "hidden_size": 2},
    "rnnprop": {"name": "rnnprop", "hidden_size": 2},
    "adam": {"name": "adam", "learned": True},
    "learned_adam": {"name": "learned_adam"},
    "by_parameter": {
        "name": "by_parameter",
        "parts": {"a": {"name": "lstm", "hidden_size": 2}, "b": {"name": "adam"}},
        "labels": (("w", "a"), ("*", "b")),
    },
}
ESTIMATORS = {
    "first_order": {"name": "first_order"},
    "exact": {"name": "truncated", "order": "exact"},
    "pes": {"name": "pes"},
}


def config(optimizer, estimator, num_problems=2):
    return {
        "task": {"name": "quadratic", "dimension": 2, "batch_size": 3},
        "optimizer": optimizer,
        "estimator": estimator,
        "inner": {"length": 4},
        "imitation": {"weight": 0.0 if estimator["name"] == "pes" else 0.1},
        "horizon": {"name": "log_uniform", "shortest": 4, "longest": 8},
        "meta": {"steps": 2, "num_problems": num_problems, "group": 2},
        "evaluation": {"horizons": (3,), "num_problems": 1, "every": 0},
    }


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_meta_step_keeps_its_dtypes(optimizer, estimator):
    """Of shapes alone: nothing is compiled."""
    if (optimizer, estimator) == ("learned_adam", "first_order"):
        pytest.skip("it has no rule")
    with jax.enable_x64(True):
        whole = build_experiment(config(OPTIMIZERS[optimizer], ESTIMATORS[estimator]))
        stage = base.Stage(*(jnp.float32(x) for x in (4, 8, 0.1)))
        state = jax.eval_shape(lambda key: meta_init(key, whole.meta, stage), jax.random.key(0))
        after, _ = jax.eval_shape(lambda s: meta_step(whole.meta, s, whole.data()), state)
    before, now = ([(x.shape, x.dtype) for x in jax.tree.leaves(tree)] for tree in (state, after))
    assert before == now
    assert {str(x.dtype) for x in jax.tree.leaves(state.theta)} == {"float32"}


def test_a_run_that_enables_it_by_its_environment(tmp_path):
    path = tmp_path / "config.py"
    text = repr(config(OPTIMIZERS["lstm"], ESTIMATORS["first_order"]))
    path.write_text(f"def get_config():\n    return {text}\n")
    ran = subprocess.run(
        [sys.executable, "-m", "l2l.launch", f"--config={path}", f"--workdir={tmp_path}/run"],
        env={**os.environ, "JAX_ENABLE_X64": "1", "XLA_FLAGS": xla_flags(1)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    theta = l2l.read_export(tmp_path / "run" / "optimizer.safetensors")[1]
    assert {str(x.dtype) for x in jax.tree.leaves(theta)} == {"float32"}
