"""Exports: they come back whole, or say in one sentence that they do not."""

import errno
import inspect
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2l.console.errors import UserError
from l2l.optimizers import lstm, registry, versions
from l2l.storage import export_header, exports, files, loading, trees

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
    about = exports.read(path)[2] | {trees.HELD: {"start": [["w"]]}}  # Of one with a start.
    moved = jax.tree.map(lambda x: 2 * x, theta)
    again = exports.export(tmp_path / "again.safetensors", SPECIFICATION, moved, about)
    _, found, told = exports.read(again)
    jax.tree.map(np.testing.assert_array_equal, moved, found)
    assert told["seed"] == about["seed"] and told["sha256"] != about["sha256"]
    assert trees.HELD not in told


def test_load_takes_a_horizon_that_update_overrides(path, theta):
    params, gradient = jnp.ones(4), jnp.full(4, 0.5)
    bound = registry.optimizer(SPECIFICATION).bind(theta)

    def step(optimizer, **extra):
        # The second step: at the first, outputs that start at zero hide the horizon.
        state = optimizer.init(params)
        return optimizer.update(gradient, state, params, **extra)[0]

    plain, told = loading.load(path), loading.load(str(path), num_steps=100)
    np.testing.assert_array_equal(step(plain), step(bound))
    np.testing.assert_array_equal(step(told), step(bound, num_steps=100))
    np.testing.assert_array_equal(step(told, num_steps=7), step(bound, num_steps=7))
    assert not np.array_equal(step(told), step(plain))


def test_load_keeps_the_recurrent_state_as_asked(path):
    params = jnp.ones(4)
    state = loading.load(path, state_dtype=jnp.bfloat16).init(params)
    assert {x.dtype for x in jax.tree.leaves(state.hidden)} == {jnp.dtype(jnp.bfloat16)}
    plain = loading.load(path).init(params)
    assert {x.dtype for x in jax.tree.leaves(plain.hidden)} == {jnp.dtype(jnp.float32)}


def test_a_run_directory_loads_by_its_export(path, tmp_path):
    with pytest.raises(ValueError, match="when its training ends"):
        loading.load(tmp_path)
    path.rename(tmp_path / exports.EXPORT)
    loading.load(tmp_path)


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(ValueError, match=r"Unknown optimizer 'nothing'.*path"):
        loading.load("nothing")
    with pytest.raises(UserError, match=r"The name of the optimizer is empty: give .* lstm"):
        loading.load("")


def test_the_home_directory_may_be_written_as_in_a_shell(path, monkeypatch):
    monkeypatch.setenv("HOME", str(path.parent))
    loading.load(f"~/{path.name}")
    assert files.local("~/run") == path.parent / "run"
    with pytest.raises(UserError, match="There is no optimizer at ~nobody-of-that-name/x"):
        loading.load("~nobody-of-that-name/x")


@pytest.mark.parametrize("within", [False, True], ids=["alone", "one of several"])
def test_an_optimizer_that_is_registered_nowhere_is_named(tmp_path, monkeypatch, within):
    section = {"name": "mine"}
    with monkeypatch.context() as patch:
        patch.setitem(registry.OPTIMIZERS, "mine", registry.OPTIMIZERS["dm"])
        if within:
            section = {"name": "by_parameter", "parts": {"a": section}, "labels": [["*", "a"]]}
        theta = registry.optimizer(section).init(jax.random.key(0))
        path = exports.export(tmp_path / "mine.safetensors", section, theta)
        loading.load(path)
    with pytest.raises(UserError, match=r"'mine' and not its code, .* import the module") as error:
        loading.load(path)
    assert "Copy it" not in str(error.value)


def second_step(optimizer):
    """The updates of it, since at the first outputs that start at zero hide much."""
    params, gradient = {"w": jnp.ones((3, 2))}, {"w": jnp.linspace(-1.0, 1.0, 6).reshape(3, 2)}
    state = optimizer.update(gradient, optimizer.init(params), params)[1]
    return optimizer.update(gradient, state, params)[0]["w"]


def to_format_1(path):
    """As it was written then: the settings that the configuration named, and no versions."""

    def change(about):
        about["format"] = 1
        stored = about["optimizer"]
        stored.pop("rules")
        stored["settings"] = {k: v for k, v in stored["settings"].items() if k in SPECIFICATION}

    rewrite(path, lambda header: None, change)


@pytest.mark.parametrize("old", [False, True], ids=["today's", "format 1"])
def test_other_defaults_of_a_later_l2l_change_nothing(path, monkeypatch, old):
    if old:
        to_format_1(path)
    before = second_step(loading.load(path))
    for name, value in {"eps_root": 0.1, "weight_decay": 0.3, "second_decay": 0.9}.items():
        monkeypatch.setitem(lstm.lstm.__kwdefaults__, name, value)
        today = registry.optimizer(SPECIFICATION)
        assert not np.array_equal(second_step(today.bind(exports.read(path)[1])), before)
        np.testing.assert_array_equal(second_step(loading.load(path)), before)


