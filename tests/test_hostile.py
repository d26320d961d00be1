"""Files from strangers: whatever they hold, they end in one clear sentence and run nothing.

python -m pytest -m slow tests/test_hostile.py -s    # 10,000 exports, 300 checkpoints
"""

import collections
import json
import os
import shutil
import struct
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from l2l import build, checkpoint

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
    """(what `call` returned or raised, what it ran or wrote meanwhile)."""
    global _heard
    _heard = heard = []
    try:
        return call(), heard
    except Exception as error:
        return error, heard
    finally:
        _heard = None


def test_the_listener_hears(tmp_path, monkeypatch):
    (tmp_path / "canary.py").write_text("sung = 1")
    monkeypatch.syspath_prepend(tmp_path)
    assert listening(lambda: __import__("canary"))[1]
    assert listening(lambda: exec("1"))[1]
    assert listening(lambda: (tmp_path / "x").write_text(""))[1]
    assert not listening(lambda: (tmp_path / "x").read_text())[1]


# --- exports ---------------------------------------------------------------------------------


def parts(content):
    """(the header as a table, the one of l2l in it, the numbers) of an export."""
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    return header, json.loads(header["__metadata__"]["l2l"]), content[8 + size :]


def joined(header, about, numbers):
    if about is not None:
        header["__metadata__"]["l2l"] = about if isinstance(about, str) else json.dumps(about)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + numbers


def places(tree, path=()):
    """The paths of everything in nested tables and lists."""
    yield path
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from places(value, (*path, key))
    if isinstance(tree, list):
        for i, value in enumerate(tree):
            yield from places(value, (*path, i))


def replaced(tree, path, value):
    if not path:
        return value
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value


NASTY = (
    *(None, True, False, 0, -1, 1, 0.5, 2**31, 2**63, 10**400, -(10**9), 1e308, float("nan")),
    *("", "x" * 70_000, "../../etc/passwd", "/dev/zero", "canary:sing", "canary.py:sing", "\0"),
    *("os:system", "__import__('canary')", "\x1b[2J\r\nfine", "\ud800", "{0.__class__}", "%s%n"),
    *([], {}, [[]], [[[[[[[[[[]]]]]]]]]], {"name": "lstm"}, [0] * 5000, ["canary:sing"]),
    *({"name": "by_parameter", "parts": {"a": {"name": "lstm"}}, "labels": [["*", "a"]]},),
    *({"name": "lstm", "layers": 4000}, {"__reduce__": ["os.system", ["touch canary"]]}),
)
TYPES = ("F64", "F16", "BF16", "I32", "BOOL", "U8", "F8_E4M3", "F4", "", "canary", 3, None)


def flip(content, random):
    content = bytearray(content)
    for at in random.integers(0, len(content), random.integers(1, 9)):
        content[at] ^= 1 << random.integers(8)
    return bytes(content)


def flip_header(content, random):
    size = 8 + struct.unpack("<Q", content[:8])[0]
    return flip(content[:size], random) + content[size:]


def cut(content, random):
    at, more = random.integers(len(content)), random.integers(2)
    return content[:at] if more else content[:at] + random.bytes(random.integers(1, 400))


def declare(content, random):
    """Another length of the header."""
    length = int(random.choice([0, 1, 2**20, 2**20 + 1, 2**31, 2**40, 2**63, random.integers(999)]))
    return struct.pack("<Q", length) + content[8:]


def edit_settings(content, random):
    header, about, numbers = parts(content)
    found = [p for p in places(about) if p]
    path = found[random.integers(len(found))]
    replaced(about, path, NASTY[random.integers(len(NASTY))])
    return joined(header, about, numbers)


def add_setting(content, random):
    header, about, numbers = parts(content)
    known = ("layers", "learning_rate", "hidden_size", "decays", "inputs", "output", "eps_root")
    known += ("name", "weight_decay", "parts", "labels", "p", "scale", "\ud800", "__class__")
    key = known[random.integers(len(known))]
    about["optimizer"]["settings"][key] = NASTY[random.integers(len(NASTY))]
    if random.integers(2):
        names = (*build.OPTIMIZERS, "canary:sing", "../canary.py:sing")
        about["optimizer"]["name"] = names[random.integers(len(names))]
    return joined(header, about, numbers)


