"""The rule of whole tensors: what it is untrained, its bounds, and that it can learn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from l2l import tasks
from l2l.core import base
from l2l.core.unroll import Inner
from l2l.estimators.autodiff import truncated
from l2l.estimators.first_order import first_order
from l2l.estimators.objective import Objective
from l2l.optimizers import soap, soap_directions
from l2l.optimizers.per_tensor import RAMP, per_tensor
from l2l.optimizers.per_tensor_evidence import FAST, FEATURES, SLOW, Plain
from l2l.optimizers.per_tensor_numbers import ANNEALED, Numbers
from l2l.training import meta_step

# What a tensor's coefficients are made of, where there is one direction.
ROWS = (*FEATURES, *Plain._fields, "length")
PARAMS = {
    "w": jnp.linspace(-1.0, 1.0, 30).reshape(6, 5),
    "k": jnp.linspace(-0.5, 0.5, 24).reshape(2, 3, 4),
    "b": jnp.full((5,), 0.1),
}


def noisy(params, i):
    keys = [jax.random.fold_in(jax.random.key(i), n) for n in range(len(params))]
    return {
        name: jnp.sin(x) + 0.5 * jax.random.normal(key, x.shape)
        for key, (name, x) in zip(keys, params.items(), strict=True)
    }


def run(transform, steps, **told):
    params, state = PARAMS, transform.init(PARAMS)
    out = []
    for i in range(steps):
        updates, state = transform.update(noisy(params, i), state, params, **told)
        params = optax.apply_updates(params, updates)
        out.append(updates)
    return out


# What is left is SOAP at one rate.
PLAIN = dict(
    weight_decay=0.0,
    bound=0.0,
    size_power=0.0,
    depth_power=0.0,
    horizon_power=0.0,
    decay_fall=0.0,
    decay_noise=0.0,
    fitted_decay=0.0,
    fall_power=0.0,
    quiet=0.0,
    agreement=0.0,
    overshoot=0.0,
    second_power=0.0,
    faded=0.0,
)


@functools.cache
def rule_of(*settings):
    return per_tensor(**dict(settings))


def bound(**settings):
    """Those that differ in numbers alone share their programs; what is 0 is not in a program."""
    alike = {name: bool(x) * 1.0 if name in Numbers._fields else x for name, x in settings.items()}
    theta = per_tensor(**settings).init(jax.random.key(0))
    return rule_of(*sorted(alike.items())).bind(theta)


def test_untrained_it_is_soap_at_one_rate():
    ours = run(bound(learning_rate=0.02, **PLAIN), 5)
    directions = soap.scale_by_soap(soap_directions.Settings(average_every=5, basis_every=20))
    theirs = run(optax.with_extra_args_support(optax.chain(directions, optax.scale(-0.02))), 5)
    for mine, wanted in zip(ours, theirs, strict=True):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), mine, wanted
        )


def test_large_matrices_have_lower_rates_and_rows_of_embeddings_do_not_count():
    """(64/n)^q with n the root of rows times columns that have a basis; vectors are left alone."""
    params = {"tall": jnp.ones((128, 2)), "wide": jnp.ones((4, 256)), "v": jnp.ones(512)}
    params["table"] = jnp.ones((9000, 16))
    gradients = jax.tree.map(lambda x: 0.3 * x, params)
    steps = []
    for power in (0.0, 0.5):
        transform = bound(weight_decay=0.0, bound=0.0, size_power=power)
        steps.append(transform.update(gradients, transform.init(params), params)[0])
    factors = {n: float(steps[1][n].ravel()[0] / steps[0][n].ravel()[0]) for n in params}
    wanted = {"tall": 2.0, "wide": 2.0**0.5, "v": 1.0, "table": 2.0}
    assert factors == pytest.approx(wanted, rel=1e-3)


def test_decay_acts_where_the_step_goes_towards_zero_too():
    """Times ½^k where no horizon is known."""
    given = dict(learning_rate=0.02, bound=0.0, quiet=0.0)
    plain, decayed = (run(bound(weight_decay=x, **given), 1)[0] for x in (0.0, 2.0))
    for name, p in PARAMS.items():
        # There are two matrices, whose number leaves the rate as it is.
        rate = 0.02 * (64 / p.size**0.5) ** 0.75
        towards = jnp.clip(-plain[name] / rate * jnp.sign(p) / RAMP, 0, 1) * (p.ndim > 1)
        assert bool(jnp.any(towards == 0)) and (p.ndim == 1 or bool(jnp.any(towards == 1)))
        wanted = -rate * 2.0 * 0.5**2 * towards * p
        np.testing.assert_allclose(decayed[name] - plain[name], wanted, rtol=1e-3, atol=1e-7)


def rate_at(step, horizon, **settings):
    """The coefficient of the nominal direction where nothing is seen but the clock."""
    learned = per_tensor(**PLAIN | settings)
    theta, rows = learned.init(jax.random.key(0)), jnp.zeros((len(ROWS), 1))
    clock = jnp.int32(step), jnp.int32(horizon)
    return -float(learned.rule.propose(theta, rows, *clock, ())[0][0, 0])


@pytest.mark.parametrize("power", [0.7, 2.0])
def test_the_horizon_lowers_the_rate_as_the_cosine_does(power):
    """To a power, from 1 to what is left at the horizon and stays so after it."""
    settings = dict(learning_rate=0.03, anneal=power)
    for step in (0, 1, 3, 4, 5, 8, 20):
        left = (0.5 * (1 + np.cos(np.pi * min(step / 4, 1))) + ANNEALED) / (1 + ANNEALED)
        assert rate_at(step, 4, **settings) == pytest.approx(0.03 * left**power, rel=1e-4)
        assert rate_at(step, 0, **settings) == pytest.approx(0.03, rel=1e-5)


def test_a_warm_up_is_an_exponential():
    """1 − exp(−(t + 1)/w)."""
    for step in (0, 1, 7, 40):
        found = rate_at(step, 0, learning_rate=0.03, warm_up=5.0)
        assert found == pytest.approx(0.03 * (1 - np.exp(-(step + 1) / 5)), rel=1e-5)


def test_decay_goes_before_the_rate():
    """At t of T the part of a step that decay takes is s^k of its first, with s half a cosine."""

    def fourth_of_four(**settings):
        transform = bound(**PLAIN | {"anneal": 0.0} | settings)
        start = transform.init(PARAMS)
        last = start.accumulators.soap._replace(count=jnp.asarray(3, jnp.int32))
        state = start._replace(accumulators=start.accumulators._replace(soap=last))
        return transform.update(noisy(PARAMS, 0), state, PARAMS, num_steps=4)[0]["w"]

    plain = fourth_of_four()
    shares = [fourth_of_four(weight_decay=0.1, decay_anneal=k) - plain for k in (0.0, 2.0)]
    left = 0.5 * (1 + np.cos(0.75 * np.pi))
    acts = np.abs(shares[0]) > 1e-4
    assert acts.any()
    np.testing.assert_allclose(shares[1][acts] / shares[0][acts], left**2, rtol=0.02)


def falling(size=1e-2, **settings):
    """Eight steps [8, 6, 5] of gradients that agree in all but size, which is 1 in two of them."""
    transform = bound(**PLAIN | settings)
    state, steps = transform.init(PARAMS), []
    for i in range(8):
        scale = 1.0 if i < 2 else size
        gradients = jax.tree.map(lambda x, s=scale: s * x, noisy(PARAMS, 0))
        updates, state = transform.update(gradients, state, PARAMS)
        steps.append(updates["w"])
    return np.stack(steps)


def fallen(size=1e-2, **settings):
    """The last of them."""
    return falling(size, **settings)[-1]


# Its f: log |g| falls to log 1e-2 with decay FAST, the mean of squares is that of all steps.
FALLEN = 1e-2 ** (1 - FAST**6) / ((2 + 6 * 1e-4) / 8) ** 0.5


def test_steps_shrink_where_gradients_have_all_but_gone():
    """(1 + κ/f²)^(−½), f the rms of recent gradients over that of all so far."""
    braked, free = falling(quiet=1e-2), falling(quiet=0.0)
    factor = (1 + 1e-2 / FALLEN**2) ** -0.5
    assert factor < 0.95
    np.testing.assert_allclose(braked[7], factor * free[7], rtol=1e-3)
    np.testing.assert_allclose(braked[0], (1 + 1e-2) ** -0.5 * free[0], rtol=1e-3)


def test_rates_fall_and_decay_grows_with_gradients():
    """f^v on the rate, and f^(−z) on the decay relative to it, with f at least a tenth."""
    assert 0.1 < FALLEN < 0.3
    for size, f in {1e-2: FALLEN, 1e-4: 0.1}.items():
        plain = fallen(size)
        np.testing.assert_allclose(fallen(size, fall_power=0.5), f**0.5 * plain, rtol=1e-3)
        decayed = [fallen(size, weight_decay=0.1, decay_fall=z) - plain for z in (0.0, 0.5)]
        acts = np.abs(decayed[0]) > 1e-5
        assert acts.any()
        np.testing.assert_allclose(decayed[1][acts] / decayed[0][acts], f**-0.5, rtol=0.02)


def test_a_fall_counts_as_far_as_gradients_are_noise():
    """In steps 2 to 8 they agree with the momentum: cosines of 1, averaged from 0 on."""
    fast, slow = 1 - FAST**7, 1 - SLOW**7
    share = (1 - 3 * slow) * (1 - fast**2) ** 3
    assert 0.1 < share < 0.6
    ours = fallen(fall_power=0.5, agreement=3.0)
    np.testing.assert_allclose(ours, FALLEN ** (0.5 * share) * fallen(), rtol=1e-3)


def proposed(cosine, fall, **settings):
    """(coefficient of the nominal direction, its slope in the cosine) at its first step, where all
    gradients had this cosine with the momentum before them and have fallen to exp(fall)."""
    learned = per_tensor(**settings)
    theta = learned.init(jax.random.key(0))
    zeros = jnp.zeros((), jnp.int32)

    def coefficient(cosine):
        rows = jnp.zeros((len(ROWS), 1))
        for name in ("fast", "slow"):
            rows = rows.at[ROWS.index(f"all tensors: alignment, {name}")].set(cosine)
        rows = rows.at[ROWS.index("fall")].set(fall)
        return learned.rule.propose(theta, rows, zeros, zeros, ())[0][0, 0]

    return jax.value_and_grad(coefficient)(cosine)


def test_gradients_that_never_change_are_no_fall():
    """Cosines of 1, and by rounding of more, have no broken power; nor have those of −1."""
    settings = dict(agreement=2.5, overshoot=0.0)
    unfallen, _ = proposed(1.0, 0.0, **settings)
    for cosine in (1.0, 1.0000002, -1.0, -1.0000002):
        found, slope = proposed(cosine, -3.0, **settings)
        assert found == unfallen and jnp.isfinite(slope)
    assert proposed(0.0, -3.0, **settings)[0] != unfallen


def test_rates_fall_where_gradients_turn_against_the_momentum():
    """exp(−o · max(−g, 0)): nothing where they agree with it."""
    at = {g: proposed(g, 0.0, **PLAIN | {"overshoot": 5.0})[0] for g in (-0.3, -0.1, 0.0, 0.4)}
    for g, factor in {-0.3: np.exp(-1.5), -0.1: np.exp(-0.5), 0.4: 1.0}.items():
        np.testing.assert_allclose(at[g], factor * at[0.0], rtol=1e-5)


def test_decay_grows_where_gradients_are_noise():
    """exp(m · max(0, 1 − 3A)) on the decay relative to the rate, and nothing on the rate."""
    learned = per_tensor(decay_noise=2.0, fitted_decay=0.0, bound=0.0)
    theta, zeros = learned.init(jax.random.key(0)), jnp.zeros((), jnp.int32)

    def coefficients(steadiness):
        rows = jnp.zeros((len(ROWS), 1)).at[ROWS.index("steadiness")].set(steadiness)
        return learned.rule.propose(theta, rows, zeros, zeros, ())[0][:, 0]

    calm = coefficients(1.0)
    for steadiness, wanted in {0.0: 2.0, 0.1: 1.4, 0.3: 0.2, 0.34: 0.0}.items():
        found = coefficients(steadiness)
        np.testing.assert_allclose(found / calm, [1.0, np.exp(wanted)], rtol=1e-5)


def test_matrices_decay_where_gradients_have_fallen_in_long_runs():
    """ρ · max(0, 1 − 1000/T) · max(0, 1 − 3A) · (log φ / log 0.1)² of the nominal rate, from every
    weight: nothing where gradients have not fallen or are steady, or from vectors."""
    learned = per_tensor(**PLAIN | {"fitted_decay": 0.2, "anneal": 0.0})
    theta = learned.init(jax.random.key(0))

    def lost(fall=0.1, steadiness=0.0, vector=0.0, horizon=4000):
        """Over the weight and the nominal rate."""
        rows = jnp.zeros((len(ROWS), 1))
        for name, x in {"fall": np.log(fall), "steadiness": steadiness, "vector": vector}.items():
            rows = rows.at[ROWS.index(name)].set(x)
        clock = jnp.int32(0), jnp.int32(horizon)
        return -float(learned.rule.propose(theta, rows, *clock, ())[0][-1, 0]) / 0.03

    assert lost(fall=1.0) == lost(fall=3.0) == lost(steadiness=0.4) == lost(vector=1.0) == 0
    assert lost(horizon=0) == lost(horizon=200) == lost(horizon=1000) == 0
    assert lost() == lost(fall=0.01) == pytest.approx(0.2 * 0.75, rel=1e-4)
    assert lost(fall=0.1**0.5) == pytest.approx(0.2 * 0.75 / 4, rel=1e-4)
    assert lost(steadiness=0.1) == pytest.approx(0.2 * 0.75 * 0.7, rel=1e-4)
    assert lost(horizon=2000) == pytest.approx(0.2 / 2, rel=1e-4)


def test_both_decays_act_beside_the_step():
    """The cautious one where the nominal step goes towards zero, the other on every weight."""
    rule = per_tensor(**PLAIN | {"weight_decay": 1.0, "fitted_decay": 1.0}).rule
    seen = rule.observe(noisy(PARAMS, 0), PARAMS, rule.accumulators(PARAMS))[0]
    rows = -0.5 * jnp.eye(3)
    step, cautious, everywhere = (
        rule.combine(seen, row[:, None] * jnp.ones((1, len(PARAMS))), PARAMS) for row in rows
    )
    together = rule.combine(seen, jnp.full((3, len(PARAMS)), -0.5), PARAMS)
    for name, p in PARAMS.items():
        np.testing.assert_allclose(everywhere[name], -0.5 * p, rtol=1e-6)
        share = np.clip(np.sign(p) * -2 * step[name] / RAMP, 0, 1)
        assert 0 < share.mean() < 1
        np.testing.assert_allclose(cautious[name], share * everywhere[name], rtol=1e-4, atol=1e-7)
        whole = step[name] + cautious[name] + everywhere[name]
        np.testing.assert_allclose(together[name], whole, rtol=1e-5, atol=1e-7)


def test_steadiness_is_the_mean_size_of_the_cosines_whose_mean_is_the_alignment():
    """From 1 on: before there is evidence of noise no decay is added."""
    transform = bound()
    params, state = PARAMS, transform.init(PARAMS)
    wanted, before, signs = np.ones(len(PARAMS)), np.zeros(len(PARAMS)), set()
    for i in range(12):
        # Every third gradient points back, so that cosines of both signs occur.
        gradients = jax.tree.map(lambda x, i=i: -x if i % 3 == 2 else x, noisy(params, 0))
        updates, state = transform.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        now = np.asarray(state.accumulators.trail.alignment[0])
        cosines = (now - FAST * before) / (1 - FAST)
        wanted = FAST * wanted + (1 - FAST) * (np.abs(cosines) if i else 1.0)
        before = now
        signs |= set(np.sign(cosines.round(3)))
        np.testing.assert_allclose(state.accumulators.trail.steadiness, wanted, rtol=1e-4)
    assert signs == {-1.0, 0.0, 1.0} and (wanted > np.abs(before) + 0.1).all()


def test_a_rate_is_found_where_it_is_far_too_high():
    """A quadratic without noise: steps of a constant rate that do not fall with the gradients go to
    and fro across its minimum, and with `overshoot` they get shorter."""

    def ends(**settings):
        transform = bound(**PLAIN | {"learning_rate": 0.1, "second_power": 0.6} | settings)
        params = {"w": jnp.linspace(-1.0, 1.0, 30).reshape(6, 5)}
        state = transform.init(params)

        @jax.jit
        def step(params, state):
            updates, state = transform.update(params, state, params)
            return optax.apply_updates(params, updates), state

        losses = []
        for _ in range(200):
            params, state = step(params, state)
            losses.append(float(jnp.sum(params["w"] ** 2)))
        return np.mean(losses[-50:])

    assert ends(overshoot=5.0) < 0.01 * ends()


def test_the_second_moment_remembers_a_shrinking_part_of_a_run():
    """ν ← (1 − t^−c) ν + t^−c g²: of a vector, whose basis is its own coordinates."""
    transform = soap.scale_by_soap(soap_directions.Settings(second_power=0.6))
    params = {"v": jnp.ones(3)}
    state = transform.init(params)
    nu = np.zeros(3)
    for t in range(1, 6):
        gradient = jnp.asarray([1.0, -2.0, 0.5]) / t
        _, state = transform.update({"v": gradient}, state, params)
        nu = (1 - t**-0.6) * nu + t**-0.6 * np.square(gradient)
    np.testing.assert_allclose(jax.tree.leaves(state.nu)[0], nu, rtol=1e-5)
    assert nu[0] < np.mean([1 / t**2 for t in range(1, 6)])


def test_longer_runs_have_lower_rates():
    """(500/T)^h, with T 100 at least; nothing of it where no horizon is known."""
    transform = bound(**PLAIN | {"horizon_power": 0.4})
    first = {t: run(transform, 1, num_steps=t)[0]["w"] for t in (0, 9, 100, 500, 2000)}
    for horizon, factor in {0: 1.0, 9: 5**0.4, 100: 5**0.4, 2000: 0.25**0.4}.items():
        np.testing.assert_allclose(first[horizon], factor * first[500], rtol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1, "decay_power": 0.3}])
def test_without_a_horizon_rates_fall_as_the_run_goes_on(settings):
    """As for a horizon of 500 · max(1, t/250)^u; they stay as they are for u = 0."""
    both = PLAIN | {"horizon_power": 0.4, "decay_anneal": 0.0, "anneal": 0.0} | settings
    falls, stays = (bound(**both, assumed_power=u) for u in (2.0, 0.0))

    def after(transform, steps, horizon):
        _, state = transform.update(noisy(PARAMS, 0), transform.init(PARAMS), PARAMS)
        accumulators = state.accumulators
        accumulators = accumulators._replace(soap=accumulators.soap._replace(count=steps))
        state = state._replace(accumulators=accumulators)
        return transform.update(noisy(PARAMS, 1), state, PARAMS, num_steps=horizon)[0]["w"]

    for steps, horizon in {1: 500, 250: 500, 500: 2000, 2500: 50_000}.items():
        t = jnp.asarray(steps, jnp.int32)
        np.testing.assert_allclose(after(falls, t, None), after(stays, t, horizon), rtol=2e-4)
        np.testing.assert_array_equal(after(stays, t, 500), after(stays, t, None))


@pytest.mark.parametrize("matrices", [1, 2, 5])
def test_models_of_many_matrices_have_lower_rates(matrices):
    """(2/L)^d on every rate; vectors do not count."""
    params = {f"w{i}": jnp.ones((3, 4)) for i in range(matrices)} | {"b": jnp.ones(4)}
    gradients = jax.tree.map(lambda x: 0.3 * x, params)
    steps = []
    for power in (0.0, 0.5):
        transform = bound(**PLAIN | {"depth_power": power})
        steps.append(transform.update(gradients, transform.init(params), params)[0])
    for name, u in steps[0].items():
        np.testing.assert_allclose(steps[1][name], (2 / matrices) ** 0.5 * u, rtol=1e-4)


def test_longer_runs_have_less_decay():
    """(500/T)^j on the part of a step that decay takes."""

    def first(horizon, **settings):
        return run(bound(**PLAIN | settings), 1, num_steps=horizon)[0]["w"]

    parts = {t: first(t, weight_decay=0.1, decay_power=0.3) - first(t) for t in (9, 100, 500, 2000)}
    acts = np.abs(parts[500]) > 1e-4
    assert acts.any()
    for horizon, factor in {9: 5**0.3, 100: 5**0.3, 2000: 0.25**0.3}.items():
        np.testing.assert_allclose(parts[horizon][acts], factor * parts[500][acts], rtol=0.01)


def test_no_update_is_longer_than_its_bound():
    """A zero tensor counts as `smallest`; of the others the length is that of their numbers."""
    params = {"w": 1e-3 * PARAMS["w"], "zero": jnp.zeros((4, 3)), "big": 3.0 * PARAMS["w"]}
    transform = bound(learning_rate=1.0, weight_decay=0.0, bound=0.1, smallest=0.03)
    state = transform.init(params)
    gradients = jax.tree.map(lambda x: x + 1.0, params)
    updates, _ = transform.update(gradients, state, params)
    for name, u in updates.items():
        rms = float(jnp.sqrt(jnp.mean(jnp.square(params[name]))))
        moved = float(jnp.sqrt(jnp.mean(jnp.square(u))))
        assert 0.5 * 0.1 * max(rms, 0.03) < moved <= 0.1 * max(rms, 0.03) * 1.0001, name


def test_directions_that_the_network_subtracts_count_for_the_bound_too():
    """Σⱼ |cⱼ| · lengthⱼ, which bounds the length of Σⱼ cⱼ dⱼ, is what is bounded."""
    settings = PLAIN | {"learning_rate": 9.0, "bound": 0.1, "mixture": True}
    learned = per_tensor(hidden_size=2, decays=(0.9, 0.99), **settings)
    theta, zero = learned.init(jax.random.key(0)), jnp.zeros((), jnp.int32)
    hidden = learned.rule.hidden(theta, 1)
    rows = jnp.zeros((len(FEATURES) + len(Plain._fields) + 3, 1)).at[-3:, 0].set(1.0)
    for signs in ((1, 1), (-1, 1), (-1, -1)):
        theta["network"]["out"]["b"] = 1e3 * jnp.asarray([0.0, *signs])
        coefficients = learned.rule.propose(theta, rows, zero, zero, hidden)[0][:, 0]
        np.testing.assert_allclose(np.sign(coefficients), [-1, *-np.asarray(signs)])
        np.testing.assert_allclose(np.abs(coefficients).sum(), 0.1, rtol=1e-3)


def test_the_network_has_a_say_of_its_own_in_the_decay():
    learned = per_tensor(hidden_size=2, reach=0.7, fitted_decay=0.0, bound=0.0)
    theta, zero = learned.init(jax.random.key(0)), jnp.zeros((), jnp.int32)
    hidden, rows = learned.rule.hidden(theta, 1), jnp.zeros((len(ROWS), 1))

    def coefficients(*asked):
        theta["network"]["out"]["b"] = jnp.asarray(asked)
        return learned.rule.propose(theta, rows, zero, zero, hidden)[0][:, 0]

    plain, slower, freer = (coefficients(*x) for x in ((0.0, 0.0), (-1e3, 0.0), (0.0, -1e3)))
    np.testing.assert_allclose(slower / plain, [np.exp(-0.7)] * 2, rtol=1e-5)
    np.testing.assert_allclose(freer / plain, [1.0, np.exp(-0.7)], rtol=1e-5)


def test_the_network_stays_within_its_reach():
    learned = per_tensor(hidden_size=4, reach=0.7, **PLAIN)
    theta = learned.init(jax.random.key(0))
    plain = run(learned.bind(theta), 1)[0]
    for sign in (-1.0, 1.0):
        theta["network"]["out"]["b"] = jnp.full((1,), sign * 1e3)
        far = run(learned.bind(theta), 1)[0]
        factor = float(far["w"][0, 0] / plain["w"][0, 0])
        assert factor == pytest.approx(np.exp(sign * 0.7), rel=1e-4)


def test_no_feature_knows_the_scale_of_the_loss_or_the_size_of_a_tensor():
    rule = per_tensor().rule
    observe = jax.jit(rule.observe)

    def features(factor, repeat):
        params = {name: jnp.tile(x, (repeat,) + (1,) * (x.ndim - 1)) for name, x in PARAMS.items()}
        accumulators = rule.accumulators(params)
        for i in range(3):
            gradient = {
                name: factor * jnp.tile(g, (repeat,) + (1,) * (g.ndim - 1))
                for name, g in noisy(PARAMS, i).items()
            }
            _, rows, accumulators = observe(gradient, params, accumulators)
        return rows[: len(FEATURES)]

    for factor in (1e-9, 1e9):
        np.testing.assert_allclose(features(factor, 1), features(1.0, 1), atol=1e-4)
    np.testing.assert_allclose(features(1.0, 4), features(1.0, 1), atol=1e-4)


def under(factor):
    """The updates of a dozen steps, with gradients times this."""
    transform = bound()
    state, out = transform.init(PARAMS), []
    for i in range(12):
        gradient = {name: factor * g for name, g in noisy(PARAMS, i).items()}
        updates, state = transform.update(gradient, state, PARAMS, num_steps=2000)
        out.append(updates)
    return out


@pytest.mark.parametrize("power", [-30, 30])
def test_updates_do_not_depend_on_the_scale_of_the_loss(power):
    # Powers of two are not rounded.
    same = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
    jax.tree.map(same, under(2.0**power), under(1))


@pytest.mark.parametrize("factor", [1e20, 1e38, jnp.inf])
def test_gradients_whose_squares_are_infinite_do_no_harm_but_infinite_ones_are_not_hidden(factor):
    finite = all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(under(factor)))
    assert finite == (factor < jnp.inf)


def test_steps_without_a_gradient_are_no_evidence():
    """Neither that gradients have fallen nor that they point anywhere; they are no first ones."""
    rule = per_tensor().rule
    observe = jax.jit(rule.observe)

    def trail(gradients):
        accumulators = rule.accumulators(PARAMS)
        for gradient in gradients:
            _, _, accumulators = observe(gradient, PARAMS, accumulators)
        return accumulators.trail

    gradients = [noisy(PARAMS, i) for i in range(3)]
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    plain = trail(gradients)
    same = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(same, trail([zeros, zeros, *gradients, zeros]), plain)
    # Between two gradients momentum fades, and with it what the second is compared with.
    between = trail([gradients[0], zeros, *gradients[1:]])
    for name in ("seen", "log_gradient", "mean_square"):
        same(getattr(between, name), getattr(plain, name))


def test_tensors_that_never_have_a_gradient_do_not_change_what_others_do():
    frozen = {"f": jnp.ones((7, 9)), "g": jnp.ones((50,))}
    zeros = jax.tree.map(jnp.zeros_like, frozen)
    transform = bound()
    state, other = transform.init(PARAMS), transform.init(PARAMS | frozen)
    for i in range(5):
        gradient = noisy(PARAMS, i)
        ours, state = transform.update(gradient, state, PARAMS, num_steps=2000)
        theirs, other = transform.update(gradient | zeros, other, PARAMS | frozen, num_steps=2000)
        for name, update in ours.items():
            np.testing.assert_allclose(theirs[name], update, rtol=1e-4, atol=1e-6)
        assert all(not theirs[name].any() for name in frozen)


def test_what_is_seen_is_what_numpy_pools():
    """Sums of squares and of products over a matrix are the same in every basis."""
    rule, steps, params = per_tensor(second_power=0.6).rule, 6, {n: PARAMS[n] for n in "bw"}
    past, observe = rule.accumulators(params), jax.jit(rule.observe)
    sizes = np.array([x.size for x in params.values()])
    starts = [np.asarray(x, np.float64) for x in params.values()]
    m, nu, total = [0 * x for x in starts], np.zeros(2), np.zeros(2)
    along, logs = np.zeros((2, 2)), None
    slowly = np.array([[FAST], [SLOW]])
    for t in range(1, steps + 1):
        given = jax.tree.map(lambda x, t=t: x / t, noisy(params, t))
        grown = jax.tree.map(lambda x, t=t: x * 1.1 ** (t - 1), params)
        _, rows, past = observe(given, grown, past)
        g = [np.asarray(x, np.float64) for x in given.values()]
        squares = np.array([np.mean(x * x) for x in g])
        if t > 1:
            inner = [np.mean(x * y) / np.sqrt(np.mean(x * x)) for x, y in zip(m, g, strict=True)]
            along = slowly * along + (1 - slowly) * inner / np.sqrt(squares)
        m = [0.9 * x + 0.1 * y for x, y in zip(m, g, strict=True)]
        nu = (1 - t**-0.6) * nu + t**-0.6 * squares
        total += squares
        new = np.log(np.sqrt(squares))
        logs = np.stack([new, new]) if logs is None else slowly * logs + (1 - slowly) * new
    ahead = [0.9 * x / (1 - 0.9**steps) + 0.1 * y for x, y in zip(m, g, strict=True)]
    dynamic = [
        np.sqrt([np.mean(x * x) for x in ahead] / nu),
        *along,
        np.tanh(logs[0] - logs[1]),
        np.tanh(0.3 * (logs[0] - np.log(np.sqrt(total / steps)))),
    ]
    size = np.array([np.sqrt(np.mean(x * x) + 1e-6) for x in starts])
    now = np.array([np.sqrt(np.mean(x * x) * 1.21 ** (steps - 1) + 1e-6) for x in starts])
    together = [np.full(2, x @ sizes / sum(sizes)) for x in dynamic]
    wanted = [*dynamic, np.tanh(np.log(now / size)), *together]
    for name, found, truth in zip(FEATURES, rows, wanted, strict=False):
        np.testing.assert_allclose(found, truth, rtol=1e-3, atol=1e-5, err_msg=name)


def test_state_has_the_shapes_of_the_parameters_and_lies_as_they_do():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"w": P("data"), "v": P(None, "data"), "b": P()}
    shapes = {"w": (16, 4), "v": (4, 16), "b": (4,)}
    params = {
        name: jax.device_put(jnp.ones(shape), NamedSharding(mesh, specs[name]))
        for name, shape in shapes.items()
    }
    transform = bound(block_size=8)
    state = jax.jit(transform.init)(params)
    updates, after = jax.jit(transform.update)(params, state, params)
    for moments in (*state.accumulators.soap.mu, after.accumulators.soap.nu, updates):
        for name, x in moments.items():
            assert x.shape == shapes[name]
            assert x.sharding.is_equivalent_to(params[name].sharding, x.ndim), name


def test_map_params_reaches_the_moments():
    transform = bound()
    state = transform.init(PARAMS)
    ones = optax.tree.map_params(transform, jnp.ones_like, state)
    assert all(bool(jnp.all(x == 1)) for x in jax.tree.leaves(ones.accumulators.soap.nu))
    jax.tree.map(np.testing.assert_array_equal, ones.hidden, state.hidden)


@pytest.mark.parametrize("learn", ["network", "numbers", "all"])
def test_the_meta_gradient_reaches_what_is_to_be_learned(learn):
    """Through the coefficients of a step in a run that is told its length, of one in a long run and
    of a late one in a run that is told none; of two matrices, their number would not matter, nor
    one gradient's fall, nor where it points if that is ahead, nor its noise before there is
    evidence of it."""
    params = PARAMS | {"w2": PARAMS["w"]}
    learned = per_tensor(hidden_size=2, warm_up=3.0, learn=learn)
    theta = learned.init(jax.random.key(0))
    theta["network"]["out"]["w"] += 0.1
    rule = learned.rule
    past = rule.accumulators(params)
    for i in range(12):  # Smaller from the second on.
        gradient = jax.tree.map(lambda x, s=0.1 if i else 1.0: s * x, noisy(params, i))
        _, rows, past = rule.observe(gradient, params, past)
    rows = rows.at[ROWS.index("all tensors: alignment, fast")].set(-0.2)
    rows = rows.at[ROWS.index("steadiness")].set(0.1)
    hidden = rule.hidden(theta, len(params))

    def total(theta):
        clocks = ((2, 9), (2, 4000), (300, 0))
        return sum(
            jnp.sum(rule.propose(theta, rows, jnp.int32(t), jnp.int32(horizon), hidden)[0])
            for t, horizon in clocks
        )

    slopes = jax.grad(total)(theta)
    network = optax.tree.norm(slopes.pop("network"))
    assert (float(network) > 0) == (learn != "numbers")
    assert all((float(abs(x)) > 0) == (learn != "network") for x in slopes.values()), slopes


@pytest.mark.parametrize(
    "learn, sentence",
    [
        ("nothing", "no learn='nothing': choose network, numbers or all"),
        ("network", "hidden_size=0 leaves nothing to learn: set hidden_size=16"),
    ],
)
def test_what_cannot_be_learned_is_one_sentence(learn, sentence):
    with pytest.raises(ValueError, match=sentence):
        per_tensor(learn=learn)


def test_a_second_decay_of_1_leaves_the_moment_to_its_power():
    learned = per_tensor(second_decay=1.0, second_power=0.6, basis_every=np.int64(2))
    params = {"w": jnp.ones((3, 2))}
    transform = learned.bind(learned.init(jax.random.key(0)))
    updates, _ = transform.update(params, transform.init(params), params)
    assert bool(jnp.all(jnp.isfinite(updates["w"])))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(first_order, id="first"),
        pytest.param(truncated, id="plain", marks=pytest.mark.slow),
    ],
)
def test_meta_training_lowers_the_meta_loss(make):
    """From a rate ten times too small. With a broken sign it rises; with a stopped gradient nothing
    moves at all."""
    family = tasks.quadratic(dimension=6)
    learned = per_tensor(hidden_size=2, learning_rate=0.003, **PLAIN)
    inner = Inner(family, learned, 20, stagger=False)
    system = meta_step.Meta(make(inner, Objective("train", "log")), learned, optax.adam(0.1), 4)
    stage = base.Stage(jnp.asarray(20), jnp.asarray(20), jnp.asarray(0.0))

    @jax.jit
    def train(key):
        state = meta_step.meta_init(key, system, stage)
        return jax.lax.scan(lambda s, _: meta_step.meta_step(system, s, ()), state, None, 40)

    state, metrics = train(jax.random.key(0))
    first, last = (np.mean(metrics["meta_loss"][i]) for i in (slice(0, 5), slice(-5, None)))
    assert last < first - 0.5, (first, last)
    assert float(state.theta["log_rate"]) > np.log(0.003) + 0.5
