"""What strangers might make of an export: ten ways of damaging or forging one."""

import json
import struct

from l2l.optimizers import registry


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
        names = (*registry.OPTIMIZERS, "canary:sing", "../canary.py:sing")
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
