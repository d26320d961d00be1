"""Runs that learn a start: how they end, their exports, other devices, signals, bad numbers."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors
import safetensors.numpy

import l2l
from l2l.evaluation import adaptation
from l2l.evaluation.curves import Problems
from l2l.storage import exports
from l2l.tasks.sinusoid import sinusoid
from l2l.training.callbacks import DONE, NOT_FINITE, TERMINATED
from l2l.training.experiment import build_experiment
from l2l.training.run import train


@pytest.fixture(scope="module")
def config() -> dict:
    """Seconds of MAML."""
    return {
        "seed": 3,
        "task": {"name": "sinusoid", "shots": 3, "queries": 3, "hidden": (4,)},
        "theta": {"start": True},
        "optimizer": {"name": "sgd", "learning_rate": 0.01, "learned": True},
        "objective": {"on": "validation", "form": "last"},
        "inner": {"length": 2, "stagger": False},
        "horizon": {"name": "log_uniform", "shortest": 2, "longest": 2},
        "estimator": {"name": "truncated", "order": "exact", "segments": False},
        "meta": {"steps": 12, "num_problems": 8, "group": 3},
        "evaluation": {"horizons": (1, 2), "num_problems": 4, "every": 6},
        "checkpoint": {"every": 3, "keep": 3},
    }


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    directory = tmp_path_factory.mktemp("maml") / "whole"
    assert train(build_experiment(config), directory, jax.devices()[:1]) == DONE
    return directory


def assert_same_parts(directory, other):
    one, two = (exports.read(d / exports.EXPORT)[1] for d in (directory, other))
    jax.tree.map(np.testing.assert_array_equal, one, two)


STAGES = {"name": "stages", "horizons": (2, 5)}


@pytest.mark.parametrize(
    "change, said",
    [
        ({}, None),
        ({"horizon": {"name": "log_uniform", "shortest": 2, "longest": 4}}, "up to 2 windows"),
        ({"horizon": {"name": "log_uniform", "shortest": 2, "longest": 3}}, None),
        ({"horizon": STAGES}, r"5 steps; inner.length=2\) .* choose the estimator 'pes' or"),
        ({"horizon": STAGES, "estimator": {"name": "truncated", "order": "first"}}, "truncated"),
        ({"horizon": STAGES, "estimator": {"name": "pes"}}, None),
        ({"horizon": STAGES, "estimator": {"name": "reptile"}}, None),
    ],
)
def test_windows_that_a_start_has_no_derivative_in_are_refused(config, change, said):
    """Where theta holds more than the start, the rest of it has one in every window."""
    fixed = {**config, "optimizer": {"name": "sgd", "learning_rate": 0.01}, **change}
    if said is None:
        build_experiment(fixed)
    else:
        with pytest.raises(l2l.UserError, match=said):
            build_experiment(fixed)
    if fixed["estimator"]["name"] != "reptile":
        build_experiment({**config, **change})


def test_a_run_ends_with_table_figures_and_export(whole, capsys, config):
    said = (whole / "summary.txt").read_text()
    for start in ("learned", "random", "pretrained"):
        assert f"| {start} " in said
    for steps in ("after 0 steps", "after 1 step ", "after 2 steps"):
        assert steps in said
    results = json.loads((whole / "results.json").read_text())
    losses = results["adaptation"]["sinusoid-3"]["learned"]["loss"]
    assert np.shape(losses) == (4, 3) and np.isfinite(losses).all()
    for figure in ("adaptation.png", "fits.png"):
        assert (whole / figure).read_bytes()[1:4] == b"PNG"
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert any("comparison/query_loss_2" in row for row in rows)


def test_an_export_tells_the_devices_of_its_run_not_those_there_are(whole):
    assert len(jax.devices()) == 8
    assert l2l.read_export(whole / exports.EXPORT)[2]["training"]["devices"] == 1


@pytest.mark.parametrize("devices", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_the_same_theta_on_any_number_of_devices(whole, config, tmp_path, devices):
    assert train(build_experiment(config), tmp_path / "run", jax.devices()[:devices]) == DONE
    one, two = (exports.read(d / exports.EXPORT)[1] for d in (whole, tmp_path / "run"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), one, two)


def test_a_stopped_run_goes_on_bit_for_bit(whole, config, tmp_path):
    def stop(loop, group):
        if loop.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    experiment, there = build_experiment(config), tmp_path / "run"
    assert train(experiment, there, jax.devices()[:1], [stop]) == TERMINATED
    assert train(experiment, there, jax.devices()[:1]) == DONE
    assert_same_parts(whole, there)


KILLED_AT_9 = """
import json, os, signal, sys, time
from pathlib import Path
import jax
from l2l.training.experiment import build_experiment
from l2l.training.run import train

