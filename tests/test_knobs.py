"""The knobs of `l2l.load`: how long, how often, how fast, and how much decay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import l2l
from l2l.optimizers import registry
from l2l.optimizers.binding import repeated_decay
from l2l.optimizers.per_tensor import per_tensor
from l2l.storage import exports, loading

PARAMS = {
    "w": jnp.linspace(-1.0, 1.0, 30).reshape(6, 5),
    "k": jnp.linspace(-0.5, 0.5, 24).reshape(2, 3, 4),
    "b": jnp.full((5,), 0.1),
}


def run(transform, steps, **told):
    """The updates of each step, for gradients that are functions of the parameters."""
    params, state = PARAMS, transform.init(PARAMS)
    out = []
    for i in range(steps):
        gradient = jax.tree.map(lambda x, i=i: jnp.sin(x + i), params)
        updates, state = transform.update(gradient, state, params, **told)
        params = optax.apply_updates(params, updates)
        out.append(updates)
    return out


@pytest.fixture
def exported(tmp_path):
    learned = per_tensor(hidden_size=2)
    path = tmp_path / "rule.safetensors"
    settings = {"name": "per_tensor", "hidden_size": 2}
    exports.export(path, settings, learned.init(jax.random.key(0)))
    return path


def test_knobs(exported):
    plain = run(l2l.load(exported, num_steps=9), 1)[0]
    half = run(l2l.load(exported, num_steps=9, learning_rate=0.5), 1)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b / 2, rtol=1e-6), half, plain)
    scheduled = l2l.load(exported, learning_rate=optax.linear_schedule(0.0, 1.0, 2))
    assert all(bool(jnp.all(x == 0)) for x in jax.tree.leaves(run(scheduled, 1)[0]))
    decayed = run(
        l2l.load(exported, num_steps=9, weight_decay=0.1, mask={"w": True, "k": False, "b": False}),
        1,
    )[0]
    # The nominal rate, in a run as short as that of the shortest horizon that counts, 100 steps.
    rate = np.exp(exports.read(exported)[1]["log_rate"]) * (500 / 100) ** 0.4
    np.testing.assert_allclose(
        decayed["w"] - plain["w"], -0.1 * rate * PARAMS["w"], rtol=1e-3, atol=1e-7
    )
    np.testing.assert_array_equal(decayed["k"], plain["k"])


@pytest.mark.parametrize(
    "knobs",
    [
        {"learning_rate": -1.0},
        {"weight_decay": float("nan")},
        {"learning_rate": "fast"},
        {"learning_rate": np.array(-1.0)},
        {"learning_rate": np.ones(3)},
        {"learning_rate": jnp.ones(3)},
        {"learning_rate": jnp.ones((), bool)},
        {"weight_decay": jnp.zeros((2, 2))},
    ],
    ids=str,
)
def test_a_knob_out_of_range_is_one_sentence(exported, knobs):
    with pytest.raises(l2l.UserError, match=next(iter(knobs)) + r"=[^\n]*positive number\.$"):
        l2l.load(exported, **knobs)


@pytest.mark.parametrize("kind", [np.array, np.float32, jnp.float32], ids=str)
@pytest.mark.parametrize("name, value", [("learning_rate", 0.5), ("weight_decay", 0.5)])
def test_a_knob_may_be_a_number_of_any_type(exported, name, value, kind):
    ours, wanted = (
        run(l2l.load(exported, num_steps=9, **{name: x}), 2) for x in (kind(value), value)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), ours, wanted)


def test_decay_is_times_the_rate_that_a_rule_anneals():
    """`weight_decay` takes the rule's own nominal rate, which `lstm` anneals."""
    plain, decayed = (run(l2l.load("lstm", num_steps=9, weight_decay=x), 1)[0] for x in (0.0, 0.5))
    optimizer, theta, _ = exports.read(loading.locate("lstm"))
    rate = float(optimizer.rule.rate(theta, jnp.int32(0), jnp.int32(9)))
    np.testing.assert_allclose(
        decayed["w"] - plain["w"], -0.5 * rate * PARAMS["w"], rtol=1e-3, atol=1e-7
    )