def test_every_setting_is_written_and_known_of_older_files():
    assert set(versions.EARLIER) == set(versions.VERSIONS) == set(registry.OPTIMIZERS)
    for kind, factory in registry.OPTIMIZERS.items():
        optional = {
            name
            for name, parameter in inspect.signature(factory).parameters.items()
            if parameter.default is not parameter.empty
        }
        assert optional == set(versions.EARLIER[kind]), kind


def test_parts_are_written_whole(tmp_path):
    section = {
        "name": "by_parameter",
        "parts": {"a": {"name": "lstm", "hidden_size": 2}, "b": {"name": "adam"}},
        "labels": (("w", "a"), ("*", "b")),
    }
    theta = registry.optimizer(section).init(jax.random.key(0))
    stored = exports.read(exports.export(tmp_path / "x.safetensors", section, theta))[2]
    kinds = ("by_parameter", "lstm", "adam")
    assert stored["optimizer"]["rules"] == {kind: versions.VERSIONS[kind] for kind in kinds}
    parts = stored["optimizer"]["settings"]["parts"]
    assert parts["a"]["second_decay"] == 0.999 and parts["b"]["eps_root"] == 1e-8


def test_a_rule_that_changed_since_is_refused_unless_the_change_is_elsewhere(path, monkeypatch):
    now = versions.VERSIONS["lstm"]
    monkeypatch.setitem(versions.VERSIONS, "lstm", now + 1)

    def change(concerns):
        one = versions.Change("lstm", now + 1, "the sign is turned", concerns)
        monkeypatch.setattr(versions, "CHANGES", (one,))

    change(lambda settings: settings["hidden_size"] == 3)
    sentence = (
        rf"mine.safetensors is not .* version {now} of 'lstm', .*{now + 1} the sign is turned"
    )
    with pytest.raises(UserError, match=sentence):
        loading.load(path)
    assert exports.read(path, other_rules=True)[2]["optimizer"]["rules"] == {"lstm": now}
    change(lambda settings: settings["matrix_size"] > 0)
    loading.load(path)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda x: np.asarray(x, np.float64), r"float64 \(.*has float32 \("),
        (lambda x: x[None], r"float32 \(1.*has float32 \("),
    ],
)
def test_a_theta_that_could_not_be_read_back_is_not_written(tmp_path, theta, change, sentence):
    with pytest.raises(UserError, match=sentence):
        exports.export(tmp_path / "x.safetensors", SPECIFICATION, jax.tree.map(change, theta))
    with pytest.raises(UserError, match="log_learning_rate: none, where 'lstm'"):
        exports.export(tmp_path / "x.safetensors", SPECIFICATION, {})
    assert not list(tmp_path.iterdir())


def test_an_export_of_a_later_l2l_is_refused(path):
    rewrite(path, lambda h: None, lambda a: a["optimizer"].update(rules={"lstm": 99}))
    now = versions.VERSIONS["lstm"]
    with pytest.raises(UserError, match=rf"version 99 of 'lstm', and this l2l has {now}: install"):
        loading.load(path)


@pytest.mark.parametrize(
    "paths, sentence",
    [
        ([["w"], ["w"]], "two tensors have the same path"),
        ([["w"], ["w", "b"]], "one tensor begins with that of another"),
        ([["w"], [0]], "both text and numbers"),
    ],
)
def test_paths_that_make_no_tree_are_refused(paths, sentence):
    with pytest.raises(ValueError, match=sentence):
        trees.tree("start", paths, dict.fromkeys(trees.names("start", paths)))


