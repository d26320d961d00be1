"""The guard: invisible round what is fine, Adam round what is not, and exactly Adam in the end."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2l.console.errors import UserError
from l2l.optimizers.guard import guard
from l2l.optimizers.lstm import lstm

START = {"x": jnp.asarray([3.0, -2.0, 1.0, 0.3])}
CURVATURE = jnp.asarray([1.0, 3.0, 10.0, 0.3])
RATE = 3e-2


def loss(params):
    return 0.5 * jnp.sum(CURVATURE * params["x"] ** 2)


def acting(act):
    """An optimizer whose update is act(gradient, step)."""

    def update(updates, state, params=None, **extra):
        del params, extra
        return jax.tree.map(lambda g: act(g, state), updates), state + 1

    return optax.GradientTransformationExtraArgs(lambda params: jnp.zeros((), jnp.int32), update)


def leap(gradient, step):
    return 1e4 * jax.random.normal(jax.random.fold_in(jax.random.key(5), step), gradient.shape)


MALICIOUS = {
    "huge random steps": leap,
    "overflowing": lambda g, step: jnp.full_like(g, 3e38),
    "NaN": lambda g, step: jnp.full_like(g, jnp.nan),
    "NaN from its tenth step": lambda g, step: jnp.where(step < 10, -0.01 * g, jnp.nan),
    "ascent": lambda g, step: 0.01 * g,
    "drift": lambda g, step: jnp.full_like(g, 0.02),
}


def train(transform, num, loss=loss, start=START, told=True, noise=0.0):
    """(parameters, state, losses, all states but the moments), of `num` steps."""

    def step(carry, key):
        params, state = carry
        value, gradients = jax.value_and_grad(loss)(params)
        value += noise * jax.random.normal(key)
        extra = {"value": value} if told else {}
        updates, state = transform.update(gradients, state, params, **extra)
        seen = state._replace(adam=(), learned=()) if hasattr(state, "falls") else ()
        return (optax.apply_updates(params, updates), state), (params, value, seen)

    @jax.jit
    def run(params):
        keys = jax.random.split(jax.random.key(0), num)
        return jax.lax.scan(step, (params, transform.init(params)), keys)

    (params, state), (path, losses, seen) = run(start)
    return params, state, path, losses, seen


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def learned():
    optimizer = lstm(hidden_size=3, learning_rate=RATE)
    theta = jax.tree.map(lambda x: x + 0.02, optimizer.init(jax.random.key(0)))
    return optimizer.bind(theta)


def network_loss(params):
    inputs = jnp.linspace(-1.0, 1.0, 16)[:, None]
    return jnp.mean((jnp.tanh(inputs @ params["a"]) @ params["b"] - jnp.sin(3 * inputs)) ** 2)


NETWORK = {"a": jnp.linspace(-2.0, 2.0, 8)[None], "b": jnp.cos(jnp.arange(8.0))[:, None] / 3}


def walk(transform, problem, start, told):
    """(parameters after every step [150, …], losses, state), each part a program of its own: in one
    program the compiler would round p + u differently where it can see how u was made."""
    gradient = jax.jit(jax.value_and_grad(problem))
    update = jax.jit(lambda g, s, p, v: transform.update(g, s, p, **({"value": v} if told else {})))
    params, state = start, transform.init(start)
    path, losses = [], []
    for _ in range(150):
        value, gradients = gradient(params)
        updates, state = update(gradients, state, params, value)
        params = optax.apply_updates(params, updates)
        path.append(params)
        losses.append(float(value))
    return path, losses, state


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("problem, start", [(loss, START), (network_loss, NETWORK)])
def test_round_what_is_fine_it_is_invisible(problem, start, told):
    path, losses, _ = walk(learned(), problem, start, told)
    guarded, _, state = walk(guard(learned()), problem, start, told)
    assert losses[-1] < 0.2 * losses[0]
    # Equal, but for what the compiler rounds otherwise where more is computed around it.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), guarded, path)
    assert int(state.falls) == 0


@pytest.mark.parametrize("noise", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("rate", [1e-3, 0.3])
def test_adam_never_falls(rate, noise):
    """Whatever the noise of the losses, the last thousand at the bottom included."""
    state = train(guard(optax.adam(rate), adam=optax.adam(1e-2)), 2000, noise=noise)[1]
    assert int(state.falls) == 0


WARM_UP = optax.linear_schedule(0.0, RATE, 100)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("rate", [WARM_UP, 1e-6])
def test_an_adam_of_short_steps_makes_no_strikes(rate, told):
    """One that warms up from 0, or has hardly a rate: the learned steps are no longer for that."""
    seen = train(guard(learned(), adam=optax.adam(rate)), 150, told=told)[4]
    assert not seen.strikes.any() and not seen.falls.any()


def test_after_a_fall_the_warm_up_makes_no_strikes_either():
    """The schedule starts anew with each fall: at the second chance it is at 5 of 10,000 steps."""
    once = acting(lambda g, step: jnp.where(step < 4, jnp.nan, -0.02 * g))
    # Its next first four steps come while Adam steps after the fall, and are not taken.
    slow = optax.linear_schedule(0.0, RATE, 10_000)
    seen = train(guard(once, adam=optax.adam(slow), patience=4, period=5), 150)[4]
    assert int(seen.falls[-1]) == 1 and not seen.strikes[10:].any()


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("name", ["huge random steps", "overflowing", "NaN"])
def test_a_warm_up_hides_no_explosion(name, told):
    """Every step of theirs strikes from the first on, while Adam's are still short."""
    options = dict(adam=optax.adam(WARM_UP), patience=4, period=5)
    _, _, path, losses, seen = train(guard(acting(MALICIOUS[name]), **options), 120, told=told)
    falls = np.flatnonzero(np.diff(seen.falls, prepend=0))
    np.testing.assert_array_equal(falls[:3], [4, 15, 31])
    assert np.all(np.isfinite(path["x"])) and float(losses.max()) < 1.01 * float(losses[0])