def test_epochs_set_the_decay(exported):
    """None to speak of for data that are seen once, and from twenty times on all there is:
    0.3 · min(1, epochs/20)^1.5, which is 0.3/8 for five."""
    parts = [repeated_decay(x) for x in (0.8, 5, 20, 1000)]
    np.testing.assert_allclose(parts, [0.3 / 125, 0.3 / 8, 0.3, 0.3])
    told, decayed = (
        run(l2l.load(exported, num_steps=9, **knob), 2)
        for knob in ({"epochs": 5}, {"weight_decay": repeated_decay(5)})
    )
    jax.tree.map(np.testing.assert_array_equal, told, decayed)


@pytest.mark.parametrize("kind", [np.array, np.float32, np.int64, jnp.float32, jnp.int32], ids=str)
def test_epochs_of_any_type_are_that_number(kind):
    np.testing.assert_allclose(repeated_decay(kind(7)), 0.3 * (7 / 20) ** 1.5, rtol=1e-6)
    np.testing.assert_allclose(repeated_decay(kind(70)), 0.3, rtol=1e-6)


def test_knobs_may_be_injected(exported):
    """All of them: what is left out must not turn into an array that is taken for given."""
    told = dict(epochs=7, num_steps=9, learning_rate=0.5)
    ours, wanted = (
        run(load(exported, **told), 2) for load in (optax.inject_hyperparams(l2l.load), l2l.load)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), ours, wanted)
    scheduled = optax.inject_hyperparams(l2l.load)("lstm", weight_decay=lambda step: 1.0 * step)
    now = run(scheduled, 2)
    then = run(l2l.load("lstm"), 2)
    np.testing.assert_allclose(now[0]["w"], then[0]["w"], rtol=1e-5)
    assert not np.allclose(now[1]["w"], then[1]["w"], rtol=1e-2)


@pytest.mark.parametrize(
    "epochs",
    [0, -1.0, float("inf"), float("nan"), True, "many", np.array(-1), jnp.ones(2)],
    ids=str,
)
def test_epochs_that_are_no_number(epochs):
    with pytest.raises(l2l.UserError, match="over the number of training examples"):
        l2l.load("lstm", epochs=epochs)


@pytest.mark.parametrize(
    "knobs, said",
    [
        ({"epochs": 3, "weight_decay": 0.1}, "give one of them"),
        ({"epochs": 3, "weight_decay": 0}, "give one of them"),
        ({"mask": {"w": True, "k": False, "b": False}}, "mask says where weight_decay applies"),
    ],
)
def test_knobs_that_do_not_go_together(knobs, said):
    with pytest.raises(l2l.UserError, match=said):
        l2l.load("lstm", **knobs)


def test_a_rule_without_state_for_each_coordinate_keeps_none_in_half_precision(exported):
    with pytest.raises(l2l.UserError, match="no recurrent state for each coordinate to keep"):
        l2l.load(exported, state_dtype=jnp.bfloat16)


MASKS = {
    "too little": ({"w": True, "k": False}, r"nothing of \['b'\]"),
    "too much": ({"w": True, "k": False, "b": {"c": True}}, r"\['b'\]"),
    "another": (
        {"w": True, "k": False, "b": True, "c": True},
        r"it has \['c'\], and params has not",
    ),
    "another kind": ((True, False, True), r"nothing of \['b'\]"),
    "a function": (lambda params: {"w": True}, r"nothing of \['b'\]"),
}


@pytest.mark.parametrize("make", [l2l.load, l2l.soap])
@pytest.mark.parametrize("mask, said", MASKS.values(), ids=MASKS)
def test_a_mask_that_does_not_fit_is_one_sentence(exported, make, mask, said):
    first = exported if make is l2l.load else 0.1
    transform = make(first, weight_decay=0.1, mask=mask)
    with pytest.raises(l2l.UserError, match=rf"^The mask does not fit [^\n]*{said}[^\n]*\.$"):
        transform.init(PARAMS)


def test_a_mask_may_be_shorter_than_the_parameters(exported):
    """As in `optax.masked`: one entry for a whole subtree."""
    params = {"in": PARAMS, "out": PARAMS}
    transform = l2l.load(exported, weight_decay=0.5, mask={"in": True, "out": False})
    updates, _ = transform.update(params, transform.init(params), params)
    assert not np.allclose(updates["in"]["w"], updates["out"]["w"], rtol=1e-3)