@pytest.mark.parametrize(
    "held, sentence",
    [
        ({"end": [["w"]]}, "what it holds is not known"),
        ({"start": []}, "not lists of paths"),
        ({"start": [["w"] * 33]}, "at most 32 keys"),
        ({"start": [[True]]}, "neither text nor integers"),
    ],
)
def test_a_header_that_holds_other_than_paths_is_refused(held, sentence):
    with pytest.raises(ValueError, match=sentence):
        trees.declared({trees.HELD: held}, ("start", "loss"))


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
    "no rules": (lambda h: None, lambda a: a["optimizer"].pop("rules")),
    "rules are a list": (lambda h: None, lambda a: a["optimizer"].update(rules=[1])),
    "rules are text": (lambda h: None, lambda a: a["optimizer"].update(rules={"lstm": "1"})),
    "no settings": (lambda h: None, lambda a: a["optimizer"].pop("settings")),
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
    "large side": (lambda h: None, setting(matrix_size=1 << 15)),
    "many keys": (lambda h: None, setting(inputs=dict.fromkeys(map(str, range(1000))))),
    "a key twice": (lambda h: h["__metadata__"].update(l2l='{"a": 1, "a": 2}'), None),
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
    said = r"is not a complete export|holds weights of the optimizer '(os:system|x.py:f)'"
    with pytest.raises(ValueError, match=rf"mine\.safetensors ({said})") as error:
        exports.read(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_disk_that_fails_is_not_taken_for_a_damaged_export(path, monkeypatch):
    def fails(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(exports, "_whole", fails)
    with pytest.raises(UserError, match=r"mine\.safetensors: Input/output error.*disk may be"):
        exports.read(path)


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


def test_numbers_that_are_not_finite_are_refused(path, theta, monkeypatch):
    before = path.read_bytes()
    broken = {**theta, "log_learning_rate": jnp.float32(jnp.nan)}
    with pytest.raises(UserError, match="numbers in log_learning_rate that are not finite: export"):
        exports.export(path, SPECIFICATION, broken)
    assert path.read_bytes() == before
    with monkeypatch.context() as patch:
        patch.setattr(exports, "_finite", lambda x: True)
        exports.export(path, SPECIFICATION, broken)
    with pytest.raises(UserError, match=r"not a complete export .* not all .* are finite"):
        exports.read(path)


def test_what_could_not_be_read_back_is_not_written(path, theta):
    """Whatever the reason: here one that nothing else looks for."""
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"cannot be read back .* the same key twice\. Mend"):
        exports.export(path, SPECIFICATION, theta, {1: "one", "1": "another"})
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


NESTED = {"name": "by_parameter", "parts": {"a": {"name": "lstm"}}, "labels": (("*", "a"),)}
LEGITIMATE = {
    "a long warm-up": {"name": "per_tensor", "warm_up": 5000.0},
    "large blocks": {"name": "per_tensor", "block_size": 8192},
    "large matrices": {"name": "lstm", "matrix_size": 8192},
    "a rate for each of many": {"name": "sgd", "tensors": tuple(f"layer_{i}/w" for i in range(70))},
    "no theta": {"name": "sgd"},
    "no theta, with a rule": {"name": "adam"},
    "a schedule": {"name": "learned_adamw", "knots": 3},
    "many patterns": {**NESTED, "labels": tuple((f"layer_{i}/*", "a") for i in range(70))},
    "parts of parts": {**NESTED, "parts": {"a": NESTED}},
}


@pytest.mark.parametrize("section", LEGITIMATE.values(), ids=LEGITIMATE)
def test_every_legitimate_optimizer_comes_back(tmp_path, section):
    theta = registry.optimizer(section).init(jax.random.key(0))
    path = exports.export(tmp_path / "x.safetensors", section, theta)
    jax.tree.map(np.testing.assert_array_equal, exports.read(path)[1], theta)
    loading.load(path)


@pytest.mark.parametrize(
    "section, sentence",
    [
        ({"name": "per_tensor", "block_size": 10**6}, "1000000 is more than 16384"),
        ({"name": "per_tensor", "decays": (0.9,) * 65}, "65 numbers in a setting are more than 64"),
    ],
)
def test_settings_that_would_be_refused_are_not_written(tmp_path, section, sentence):
    theta = registry.optimizer(section).init(jax.random.key(0))
    with pytest.raises(UserError, match=f"'per_tensor' .* cannot be exported: {sentence}"):
        exports.export(tmp_path / "x.safetensors", section, theta)
    assert not list(tmp_path.iterdir())


def test_layers_must_have_tensors_in_whatever_parts():
    """One part with a layer for each tensor is possible, two are not."""
    part = {"name": "dm", "layers": 40}
    export_header.plausible({"parts": {"a": part}}, 40)
    with pytest.raises(ValueError, match="80 layers are too many for 40 tensors"):
        export_header.plausible({"parts": {"a": part, "b": part}}, 40)


def test_an_export_made_under_x64_is_read_without(tmp_path):
    section = {"name": "learned_adamw", "knots": 3}
    with jax.enable_x64(True):
        theta = registry.optimizer(section).init(jax.random.key(0))
        path = exports.export(tmp_path / "x.safetensors", section, theta)
    assert exports.read(path)[1]["schedule"].shape == (3,)


def test_a_write_that_fails_leaves_what_was(path, monkeypatch):
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match="No space"):
        files.write(path, b"other")
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize("given", [None, 5, b"lstm", ["lstm"]], ids=str)
@pytest.mark.parametrize("read", [loading.load, loading.start])
def test_what_is_no_name_and_no_path_is_one_sentence(read, given):
    with pytest.raises(UserError, match=rf"^A {type(given).__name__} is neither [^\n]*lstm[^\n]*$"):
        read(given)
