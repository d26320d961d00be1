"""Exports: they come back whole, or say in one sentence that they do not."""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2l.console.errors import UserError
from l2l.optimizers import registry
from l2l.storage import exports, files

SPECIFICATION = {"name": "lstm", "hidden_size": 3, "decays": (0.9, 0.99)}


@pytest.fixture(scope="module")
def theta():
    theta = registry.optimizer(SPECIFICATION).init(jax.random.key(1))
    return jax.tree.map(lambda x: x + 0.01, theta)


@pytest.fixture
def path(tmp_path, theta):
    about = {"seed": 1, "config": {"task": {"hidden": (32,)}}}
    return exports.export(tmp_path / "mine.safetensors", SPECIFICATION, theta, about)


def header_of(path):
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def rewrite(path, change, change_l2l=None):
    """The file with another header, its tensors untouched."""
    header, tensors = header_of(path)
    if change_l2l:
        about = json.loads(header["__metadata__"]["l2l"])
        change_l2l(about)
        header["__metadata__"]["l2l"] = json.dumps(about)
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + tensors)


def test_an_export_comes_back(path, theta):
    optimizer, found, about = exports.read(path)
    jax.tree.map(np.testing.assert_array_equal, theta, found)
    assert about["seed"] == 1 and about["optimizer"]["settings"]["hidden_size"] == 3
    assert optimizer.rule.features == registry.optimizer(SPECIFICATION).rule.features
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # No temporary file is left.


def test_metadata_of_another_export_say_nothing_of_this_theta(path, theta, tmp_path):
    about = exports.read(path)[2]
    moved = jax.tree.map(lambda x: 2 * x, theta)
    again = exports.export(tmp_path / "again.safetensors", SPECIFICATION, moved, about)
    _, found, told = exports.read(again)
    jax.tree.map(np.testing.assert_array_equal, moved, found)
    assert told["seed"] == about["seed"] and told["sha256"] != about["sha256"]


def test_load_takes_a_horizon_that_update_overrides(path, theta):
    params, gradient = jnp.ones(4), jnp.full(4, 0.5)
    bound = registry.optimizer(SPECIFICATION).bind(theta)

    def step(optimizer, **extra):
        # The second step: at the first, outputs that start at zero hide the horizon.
        state = optimizer.init(params)
        return optimizer.update(gradient, state, params, **extra)[0]

    plain, told = exports.load(path), exports.load(str(path), num_steps=100)
    np.testing.assert_array_equal(step(plain), step(bound))
    np.testing.assert_array_equal(step(told), step(bound, num_steps=100))
    np.testing.assert_array_equal(step(told, num_steps=7), step(bound, num_steps=7))
    assert not np.array_equal(step(told), step(plain))


def test_load_keeps_the_recurrent_state_as_asked(path):
    params = jnp.ones(4)
    state = exports.load(path, state_dtype=jnp.bfloat16).init(params)
    assert {x.dtype for x in jax.tree.leaves(state.hidden)} == {jnp.dtype(jnp.bfloat16)}
    plain = exports.load(path).init(params)
    assert {x.dtype for x in jax.tree.leaves(plain.hidden)} == {jnp.dtype(jnp.float32)}


def test_a_run_directory_loads_by_its_export(path, tmp_path):
    with pytest.raises(ValueError, match="when its training ends"):
        exports.load(tmp_path)
    path.rename(tmp_path / exports.EXPORT)
    exports.load(tmp_path)


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(ValueError, match=r"Unknown optimizer 'nothing'.*path"):
        exports.load("nothing")


def drop(key):
    return lambda about: about.pop(key)


def setting(**settings):
    return lambda about: about["optimizer"]["settings"].update(settings)


def deep(about):
    for _ in range(50):
        about["optimizer"]["settings"] = {"decays": [about["optimizer"]["settings"]]}


HOSTILE = {
    "no metadata": (drop("__metadata__"), None),
    "metadata is no JSON": (lambda h: h["__metadata__"].update(l2l="[[[" * 9), None),
    "metadata is a list": (lambda h: h["__metadata__"].update(l2l="[1]"), None),
    "nested": (lambda h: h["__metadata__"].update(l2l="[" * 100_000), None),
    "another format": (lambda h: None, lambda a: a.update(format=99)),
    "no format": (lambda h: None, drop("format")),
    "no optimizer": (lambda h: None, drop("optimizer")),
    "unknown optimizer": (lambda h: None, lambda a: a["optimizer"].update(name="os:system")),
    "a file as optimizer": (lambda h: None, lambda a: a["optimizer"].update(name="x.py:f")),
    "name is a list": (lambda h: None, lambda a: a["optimizer"].update(name=["lstm"])),
    "unknown setting": (lambda h: None, setting(nothing=1)),
    "settings are a list": (lambda h: None, lambda a: a["optimizer"].update(settings=[1])),
    "a name in the settings": (lambda h: None, setting(name="dm")),
    "other size": (lambda h: None, setting(hidden_size=4)),
    "huge size": (lambda h: None, setting(hidden_size=10**12)),
    "huge layers": (lambda h: None, setting(layers=4000)),
    "infinite": (lambda h: None, setting(learning_rate=float("inf"))),
    "wrong type": (lambda h: None, setting(hidden_size="3")),
    "long list": (lambda h: None, setting(decays=[0.9] * 1000)),
    "deep": (lambda h: None, deep),
    "wrong sum": (lambda h: None, lambda a: a.update(sha256="0" * 64)),
    "huge shape": (lambda h: h["log_learning_rate"].update(shape=[2**40, 2**20]), None),
    "other type": (lambda h: h["log_learning_rate"].update(dtype="I32"), None),
    "out of the file": (lambda h: h["log_learning_rate"].update(data_offsets=[0, 2**40]), None),
    "tensor lost": (drop("log_learning_rate"), None),
    "tensor renamed": (lambda h: h.update({"../../x": h.pop("log_learning_rate")}), None),
}


@pytest.mark.parametrize("change, change_l2l", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_export_is_one_clear_error(path, change, change_l2l):
    rewrite(path, change, change_l2l)
    with pytest.raises(ValueError, match=r"mine\.safetensors is no (whole )?export") as error:
        exports.read(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_truncated_and_mutated_exports(path, theta):
    whole, random = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for trial in range(150):
        content = bytearray(whole)
        if trial % 3 == 0:
            content = content[: random.integers(len(whole))]
        else:
            for at in random.integers(0, len(whole), random.integers(1, 4)):
                content[at] ^= 1 << random.integers(8)
        path.write_bytes(content)
        try:
            found = exports.read(path)[1]
        except ValueError:
            refused += 1
        else:  # The change was in what is only told, such as the seed.
            jax.tree.map(np.testing.assert_array_equal, found, theta)
    assert refused > 120


def test_numbers_that_are_not_finite_are_refused(tmp_path, theta):
    broken = jax.tree.map(lambda x: x * jnp.nan, theta)
    path = exports.export(tmp_path / "mine.safetensors", SPECIFICATION, broken)
    with pytest.raises(ValueError, match="finite"):
        exports.read(path)


def test_a_write_that_fails_leaves_what_was(path, monkeypatch):
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match="No space"):
        files.write(path, b"other")
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1
