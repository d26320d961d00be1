"""Files from strangers: whatever they hold, they end in one clear sentence and run nothing.

python -m pytest -m slow tests/test_hostile.py -s    # 10,000 exports, 300 checkpoints
"""

import collections
import json
import os
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from mutations import MUTATIONS, NASTY, cut, flip, joined, parts, places, replaced

from l2l.console.errors import UserError
from l2l.optimizers import registry
from l2l.storage import checkpoint, exports

SPECIFICATION = {"name": "lstm", "hidden_size": 3, "decays": (0.9, 0.99)}
# What Python tells of itself when it runs, imports or loads something, or touches other files.
RUNS = ("exec", "import", "pickle.find_class", "code.__new__", "ctypes.dlopen")
RUNS += ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen")
RUNS += ("socket.connect", "socket.bind", "socket.getaddrinfo")
WRITES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.rmtree")
OWN = frozenset(map(str, Path(os.__file__).parent.glob("*.py")))
_heard = None


def _hear(event, arguments):
    if _heard is None:
        return
    # Libraries import of Python's own what they turn out to need.
    if event == "import" and arguments[0].split(".")[0] in sys.stdlib_module_names:
        return
    if event == "exec" and getattr(arguments[0], "co_filename", "") in OWN:
        return
    wrote = event in WRITES or (event == "open" and "w" in str(arguments[1]))
    if wrote or event in RUNS:
        _heard.append((wrote, f"{event} {arguments!r}"[:200]))


sys.addaudithook(_hear)  # For good: Python has no way to take one back.


def listening(call):
    """(what `call` returned or raised, what it ran or wrote meanwhile).

    JAX's cache of compiled programs, which the tests share, is not written meanwhile: whether a
    program is in it yet depends on the tests before."""
    global _heard
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float("inf"))
    _heard = heard = []
    try:
        return call(), heard
    except Exception as error:
        return error, heard
    finally:
        _heard = None
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def test_the_listener_hears(tmp_path, monkeypatch):
    (tmp_path / "canary.py").write_text("sung = 1")
    monkeypatch.syspath_prepend(tmp_path)
    assert listening(lambda: __import__("canary"))[1]
    assert listening(lambda: exec("1"))[1]
    assert listening(lambda: (tmp_path / "x").write_text(""))[1]
    assert not listening(lambda: (tmp_path / "x").read_text())[1]


# --- exports ---------------------------------------------------------------------------------


def fuzz_exports(folder, trials, seed=0):
    """Reads mutations of a good export: a count of ends. Asserts that each is one of the two good
    ones, an error that is clear or the very numbers of the original, and that nothing was run."""
    theta = registry.optimizer(SPECIFICATION).init(jax.random.key(1))
    theta = jax.tree.map(lambda x: x + 0.01, theta)
    about = {"seed": 1, "config": {"task": {"hidden": (32,), "name": "mlp"}}}
    path = exports.export(folder / "mine.safetensors", SPECIFICATION, theta, about)
    whole, random = path.read_bytes(), np.random.default_rng(seed)
    # A whole file is read and each optimizer built once: what JAX and Haiku import and make at a
    # first use is theirs.
    exports.read(path)
    for name in registry.OPTIMIZERS:
        header, about, numbers = parts(whole)
        about["optimizer"] = {"name": name, "settings": {}}
        path.write_bytes(joined(header, about, numbers))
        listening(lambda: exports.read(path))
    ends = collections.Counter()
    for trial in range(trials):
        change = MUTATIONS[trial % len(MUTATIONS)]
        path.write_bytes(change(whole, random))
        result, heard = listening(lambda: exports.read(path))
        where = f"trial {trial}, {change.__name__}"
        assert not heard, (where, heard)
        if not isinstance(result, Exception):  # What was changed is only told, such as the seed.
            jax.tree.map(np.testing.assert_array_equal, result[1], theta)
            ends["loads"] += 1
            continue
        assert type(result) is UserError, (where, result)
        said = str(result)
        clear = (
            f"{path} is not a complete export of l2l: ",
            f"{path} is not for this version of l2l: ",
            f"{path} holds weights of the optimizer '",  # One that is registered nowhere.
        )
        assert said.startswith(clear), (where, said)
        assert said.isprintable() and len(said) < 500, (where, said)
        ends[change.__name__] += 1
    return ends