def test_long_steps_of_a_tiny_network_make_no_strikes():
    """Those of `lstm` are up to 4 long in a 1-2-2-1 network, 1,100 times those of adam(1e-3)."""
    transform = guard(acting(lambda g, step: jnp.where(step == 30, 1.5, -0.02 * g)))
    seen = train(transform, 60, told=False)[4]
    assert not seen.strikes.any()


@pytest.mark.parametrize("name", MALICIOUS)
def test_the_malicious_end_as_adam(name):
    """After its three falls the run is that of a fresh Adam, which on a convex problem ends low.

    A stretch of the learned optimizer lasts `patience` strikes, at the least; with Adam's 30, 60
    between, and two steps of going back, all is over long before 700."""
    adam = optax.adam(RATE)
    options = dict(adam=adam, period=30, max_falls=3, patience=10)
    params, state, path, losses, seen = train(guard(acting(MALICIOUS[name]), **options), 1300)
    assert int(state.falls) == 3
    assert float(loss(params)) < 1e-3 * float(losses[0])
    assert np.all(np.isfinite(path["x"]))
    # Ascent multiplies the loss by 1.21 a step, and some 25 pass before the limit is.
    assert float(losses.max()) < 100 * float(losses[0])
    # The call that falls, and the one after it, go back; from there on a fresh Adam.
    last = int(np.argmax(seen.falls == 3)) + 2
    assert last < 700
    place = {"x": path["x"][last]}
    equal(train(adam, 1300 - last, start=place)[2], {"x": path["x"][last:]})
    equal(place["x"], seen.anchor["x"][last - 2])


def test_each_rest_is_twice_the_last():
    """Whose every step fails strikes at every step; the call after its fourth strike falls, that
    and the next go back, and Adam steps 5, 10, 20 times between."""
    options = dict(patience=4, period=5, max_falls=4)
    seen = train(guard(acting(MALICIOUS["NaN"]), **options), 120)[4]
    falls = np.flatnonzero(np.diff(seen.falls, prepend=0))
    chance = 4  # Calls that strike.
    np.testing.assert_array_equal(np.diff(falls), [2 + rest + chance for rest in (5, 10, 20)])
    assert falls[0] == chance