@pytest.mark.parametrize("name", ["lstm", "mlp"])
def test_a_run_beyond_its_end_stands_still_until_it_is_told_of_more_steps(name):
    """The state holds no horizon."""
    short = l2l.load(name, num_steps=100)
    params = {"w": PARAMS["w"]}

    def step(state, key):
        gradient = {"w": jax.random.normal(key, (6, 5))}
        updates, state = short.update(gradient, state, params)
        return state, optax.tree.norm(updates)

    keys = jax.random.split(jax.random.key(0), 150)
    state, norms = jax.jit(lambda: jax.lax.scan(step, short.init(params), keys))()
    assert float(jnp.max(norms[100:])) < 0.03 * float(norms[0])
    told, _ = short.update(params, state, params, num_steps=1000)
    anew, _ = l2l.load(name, num_steps=1000).update(params, state, params)
    np.testing.assert_array_equal(told["w"], anew["w"])
    assert float(optax.tree.norm(told)) > 0.1 * float(norms[0])


def test_epochs_decay_biases_too_unless_the_mask_leaves_them_out(exported):
    """0.3 times the nominal rate, from twenty epochs on."""
    plain, decayed, masked = (
        run(l2l.load(exported, num_steps=9, **knobs), 1)[0]
        for knobs in (
            {},
            {"epochs": 50},
            {"epochs": 50, "mask": {"w": True, "k": True, "b": False}},
        )
    )
    rate = np.exp(exports.read(exported)[1]["log_rate"]) * (500 / 100) ** 0.4
    for name, x in PARAMS.items():
        np.testing.assert_allclose(
            decayed[name] - plain[name], -0.3 * rate * x, rtol=1e-3, atol=1e-6
        )
    np.testing.assert_array_equal(masked["b"], plain["b"])
    np.testing.assert_array_equal(masked["w"], decayed["w"])


def test_a_horizon_of_none_is_none_given():
    """A generic loop may pass `num_steps=None` on."""
    transform = l2l.load("lstm", num_steps=9)
    given, left_out = run(transform, 3, num_steps=None), run(transform, 3)
    jax.tree.map(np.testing.assert_array_equal, given, left_out)
    other = run(transform, 3, num_steps=500)
    assert any(bool(jnp.any(a["w"] != b["w"])) for a, b in zip(other, left_out, strict=True))


@pytest.mark.parametrize(
    "factor", [0.5, np.float32(0.5), np.array(0.5), jnp.float32(0.5)], ids=type
)
def test_a_factor_of_any_type_keeps_half_precision(factor):
    params = {"w": jnp.ones((4, 3), jnp.bfloat16)}
    transform = l2l.load("lstm", learning_rate=factor)
    updates, _ = transform.update(params, transform.init(params), params)
    assert updates["w"].dtype == jnp.bfloat16


def exported_as(path, name, **settings):
    settings = {"name": name, **settings}
    learned = registry.optimizer(settings)
    exports.export(path, settings, learned.init(jax.random.key(0)))
    return path


@pytest.mark.parametrize(
    "name, settings, rate",
    [
        ("adam", {"learning_rate": 1e-4, "learned": True}, 1e-4),
        ("dm", {"scale": 1e-3}, 1e-3),
        ("rnnprop", {"scale": 0.3}, 0.3),
    ],
)
def test_decay_is_times_the_optimizers_own_rate(tmp_path, name, settings, rate):
    path = exported_as(tmp_path / "rule.safetensors", name, **settings)
    plain, decayed = (run(l2l.load(path, weight_decay=x), 1)[0]["w"] for x in (0.0, 0.5))
    np.testing.assert_allclose(decayed - plain, -0.5 * rate * PARAMS["w"], atol=1e-7)


def test_decay_without_a_rate_is_refused(tmp_path):
    """Better than the rate of some other optimizer."""
    path = exported_as(tmp_path / "rule.safetensors", "learned_adam")
    with pytest.raises(l2l.UserError, match="this one has none"):
        l2l.load(path, weight_decay=0.1)