directory = Path(sys.argv[1])

def kill(loop, group):
    if loop.step == 9:
        while not (directory / "checkpoints" / "6").exists():  # It is written meanwhile.
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)

train(build_experiment(json.loads(sys.argv[2])), directory, jax.devices()[:1], [kill])
"""


def test_a_run_killed_between_checkpoints_goes_on_bit_for_bit(whole, config, tmp_path, capsys):
    there, config = tmp_path / "run", {**config, "checkpoint": {"every": 6, "keep": 3}}
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AT_9, str(there), json.dumps(config)],
        env=os.environ | {"PYTHONPATH": str(Path(l2l.__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in (there / "checkpoints").iterdir()] == ["6"]
    assert train(build_experiment(config), there, jax.devices()[:1]) == DONE
    assert "Going on from meta-step 6 " in capsys.readouterr().err
    assert_same_parts(whole, there)


def test_the_start_and_the_optimizer_come_back_by_themselves(whole, config):
    _, theta, _ = l2l.read_export(whole / exports.EXPORT)
    start = l2l.start(whole)
    family = sinusoid(shots=3, queries=3, hidden=(4,))
    like = jax.eval_shape(family.init, jax.random.key(0), None)
    assert jax.tree.structure(start) == jax.tree.structure(like)
    jax.tree.map(np.testing.assert_array_equal, start, theta.start)
    gradients = jax.tree.map(jnp.ones_like, start)
    optimizer = l2l.load(whole)
    updates, _ = optimizer.update(gradients, optimizer.init(start), start)
    rate = np.exp(theta.optimizer)
    assert rate != np.float32(0.01)  # It was learned, too.
    jax.tree.map(lambda u: np.testing.assert_allclose(u, -rate, rtol=1e-6), updates)


def test_what_holds_no_start_says_so():
    with pytest.raises(l2l.UserError, match=r"lstm holds no start: .* l2l\.load"):
        l2l.start("lstm")


def test_a_start_must_fit_what_it_is_wanted_like(whole):
    start = l2l.start(whole)
    with pytest.raises(
        l2l.UserError, match=r"linear_1/w: float32 \(4, 1\), where none is expected"
    ):
        l2l.start(whole, like={"linear_0": start["linear_0"], "linear_1": {"b": jnp.zeros(1)}})


def test_trees_of_other_nodes_come_back_as_dicts_and_lists_or_as_they_were(tmp_path):
    state = optax.ScaleByAdamState(jnp.zeros(()), {"mlp/~/linear": [jnp.ones(2)]}, (jnp.ones(1),))
    theta = l2l.core.base.Parts((), state, ())
    path = l2l.export(tmp_path / "x.safetensors", {"name": "sgd"}, theta)
    found = l2l.start(path)
    assert found.keys() == {"count", "mu", "nu"} and found["mu"].keys() == {"mlp/~/linear"}
    np.testing.assert_array_equal(found["nu"][0], [1])
    again = l2l.start(path, like=jax.tree.map(jnp.zeros_like, state))
    assert jax.tree.structure(again) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, again, state)


def _filtered():
    layers = [eqx.nn.Linear(2, 3, key=jax.random.key(0)), eqx.nn.Lambda(jax.nn.relu)]
    layers.append(eqx.nn.Linear(3, 1, key=jax.random.key(1)))
    return eqx.filter(eqx.nn.Sequential(layers), eqx.is_array)


W, B = jnp.ones((2, 3)), jnp.arange(3.0)
STARTS = {
    "layers without parameters": ([(W, B), (), (B, W)], {0: [W, B], 2: [B, W]}),
    "None in a list": ([{"w": W}, None, {"w": B}], {0: {"w": W}, 2: {"w": B}}),
    "two places": ({0: W, 2: B}, {0: W, 2: B}),
    "integer keys": ({1: W, 2: B}, {1: W, 2: B}),
    "equinox": (_filtered(), None),
    "one array": (B, B),
    "one number": (jnp.float32(3), jnp.float32(3)),
}


@pytest.mark.parametrize("start, plain", STARTS.values(), ids=STARTS)
def test_a_start_comes_back_whatever_it_is_made_of(tmp_path, start, plain):
    theta = l2l.core.base.Parts((), start)
    path = l2l.export(tmp_path / "x.safetensors", {"name": "sgd"}, theta)
    again = l2l.start(path, like=jax.tree.map(jnp.zeros_like, start))
    assert jax.tree.structure(again) == jax.tree.structure(start)
    jax.tree.map(np.testing.assert_array_equal, again, start)
    if plain is not None:
        found = l2l.start(path)
        assert jax.tree.structure(found) == jax.tree.structure(plain)
        jax.tree.map(np.testing.assert_array_equal, found, plain)
    l2l.load(path)


def _nested(depth, leaf):
    return leaf if depth == 0 else {"a": _nested(depth - 1, leaf)}


@pytest.mark.parametrize(
    "start, sentence",
    [
        ({"a": W, "count": jnp.arange(3)}, r"has start/count: int32, and exports hold floating"),
        ({"a": W, "activation": jax.nn.relu}, r"has start/activation: object, .* keep it out of"),
        (_nested(33, W), r"parameters .* a list of at most 32 keys\. Nest or name"),
    ],
    ids=["integers", "a function", "deep"],
)
def test_a_start_that_could_not_be_read_back_is_not_written(tmp_path, start, sentence):
    path, theta = tmp_path / "x.safetensors", l2l.core.base.Parts(())
    before = l2l.export(path, {"name": "sgd"}, theta).read_bytes()
    with pytest.raises(l2l.UserError, match=sentence):
        l2l.export(path, {"name": "sgd"}, theta._replace(start=start))
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_what_could_not_be_exported_is_said_before_training(config, tmp_path):
    blocks = {"name": "per_tensor", "block_size": 10**6}
    with pytest.raises(l2l.UserError, match="cannot be exported: 1000000 is more than"):
        train(build_experiment({**config, "optimizer": blocks}), tmp_path / "run")
    assert not os.listdir(tmp_path)


def test_a_run_whose_export_is_refused_keeps_its_checkpoints(
    whole, config, tmp_path, monkeypatch, capsys
):
    def refuse(path):
        raise exports.NotExportable("It cannot be read back. Mend that.")

    there = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(exports, "_read_back", refuse)
        with pytest.raises(l2l.UserError, match=r"Mend that\. .* checkpoints are kept, .* again"):
            train(build_experiment(config), there, jax.devices()[:1])
    assert not (there / exports.EXPORT).exists() and (there / "checkpoints/12").is_dir()
    assert train(build_experiment(config), there, jax.devices()[:1]) == DONE
    assert "Going on from meta-step 12 " in capsys.readouterr().err
    assert_same_parts(whole, there)


def test_meta_training_goes_on_from_an_export(whole, config, tmp_path):
    """Without a single meta-step of any size the export is handed on as it was."""
    still = {"steps": 3, "num_problems": 8, "group": 3, "optimizer": {"name": "sgd"}}
    still["optimizer"]["learning_rate"] = 0.0
    more = {**config, "start": str(whole), "meta": still}
    assert train(build_experiment(more), tmp_path / "run", jax.devices()[:1]) == DONE
    assert_same_parts(whole, tmp_path / "run")


def test_adam_without_eps_root_stops_with_tensor_and_remedy(config, tmp_path, capsys):
    dead = {**config["meta"], "max_bad": 3}
    without = {"name": "adam", "learning_rate": 0.01, "eps_root": 0.0}
    task = {**config["task"], "hidden": (16, 16)}
    broken = build_experiment({**config, "task": task, "optimizer": without, "meta": dead})
    assert train(broken, tmp_path / "run", jax.devices()[:1]) == NOT_FINITE
    said = capsys.readouterr().err
    assert "the derivative, with respect to the gradient, of" in said and "linear_" in said
    assert "set the optimizer's eps_root above zero, such as 1e-8" in said


def test_adaptation_is_that_of_plain_descent():
    """Against a loop over optax, for one problem from a given start."""
    family = sinusoid(hidden=(4,))
    start = family.init(jax.random.key(1), None)
    problems = Problems(jax.random.key(0), 1)
    sgd = l2l.fixed(optax.sgd(0.02))
    found = adaptation.adapt(sgd, (), start, (family, ()), problems, (1, 3))
    assert found.steps.tolist() == [0, 1, 3]
    problem = family.sample(jax.random.fold_in(jax.random.fold_in(problems.key, 0), 0))
    support, query = (family.batch(None, problem, (), s) for s in ("train", "test"))
    params, losses = start, []
    for _ in range(4):
        losses.append(family.loss(params, problem, query))
        slope = jax.grad(family.loss)(params, problem, support)
        params = jax.tree.map(lambda p, g: p - 0.02 * g, params, slope)
    np.testing.assert_allclose(found.loss[0], np.take(losses, [0, 1, 3]), rtol=1e-5)
    best = adaptation.adapt(sgd, (), start, (family, ()), problems, (3,), factors=(0.0, 1.0, 1e6))
    assert best.factor == 1.0


MISTAKES = [
    (
        {"task": ({"name": "sinusoid"}, {"name": "sinusoid", "hidden": (3,)})},
        "different parameters",
    ),
    ({"estimator": {"name": "first_order"}}, "holds a start or a loss: choose 'truncated'"),
    ({"theta": {"loss": {"name": "l2"}}, "objective": {"on": "train"}}, "objective.on"),
    ({"theta": {"loss": {"name": "l2"}}, "estimator": {"name": "truncated"}}, "holds constant"),
    ({"theta": {"loss": {"name": "l3"}}}, "Unknown loss 'l3'"),
    ({"theta": {"loss": {"name": "label_weights", "classes": 2}}}, "sinusoid.* have labels of"),
    ({"optimizer": {"name": "sgd", "learning_rate": 0.0}}, "learning_rate=0.0 is out of range"),
    ({"optimizer": {"name": "sgd", "tensors": ("a", "a")}}, "name a tensor twice"),
    ({"task": {"name": "sinusoid", "shots": 0}}, "shots=0"),
    ({"task": {"name": "sinusoid", "phase": (1.0, 0.0)}}, "phase=.* is not a range"),
]


@pytest.mark.parametrize("change, sentence", MISTAKES, ids=[m[1][:20] for m in MISTAKES])
def test_a_mistake_is_one_sentence(config, change, sentence):
    with pytest.raises(l2l.UserError, match=sentence):
        build_experiment({**config, **change})


def test_tensors_with_rates_must_be_the_optimizees():
    optimizer = l2l.optimizers.registry.optimizer({"name": "sgd", "tensors": ("a", "b")})
    bound = optimizer.bind(optimizer.init(jax.random.key(0)))
    params = {"a": jnp.ones(2), "c": jnp.ones(1)}
    with pytest.raises(l2l.UserError, match=r"with a rate are a, b, but those of .* a, c"):
        bound.update(params, bound.init(params), params)
    params = {"a": jnp.ones(2), "b": jnp.ones(1)}
    theta = {"a": jnp.log(0.1), "b": jnp.log(2.0)}
    updates, _ = optimizer.bind(theta).update(params, optimizer.bind(theta).init(params), params)
    np.testing.assert_allclose(updates["a"], [-0.1, -0.1], rtol=1e-6)
    np.testing.assert_allclose(updates["b"], [-2.0], rtol=1e-6)
    with pytest.raises(l2l.UserError, match=r"are a, b, but those of .* are a: .* and no others"):
        bound.update({"a": params["a"]}, bound.init(params), {"a": params["a"]})


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_tensors_with_rates_may_be_left_out_of_a_step(momentum):
    """Masked, or without a gradient: then their rates have nothing to do."""
    optimizer = l2l.optimizers.registry.optimizer(
        {"name": "sgd", "tensors": ("a", "b"), "momentum": momentum}
    )
    bound = optimizer.bind({"a": jnp.log(0.1), "b": jnp.log(2.0)})
    params = {"a": jnp.ones(2), "b": jnp.ones(1)}
    updates, _ = bound.update({"a": params["a"], "b": None}, bound.init(params), params)
    assert updates["b"] is None
    np.testing.assert_allclose(updates["a"], [-0.1, -0.1], rtol=1e-6)
    masked = optax.masked(bound, {"a": False, "b": True})
    updates, _ = masked.update(params, masked.init(params), params)
    np.testing.assert_allclose(updates["b"], [-2.0], rtol=1e-6)
    odd = {"a": params["a"], "c": None, "d": params["b"]}
    with pytest.raises(l2l.UserError, match=r"with a rate are a, b, but those of .* are a, d"):
        bound.update(odd, bound.init(odd), odd)


HOSTILE = [
    {"start": [["a"], ["a", "b"]]},  # A leaf with children.
    {"start": [["a"], ["a"]]},  # Two leaves at one place.
    {"start": [["a"], [3]]},  # Text and a number as keys of one node.
    {"start": [["a"]]},  # Fewer paths than tensors.
    {"start": [["a"], ["b"], ["c"]]},
    {"start": [["a"], []]},
    {"start": [["a"], ["b"] * 40]},
    {"start": [["a"], [True]]},
    {"start": [["a"], [{}]]},
    {"start": "ab"},
    {"start": {"a": 0, "b": 1}},
    {"other": [["a"], ["b"]]},
    [["a"], ["b"]],
    None,
]


@pytest.mark.parametrize("holds", HOSTILE, ids=str)
def test_a_start_whose_paths_cannot_be_is_no_whole_export(tmp_path, holds):
    theta = l2l.core.base.Parts((), {"a": np.ones(2, np.float32), "b": np.zeros(1, np.float32)})
    path = l2l.export(tmp_path / "x.safetensors", {"name": "sgd"}, theta)
    with safetensors.safe_open(path, "numpy") as file:
        header = json.loads(file.metadata()["l2l"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert header["holds"] == {"start": [["a"], ["b"]]}
    header["holds"] = holds
    safetensors.numpy.save_file(tensors, path, {"l2l": json.dumps(header)})
    with pytest.raises(l2l.UserError, match="not a complete export"):
        l2l.start(path)