def test_mutated_exports(tmp_path, monkeypatch):
    (tmp_path / "canary.py").write_text("raise SystemExit('sung')")
    monkeypatch.syspath_prepend(tmp_path)
    ends = fuzz_exports(tmp_path, 400)
    assert ends.total() == 400 and ends["loads"] < 60
    assert len(ends) == len(MUTATIONS) + 1  # Some load, and every kind of change is refused.


@pytest.mark.slow
def test_ten_thousand_mutated_exports(tmp_path, monkeypatch):
    (tmp_path / "canary.py").write_text("raise SystemExit('sung')")
    monkeypatch.syspath_prepend(tmp_path)
    ends = fuzz_exports(tmp_path, 10_000, seed=1)
    print(
        f"\n{ends.total()} mutated exports: {ends.total() - ends['loads']} clear errors, ", end=""
    )
    print(f"{ends['loads']} that still hold the same optimizer, 0 crashes, 0 that ran code")
    assert ends.total() == 10_000


# --- checkpoints -----------------------------------------------------------------------------


def tree_of(size=8):
    mesh = Mesh(jax.devices()[:1], ("devices",))
    same = NamedSharding(mesh, PartitionSpec())
    tree = {"w": jnp.arange(float(size)), "keys": jax.random.split(jax.random.key(0), 2)}
    return tree, jax.tree.map(lambda _: same, tree)


def saved(folder, size=8):
    saver = checkpoint.Saver(folder)
    saver.save(1, tree_of(size)[0])
    saver.close()


def opened(folder):
    """What `restore` makes of a folder of one checkpoint that should be that of `tree_of`."""
    saver = checkpoint.Saver(folder)
    tree, where = tree_of()
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    try:
        return saver.restore(like, where)
    finally:
        saver.close()


def damage(folder, random):
    """Changes one file: bits, length, or a value of its JSON; or makes it a link."""
    found = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
    file = found[random.integers(len(found))]
    content = file.read_bytes()
    kind = random.integers(5)
    if kind == 4:
        file.unlink()
        file.symlink_to(("/dev/null", "/nowhere", folder)[random.integers(3)])
        return f"link {file.name}"
    try:
        table = json.loads(content)
    except ValueError:
        table = None
    if isinstance(table, dict) and kind > 1:
        found = [p for p in places(table) if p]
        replaced(table, found[random.integers(len(found))], NASTY[random.integers(len(NASTY))])
        file.write_text(json.dumps(table))
        return f"edit {file.name}"
    change = (flip, cut)[random.integers(2)]
    file.write_bytes(change(content, random))
    return f"{change.__name__} {file.name}"


def fuzz_checkpoints(folder, trials, seed=0):
    """As `fuzz_exports`, of a checkpoint. Orbax writes logs of its own: writing is not listened
    for."""
    saved(folder / "whole")
    opened(folder / "whole")
    listening(lambda: opened(folder / "nothing"))
    random, ends = np.random.default_rng(seed), collections.Counter()
    expected = tree_of()[0]
    for trial in range(trials):
        mine = folder / "mine"
        shutil.copytree(folder / "whole", mine)
        where = f"trial {trial}, {damage(mine / '1', random)}"
        result, heard = listening(lambda: opened(mine))
        assert not [what for wrote, what in heard if not wrote], (where, heard)
        if result is None:  # No longer to be told from a save that was not finished.
            ends["none"] += 1
        elif not isinstance(result, Exception):
            np.testing.assert_array_equal(result[0]["w"], expected["w"])
            ends["loads"] += 1
        else:
            assert type(result) is UserError, (where, result)
            said = str(result)
            assert said.startswith(f"No checkpoint under {mine} can be read"), (where, said)
            assert said.isprintable() and len(said) < 700, (where, said)
            ends["refused"] += 1
        shutil.rmtree(mine)
    return ends


def test_mutated_checkpoints(tmp_path):
    ends = fuzz_checkpoints(tmp_path, 30)
    assert ends["refused"] and ends.total() == 30


@pytest.mark.slow
def test_three_hundred_mutated_checkpoints(tmp_path):
    ends = fuzz_checkpoints(tmp_path, 300, seed=1)
    print(f"\n300 mutated checkpoints: {dict(ends)}, 0 crashes, 0 that ran code")


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    """Arrays are opened as what is expected: no more memory is taken than that."""
    saved(tmp_path, size=4096)
    with pytest.raises(ValueError, match=r"No checkpoint under .* can be read"):
        opened(tmp_path)