@pytest.mark.parametrize("name", ["huge random steps", "overflowing", "NaN"])
def test_without_losses(name):
    options = dict(adam=optax.adam(RATE), patience=10, period=30, max_falls=3)
    params, state, path, losses, _ = train(
        guard(acting(MALICIOUS[name]), **options), 1000, told=False
    )
    assert int(state.falls) == 3
    assert np.all(np.isfinite(path["x"]))
    assert float(loss(params)) < 1e-3 * float(losses[0])


def test_standing_still_is_not_seen():
    """The stated weakness; but no harm is done either."""
    params, state, *_ = train(guard(acting(lambda g, step: jnp.zeros_like(g))), 100)
    equal(params, START)
    assert int(state.falls) == 0


def test_the_way_back_is_exact_from_afar():
    """One addition cannot restore 0.1 from 1e10; the second can."""
    anchor = {"x": jnp.asarray([0.1, -3e-7, 5.0, 600.3])}
    far = {"x": jnp.asarray([1e10, 7.0, 5.000001, 1e10])}
    transform = guard(optax.sgd(0.1), patience=1)
    state = transform.init(anchor)
    state = transform.update({"x": jnp.ones(4)}, state, anchor)[1]
    calls = 0
    while not calls or state.returning:
        gradients = {"x": jnp.full(4, jnp.nan if not calls else 1.0)}
        updates, state = transform.update(gradients, state, far)
        far, calls = optax.apply_updates(far, updates), calls + 1
        assert calls < 3
    updates, state = transform.update({"x": jnp.ones(4)}, state, far)
    equal(far, anchor)
    assert int(state.falls) == 1
    np.testing.assert_allclose(updates["x"], -1e-3, rtol=1e-5)  # Adam's first step.


def test_single_bad_gradients_and_losses_are_passed_over():
    """They enter no state: the run is that without them, and nobody falls."""
    transform = guard(optax.adam(RATE), adam=optax.adam(RATE))
    plain = optax.adam(RATE)

    @jax.jit
    def step(params, state, broken):
        value, gradients = jax.value_and_grad(loss)(params)
        gradients = jax.tree.map(lambda g: jnp.where(broken, jnp.nan, g), gradients)
        value = jnp.where(broken, jnp.inf, value)
        updates, state = transform.update(gradients, state, params, value=value)
        return optax.apply_updates(params, updates), state

    params, state = START, transform.init(START)
    for i in range(60):
        params, state = step(params, state, i % 7 == 3)
    without = train(plain, 60 - 9, start=START)[0]
    # Two programs, which may round differently; one step more or less is over 1e-2 of each.
    np.testing.assert_allclose(params["x"], without["x"], rtol=1e-4)
    assert int(state.falls) == 0


def test_many_at_once_each_fall_by_themselves():
    """vmap: a good one and a bad one, each as if alone."""
    kinds = jnp.asarray([-0.01, 0.01])

    def run(sign):
        transform = guard(acting(lambda g, step: sign * g), adam=optax.adam(RATE), max_falls=2)

        def step(carry, _):
            params, state = carry
            value, gradients = jax.value_and_grad(loss)(params)
            updates, state = transform.update(gradients, state, params, value=value)
            return (optax.apply_updates(params, updates), state), None

        carry, _ = jax.lax.scan(step, (START, transform.init(START)), None, 300)
        return carry[0], carry[1].falls

    together, falls = jax.jit(jax.vmap(run))(kinds)
    for i, sign in enumerate(kinds):
        alone, count = jax.jit(run)(sign)
        assert int(count) == int(falls[i]) == (0 if i == 0 else 2)
        np.testing.assert_allclose(alone["x"], together["x"][i], rtol=1e-5, atol=1e-7)