def edit_tensors(content, random):
    header, _, numbers = parts(content)
    names = [name for name in header if name != "__metadata__"]
    name = names[random.integers(len(names))]
    sizes = ([2**40, 2**40], [2**62], [-1], [], [0], [1e9], ["a"], None, [1] * 5000, [2**64])
    spans = ([0, 2**60], [2**60, 0], [-4, 0], [0, 0], [4, 0], None, [0], ["a", 1], [0.5, 4])
    change = random.integers(5)
    if change == 0:
        header[name]["shape"] = sizes[random.integers(len(sizes))]
    elif change == 1:
        header[name]["dtype"] = TYPES[random.integers(len(TYPES))]
    elif change == 2:
        header[name]["data_offsets"] = spans[random.integers(len(spans))]
    elif change == 3:
        header[("../../canary", "/dev/null", "", "a" * 9999, "\0")[random.integers(5)]] = (
            header.pop(name)
        )
    else:
        header[name] = NASTY[random.integers(len(NASTY))]
    return joined(header, None, numbers)


def double(content, random):
    """A key that stands twice: of a tensor, of the metadata or of the settings."""
    header, about, numbers = parts(content)
    if random.integers(2):
        inner = json.dumps(about)
        key = ("optimizer", "format", "sha256")[random.integers(3)]
        value = json.dumps(about[key])
        inner = inner[:-1] + f', "{key}": {value}}}'
        return joined(header, inner, numbers)
    name = list(header)[random.integers(len(header))]
    text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"
    return joined(text.encode(), None, numbers)


def nest(content, random):
    header, _, numbers = parts(content)
    depth = int(random.choice([7, 100, 3000, 100_000]))
    left, right = (("[", "]"), ('{"a":', "}"))[random.integers(2)]
    deep = left * depth + "1" + right * depth
    if random.integers(2):
        return joined(header, deep, numbers)
    text = json.dumps(header)[:-1] + f', "deep": {deep}}}'
    return joined(text.encode(), None, numbers)


def bad_text(content, random):
    """Bytes in the header that are no UTF-8."""
    size = 8 + struct.unpack("<Q", content[:8])[0]
    at = random.integers(8, size)
    bad = (b"\xff\xfe", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf8", b"\x80")[random.integers(5)]
    return content[:at] + bad + content[at + len(bad) :]


MUTATIONS = (flip, flip_header, cut, declare, edit_settings, add_setting, edit_tensors, double)
MUTATIONS += (nest, bad_text)


def fuzz_exports(folder, trials, seed=0):
    """Reads mutations of a good export: a count of ends. Asserts that each is one of the two good
    ones, an error that is clear or the very numbers of the original, and that nothing was run."""
    theta = build.optimizer(SPECIFICATION).init(jax.random.key(1))
    theta = jax.tree.map(lambda x: x + 0.01, theta)
    about = {"seed": 1, "config": {"task": {"hidden": (32,), "name": "mlp"}}}
    path = checkpoint.export(folder / "mine.safetensors", SPECIFICATION, theta, about)
    whole, random = path.read_bytes(), np.random.default_rng(seed)
    # Each optimizer is built once: what JAX and Haiku import and make at their first use is theirs.
    for name in build.OPTIMIZERS:
        header, about, numbers = parts(whole)
        about["optimizer"] = {"name": name, "settings": {}}
        path.write_bytes(joined(header, about, numbers))
        listening(lambda: checkpoint.read(path))
    ends = collections.Counter()
    for trial in range(trials):
        change = MUTATIONS[trial % len(MUTATIONS)]
        path.write_bytes(change(whole, random))
        result, heard = listening(lambda: checkpoint.read(path))
        where = f"trial {trial}, {change.__name__}"
        assert not heard, (where, heard)
        if not isinstance(result, Exception):  # What was changed is only told, such as the seed.
            jax.tree.map(np.testing.assert_array_equal, result[1], theta)
            ends["loads"] += 1
            continue
        assert type(result) is ValueError, (where, result)
        said = str(result)
        assert said.startswith(f"{path} is no whole export of l2l: "), (where, said)
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
    saver = checkpoint.saver(folder)
    saver.save(1, tree_of(size)[0])
    saver.close()


def opened(folder):
    """What `restore` makes of a folder of one checkpoint that should be that of `tree_of`."""
    saver = checkpoint.saver(folder)
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
            assert type(result) is ValueError, (where, result)
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
