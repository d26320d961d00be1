"""Checkpoints: they come back whole, or say in one sentence that they do not."""

import errno
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from l2l.console.errors import UserError
from l2l.storage import checkpoint


def tree_of(step, devices=8):
    mesh = Mesh(jax.devices()[:devices], ("devices",))
    split, same = NamedSharding(mesh, P("devices")), NamedSharding(mesh, P())
    keys = jax.random.split(jax.random.key(step), 8)
    tree = {"w": jnp.arange(8.0) + step, "keys": keys, "n": jnp.int32(step), "b": jnp.array([True])}
    where = {"w": split, "keys": split, "n": same, "b": same}
    return jax.device_put(tree, where), where


@pytest.fixture
def saved(tmp_path):
    saver = checkpoint.Saver(tmp_path, keep=2)
    for step in (1, 2, 3):
        saver.save(step, tree_of(step)[0])
    saver.close()
    return tmp_path


def reopen(directory, devices=8):
    said = []
    saver = checkpoint.Saver(directory, keep=2, say=said.append)
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

    def data(t):
        return t | {"keys": jax.random.key_data(t["keys"])}

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
    assert len(said) == 1 and "Checkpoint 3 is damaged" in said[0]
    assert (saved / "damaged-3").exists()


def test_a_step_that_is_damaged_again_is_set_aside_again(saved):
    """As when a run went on from 2, wrote 3 anew, and that is damaged too: twice more."""
    for name in ("damaged-3", "damaged-3-2", "damaged-3-3"):
        flip(saved / "3")
        assert reopen(saved)[0][1] == 2
        assert (saved / name).exists() and not (saved / "3").exists()
        shutil.copytree(saved / "2", saved / "3")


@pytest.fixture
def reading(monkeypatch):
    """Puts a function before every read of Orbax's, and counts the reads."""
    import orbax.checkpoint as ocp

    restore, calls = ocp.StandardCheckpointHandler.restore, []
    monkeypatch.setattr(checkpoint, "WAITS", (0.0, 0.0))

    def before(action):
        def read(self, folder, *arguments, **settings):
            calls.append(folder)
            action(len(calls))
            return restore(self, folder, *arguments, **settings)

        monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", read)
        return calls

    return before


REFUSALS = [
    OSError(errno.EIO, "Input/output error"),
    OSError("a hiccup without a number"),
    # As TensorStore words it.
    ValueError("UNAVAILABLE: Error reading [os_error_code='5'] [domain='os']"),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=["errno", "words", "tensorstore"])
def test_a_read_that_the_system_refuses_is_tried_again_and_renames_nothing(saved, reading, refusal):
    def twice(call):
        if call < 3:
            raise refusal

    calls = reading(twice)
    (tree, step), said = reopen(saved)
    assert step == 3 and int(tree["n"]) == 3 and len(calls) == 3 and not said

    def always(call):
        raise refusal

    reading(always)
    with pytest.raises(UserError, match=r"not be read in 3 attempts .*; it is left as it is"):
        reopen(saved)
    assert len(calls) == 6  # Of the newest alone: an older one would only hide it.
    assert sorted(p.name for p in saved.iterdir() if p.is_dir()) == ["2", "3"]


@pytest.mark.parametrize("failure", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: memory")])
def test_what_is_no_damage_passes_through(saved, reading, failure):
    def fail(call):
        raise failure

    calls = reading(fail)
    with pytest.raises(type(failure)):
        reopen(saved)
    assert len(calls) == 1
    assert sorted(p.name for p in saved.iterdir() if p.is_dir()) == ["2", "3"]


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
    one, two = jnp.arange(3.0), jnp.arange(3.0) + 7
    sums = [int(checkpoint.checksum({"a": a, "b": b})) for a, b in ((one, two), (two, one))]
    assert sums[0] != sums[1]  # Nor may two arrays change places.
