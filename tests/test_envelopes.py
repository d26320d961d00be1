"""The benchmark against published envelopes: its interpolation and its tasks."""

import importlib.util
import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2l.data import datasets
from l2l.tasks.supervised import Batch


@pytest.fixture(scope="module")
def envelopes():
    path = Path(__file__).parent.parent / "benchmarks" / "envelopes.py"
    spec = importlib.util.spec_from_file_location("envelopes", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["classifier", "autoencoder"])
def test_the_envelope_against_itself_is_even(envelopes, name):
    for steps, loss in zip(envelopes.STEPS, envelopes.ENVELOPES[name], strict=True):
        value, bound = envelopes.speed_up(name, steps, loss)
        assert value == pytest.approx(1) and bound == ""
        assert envelopes.published(name, steps) == pytest.approx(loss)


def test_between_published_steps_it_is_a_power_law(envelopes):
    # Halfway in logarithms between (1,000, .1069) and (2,000, .0498) both are geometric means.
    steps, loss = math.sqrt(1_000 * 2_000), math.sqrt(0.1069 * 0.0498)
    assert envelopes.speed_up("classifier", 500, loss)[0] == pytest.approx(steps / 500)
    assert envelopes.published("classifier", steps) == pytest.approx(loss)


def test_outside_it_is_a_bound(envelopes):
    assert str(envelopes.speed_up("classifier", 1_000, 0.2)) == "< 1"
    assert str(envelopes.speed_up("classifier", 1_000, math.nan)) == "< 1"
    assert str(envelopes.speed_up("autoencoder", 50_000, 0.004)) == "> 2"
    assert math.isnan(envelopes.published("classifier", 100))


@pytest.mark.skipif(not datasets.present("mnist"), reason="MNIST is not present")
def test_the_tasks_are_those_of_the_envelopes(envelopes):
    key = jax.random.key(0)
    sizes = {"classifier": (784, 128, 128, 128, 10), "autoencoder": (784, 128, 32, 128, 784)}
    images = jax.random.uniform(key, (5, 28, 28, 1))
    batch = Batch(images, jnp.arange(5))
    for name, widths in sizes.items():
        family = getattr(envelopes, name)()
        problem = family.sample(key)
        params = family.init(key, problem)
        x = images.reshape(5, -1)
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
            w, b = (params[f"linear_{i}"][p] for p in "wb")
            assert w.shape == (fan_in, fan_out) and not b.any()
            # A normal that is cut at two deviations has .88 of its deviation.
            assert float(jnp.abs(w).max()) <= 2 / math.sqrt(fan_in)
            assert float(w.std()) == pytest.approx(0.8796 / math.sqrt(fan_in), rel=0.1)
            x = x @ w + b[None]
            x = jax.nn.relu(x) if i < len(widths) - 2 else x
        if name == "classifier":
            truth = -jax.nn.log_softmax(x)[jnp.arange(5), jnp.arange(5)].mean()
        else:
            truth = jnp.mean((jax.nn.sigmoid(x) - images.reshape(5, -1)) ** 2)
        np.testing.assert_allclose(family.loss(params, problem, batch), truth, rtol=1e-5)


@pytest.mark.skipif(not datasets.present("mnist"), reason="MNIST is not present")
def test_the_command_prints_a_row_an_optimizer(envelopes, monkeypatch, tmp_path, capsys):
    arguments = ["--optimizer=adam(1e-3),sgd(0.1)", "--steps=3", "--seeds=1", "--only=classifier"]
    monkeypatch.setattr("sys.argv", ["envelopes.py", *arguments, f"--cache={tmp_path}"])
    envelopes.main()
    said = capsys.readouterr().out
    for name in ("adam(1e-3)", "sgd(0.1)"):
        (row,) = [line for line in said.splitlines() if line.startswith("|") and name in line]
        assert "| classifier |" in row and "< 333" in row  # Far above 0.1 after three steps.