def test_donated_state_and_a_chain():
    transform = optax.chain(
        optax.clip_by_global_norm(1.0), guard(acting(MALICIOUS["drift"]), max_falls=1)
    )

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = transform.update(gradients, state, params, value=value)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.array, START)
    state = transform.init(params)
    for _ in range(300):
        params, state = step(params, state)
    assert int(optax.tree.get(state, "falls")) == 1


def test_inject_hyperparams():
    def guarded(rate):
        return guard(acting(MALICIOUS["NaN"]), adam=optax.adam(rate))

    transform = optax.inject_hyperparams(guarded)(rate=RATE)
    updates, _ = transform.update({"x": jnp.ones(4)}, transform.init(START), START)
    np.testing.assert_allclose(updates["x"], -RATE, rtol=1e-5)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"optimizer": "mlp"}, r"optimizer=mlp is a str, not an optax .* l2l.load"),
        ({"optimizer": lstm()}, "not bound to a theta: call its bind"),
        ({"adam": 1e-3}, r"adam=0.001 is a float, .* optax.adam\(1e-3\)"),
        ({"longest_step": 0.0}, "longest_step=0.0 is out of range"),
        ({"deviations": float("inf")}, "deviations=inf is out of range"),
        ({"share": -1}, "share=-1 is out of range"),
        ({"patience": 0}, "patience=0 is not a whole number of 1 or more"),
        ({"window": 2.5}, "window=2.5 is not a whole number of 1 or more"),
        ({"share": "1"}, "share='1' is not a number"),
        ({"patience": True}, "patience=True is not a whole number of 1 or more"),
        ({"max_falls": 40}, "more than an int32 can hold: lower one of them"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        guard(**{"optimizer": optax.sgd(0.1), **options})


def test_options_may_be_numbers_of_numpy():
    guard(optax.sgd(0.1), window=np.int64(20), longest_step=np.float32(10))


@pytest.mark.parametrize(
    "value, words",
    [
        (jnp.ones(3), r"shape \(3,\), and a loss is one number"),
        ("a", "value is a str, and a loss is one real number"),
        ([1.0], "value is a list, and"),
        (True, "value is a bool, and"),
        (1 + 1j, "value is a complex, and"),
        (jnp.asarray(1j), "value is complex64, and"),
    ],
)
def test_a_loss_is_one_number(value, words):
    transform = guard(optax.sgd(0.1))
    with pytest.raises(UserError, match=words):
        transform.update(START, transform.init(START), START, value=value)


@pytest.mark.parametrize("value", [1, 1.0, np.float64(1), np.ones(()), jnp.ones((), jnp.bfloat16)])
def test_losses(value):
    transform = guard(optax.sgd(0.1))
    state = transform.update(START, transform.init(START), START, value=value)[1]
    assert float(state.losses.first) == 1 and state.losses.first.dtype == jnp.float32


def test_a_state_of_another_optimizer_is_refused():
    transform = guard(learned())
    state = learned().init(START)
    with pytest.raises(UserError, match=r"is a LearnedState, and not that of a guarded .*`init`"):
        transform.update(START, state, START)
    for other, words in (
        (guard(optax.sgd(0.1)), "`learned` of the guarded state was not made by this `optimizer`"),
        (guard(learned(), adam=optax.sgd(0.1)), "`adam` of the .* not made by this `adam`"),
    ):
        with pytest.raises(UserError, match=words):
            transform.update(START, other.init(START), START)


def test_a_state_that_arithmetic_has_made_numbers_of():
    """`optax.contrib.sam` chooses between states by `c·a + (1 − c)·b`."""
    bare, guarded = (
        optax.contrib.sam(transform, optax.sgd(1e-2), sync_period=2)
        for transform in (optax.adam(1e-3), guard(optax.adam(1e-3)))
    )
    states = [transform.init(START) for transform in (bare, guarded)]
    for _ in range(4):
        wanted, states[0] = bare.update(START, states[0], START)
        updates, states[1] = guarded.update(START, states[1], START)
        jax.tree.map(np.testing.assert_array_equal, updates, wanted)


def test_a_run_that_has_begun_is_put_under_guard():
    """As the sentence about its state says."""
    state = learned().update(START, learned().init(START), START)[1]
    expected = learned().update(START, state, START)[0]
    transform = guard(learned())
    updates, _ = transform.update(START, transform.init(START)._replace(learned=state), START)
    np.testing.assert_allclose(updates["x"], expected["x"], rtol=1e-5)


def huge_steps(scale, params, num):
    """(parameters, state) of guarded Adam on `scale` times a square."""
    transform = guard(optax.adam(RATE), adam=optax.adam(RATE))
    state = transform.init(params)
    for _ in range(num):
        gradients = jax.tree.map(lambda p: scale * p, params)
        value = 0.5 * scale * sum(jnp.sum(p**2) for p in params.values())
        updates, state = transform.update(gradients, state, params, value=value)
        params = optax.apply_updates(params, updates)
    return params, state


def test_huge_gradients_are_finite_ones():
    """Though their squares are not. Adam stands still on them in float32, and not in float64."""
    params, state = huge_steps(1e20, START, 3)
    equal(params, START)
    np.testing.assert_allclose(state.adam[0].mu["x"], (1 - 0.9**3) * 1e20 * START["x"], rtol=1e-5)
    assert int(state.strikes) == int(state.falls) == 0
    with jax.enable_x64(True):
        start = {"x": np.asarray([3.0, -2.0, 1.0, 0.3])}
        params, state = huge_steps(1e45, start, 30)
        np.testing.assert_allclose(params["x"][:2], start["x"][:2] - [0.9, -0.9], atol=0.05)


def heard(values, **options):
    """The states after each of these losses, of an optimizer that stands still."""
    transform = guard(acting(lambda g, step: 0.0 * g), **options)

    def step(state, value):
        state = transform.update(START, state, START, value=value)[1]
        return state, state._replace(adam=(), learned=(), anchor=())

    return jax.jit(lambda x: jax.lax.scan(step, transform.init(START), x)[1])(jnp.asarray(values))


def test_the_record_of_the_first_losses_is_their_mean_and_variance():
    values = 5 + np.random.RandomState(0).standard_normal(20)
    losses = heard(values).losses
    means = np.array([values[: i + 1].mean() for i in range(20)])
    np.testing.assert_allclose(losses.mean, means, rtol=1e-5)
    variances = [values[: i + 1].var() for i in range(20)]
    np.testing.assert_allclose(losses.variance, variances, rtol=1e-4, atol=1e-6)
    best = means.min()
    limit = best + max(4 * values.std(), 0.02 * (values[0] - best))
    np.testing.assert_allclose(losses.limit[-1], limit, rtol=1e-5)


def test_the_limit_never_rises_and_no_loss_counts_for_more():
    """A sudden descent makes the variance large, and a spike the mean by a window's part."""
    values = np.concatenate([np.full(25, 10.0), np.linspace(9, 2, 20), [1e9], np.full(9, 2.0)])
    losses = heard(values + 0.01 * np.cos(np.arange(len(values)))).losses
    assert np.all(np.diff(losses.limit[19:]) <= 0) and losses.limit[-1] > 2
    before, after = losses.mean[44:46]
    np.testing.assert_allclose(after, before + (losses.limit[44] - before) / 20, rtol=1e-5)


def test_the_first_loss_is_that_of_the_whole_run():
    seen = heard(np.concatenate([[100.0], np.ones(120), np.full(60, 50.0)]), period=5)
    assert seen.falls[-1] == 1 and 0 < seen.losses.seen[-1] < 60
    assert set(seen.losses.first.tolist()) == {100.0}


def test_huge_losses_leave_the_limit_finite():
    """A rise is seen after losses whose squares overflow."""
    transform = guard(acting(lambda g, step: 0.0 * g))
    values = np.concatenate([np.linspace(3e25, 1e25, 20), np.ones(300), np.full(30, 1e17)])
    state = transform.init(START)
    update = jax.jit(transform.update)
    for value in values:
        state = update(START, state, START, value=value)[1]
    assert int(state.falls) == 1
