"""Checkpoints and exports: they come back whole, or say in one sentence that they do not."""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from l2l import build, checkpoint

SPECIFICATION = {"name": "lstm", "hidden_size": 3, "decays": (0.9, 0.99)}


@pytest.fixture(scope="module")
def theta():
    theta = build.optimizer(SPECIFICATION).init(jax.random.key(1))
    return jax.tree.map(lambda x: x + 0.01, theta)


@pytest.fixture
def path(tmp_path, theta):
    about = {"seed": 1, "config": {"task": {"hidden": (32,)}}}
    return checkpoint.export(tmp_path / "mine.safetensors", SPECIFICATION, theta, about)


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
    optimizer, found, about = checkpoint.read(path)
    jax.tree.map(np.testing.assert_array_equal, theta, found)
    assert about["seed"] == 1 and about["optimizer"]["settings"]["hidden_size"] == 3
    assert optimizer.rule.features == build.optimizer(SPECIFICATION).rule.features
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # No temporary file is left.


def test_load_takes_a_horizon_that_update_overrides(path, theta):
    params, gradient = jnp.ones(4), jnp.full(4, 0.5)
    bound = build.optimizer(SPECIFICATION).bind(theta)

    def step(optimizer, **extra):
        # The second step: at the first, outputs that start at zero hide the horizon.
        state = optimizer.init(params)
        return optimizer.update(gradient, state, params, **extra)[0]

    plain, told = checkpoint.load(path), checkpoint.load(str(path), num_steps=100)
    np.testing.assert_array_equal(step(plain), step(bound))
    np.testing.assert_array_equal(step(told), step(bound, num_steps=100))
    np.testing.assert_array_equal(step(told, num_steps=7), step(bound, num_steps=7))
    assert not np.array_equal(step(told), step(plain))


def test_load_keeps_the_recurrent_state_as_asked(path):
    params = jnp.ones(4)
    state = checkpoint.load(path, state_dtype=jnp.bfloat16).init(params)
    assert {x.dtype for x in jax.tree.leaves(state.hidden)} == {jnp.dtype(jnp.bfloat16)}
    plain = checkpoint.load(path).init(params)
    assert {x.dtype for x in jax.tree.leaves(plain.hidden)} == {jnp.dtype(jnp.float32)}


def test_a_run_directory_loads_by_its_export(path, tmp_path):
    with pytest.raises(ValueError, match="when its training ends"):
        checkpoint.load(tmp_path)
    path.rename(tmp_path / checkpoint.EXPORT)
    checkpoint.load(tmp_path)


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(ValueError, match=r"Unknown optimizer 'nothing'.*path"):
        checkpoint.load("nothing")


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
        checkpoint.read(path)
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
            found = checkpoint.read(path)[1]
        except ValueError:
            refused += 1
        else:  # The change was in what is only told, such as the seed.
            jax.tree.map(np.testing.assert_array_equal, found, theta)
    assert refused > 120


def test_numbers_that_are_not_finite_are_refused(tmp_path, theta):
    broken = jax.tree.map(lambda x: x * jnp.nan, theta)
    path = checkpoint.export(tmp_path / "mine.safetensors", SPECIFICATION, broken)
    with pytest.raises(ValueError, match="finite"):
        checkpoint.read(path)


def test_a_write_that_fails_leaves_what_was(path, monkeypatch):
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write(path, b"other")
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


def tree_of(step, devices=8):
    mesh = Mesh(jax.devices()[:devices], ("devices",))
    split, same = NamedSharding(mesh, P("devices")), NamedSharding(mesh, P())
    keys = jax.random.split(jax.random.key(step), 8)
    tree = {"w": jnp.arange(8.0) + step, "keys": keys, "n": jnp.int32(step), "b": jnp.array([True])}
    where = {"w": split, "keys": split, "n": same, "b": same}
    return jax.device_put(tree, where), where


@pytest.fixture
def saved(tmp_path):
    saver = checkpoint.saver(tmp_path, keep=2)
    for step in (1, 2, 3):
        saver.save(step, tree_of(step)[0])
    saver.close()
    return tmp_path


def reopen(directory, devices=8):
    said = []
    saver = checkpoint.saver(directory, keep=2, say=said.append)
    tree, where = tree_of(0, devices)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    try:
        return saver.restore(like, where), said
    finally:
        saver.close()


@pytest.mark.parametrize("devices", [8, 2, 1])
def test_a_checkpoint_of_eight_devices_opens_on_any(saved, devices):
    (tree, step), said = reopen(saved, devices)
    assert step == 3 and not said
    expected, where = tree_of(3, devices)
    data = lambda t: t | {"keys": jax.random.key_data(t["keys"])}  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, data(tree), data(expected))
    assert tree["w"].sharding == where["w"]
    assert sorted(p.name for p in saved.iterdir() if p.is_dir()) == ["2", "3"]


def truncate(folder):
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(folder):
    """One bit among the numbers."""
    (file,) = (folder / "default" / "d").iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def empty(folder):
    for file in folder.rglob("*"):
        if file.is_file():
            file.unlink()


@pytest.mark.parametrize("damage", [truncate, flip, empty])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(saved, damage):
    damage(saved / "3")
    (tree, step), said = reopen(saved)
    assert step == 2 and int(tree["n"]) == 2
    assert len(said) == 1 and "Checkpoint 3 cannot be read" in said[0]
    assert (saved / "damaged-3").exists()


def test_where_none_can_be_read_nothing_is_touched(saved):
    for step in ("2", "3"):
        truncate(saved / step)
    with pytest.raises(ValueError, match=r"No checkpoint under .* can be read"):
        reopen(saved)
    assert sorted(p.name for p in saved.iterdir() if p.is_dir()) == ["2", "3"]


def test_no_checkpoint_is_no_error(tmp_path):
    assert reopen(tmp_path)[0] is None


def test_the_checksum_sees_one_bit_and_no_devices():
    tree, _ = tree_of(1)
    data = {"w": tree["w"], "b": tree["b"], "half": jnp.ones(3, jnp.bfloat16)}
    total = int(checkpoint.checksum(data))
    assert total == int(checkpoint.checksum(jax.device_get(data)))
    bits = jax.lax.bitcast_convert_type(data["w"], jnp.uint32).at[3].add(1)
    other = data | {"w": jax.lax.bitcast_convert_type(bits, jnp.float32)}
    assert total != int(checkpoint.checksum(other))
