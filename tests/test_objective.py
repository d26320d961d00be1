"""Meta-losses against their definition, in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2l.estimators.objective import Objective, objective

LOSSES = np.array([4.0, 1.0, 0.25, 1e-9])


@pytest.mark.parametrize("emphasis", [0.0, 1.0, 2.5])
def test_windows_of_a_run_add_up_to_the_run(emphasis):
    """Cut or whole, a run has one meta-loss; a constant one has that constant's, but for the sum
    that stands for an integral."""
    steps, window = 40, 10
    losses = np.linspace(3.0, 0.1, steps)
    found = Objective(form="plain", emphasis=emphasis)

    def value(losses, start):
        weights = found.emphases(jnp.int32(start), jnp.int32(steps), len(losses))
        return float(found.value(jnp.asarray(losses), weights))

    parts = [value(losses[i : i + window], i) for i in range(0, steps, window)]
    np.testing.assert_allclose(np.mean(parts), value(losses, 0), rtol=1e-6)
    progress = np.arange(1, steps + 1) / steps
    by_hand = np.mean((1 + emphasis) * progress**emphasis * losses)
    np.testing.assert_allclose(value(losses, 0), by_hand, rtol=1e-6)
    np.testing.assert_allclose(value(np.ones(steps), 0), 1.0, atol=(1 + emphasis) / steps)


@pytest.mark.parametrize("window", [10, 40])
def test_the_validation_weight_goes_to_its_late_value_along_a_run(window):
    """Whether a run is one window or several: the last loss has the late weight."""
    steps, training = jnp.int32(40), np.linspace(3.0, 0.1, 40)
    validation = training + np.arange(40) / 20
    found = Objective("both", "plain", validation_weight=0.8, late_validation_weight=0.2)
    parts = []
    for start in range(0, 40, window):
        place, cut = (jnp.int32(start), steps, window), slice(start, start + window)
        losses = [jnp.asarray(x[cut]) for x in (training, validation)]
        weights = found.weights(*place)
        np.testing.assert_allclose(weights[0] + weights[1], np.ones(window), rtol=1e-6)
        meta_loss = found.at(*place)
        parts.append(float(meta_loss.value(*losses)))
        slopes = jax.grad(meta_loss.value, (0, 1))(*losses)
        for own, expected in zip(meta_loss.slopes(*losses), slopes, strict=True):
            np.testing.assert_allclose(own, expected, rtol=1e-6)
    weight = 0.8 - 0.6 * np.arange(1, 41) / 40
    by_hand = np.mean((1 - weight) * training + weight * validation)
    np.testing.assert_allclose(np.mean(parts), by_hand, rtol=1e-6)
    assert float(weights[1][-1]) == pytest.approx(0.2)


@pytest.mark.parametrize("on, validation", [("train", ()), ("validation", LOSSES)])
def test_what_is_not_read_has_no_slope(on, validation):
    meta_loss = Objective(on, "plain").at(jnp.int32(0), jnp.int32(4), 4)
    training, validation = jax.tree.map(jnp.asarray, (10 * LOSSES, validation))
    slopes = meta_loss.slopes(training, validation)
    quarters = np.full(4, 0.25)
    if on == "train":
        np.testing.assert_allclose(slopes[0], quarters)
        assert slopes[1] == () and meta_loss.value(training, ()) == np.mean(training)
    else:
        np.testing.assert_allclose(slopes, [0 * quarters, quarters])
        assert meta_loss.value(training, validation) == np.mean(validation)


def test_without_a_late_value_one_weight_serves_the_whole_run():
    for late in (None, 0.3):
        found = Objective("both", validation_weight=0.3, late_validation_weight=late)
        weights = found.weights(jnp.int32(20), jnp.int32(40), 10)
        assert [(x.shape, float(x)) for x in weights] == [
            ((), pytest.approx(0.7)),
            ((), pytest.approx(0.3)),
        ]


def test_last_is_the_last_loss_times_what_it_counts():
    found = Objective(form="last", emphasis=1.0)
    half = found.emphases(jnp.int32(46), jnp.int32(100), len(LOSSES))
    np.testing.assert_allclose(found.value(jnp.asarray(LOSSES), half), 2 * 0.5 * LOSSES[-1])


def test_nothing_is_gained_below_the_floor():
    found = Objective(form="log", floor=0.01)
    ones = jnp.ones(len(LOSSES))
    np.testing.assert_allclose(
        found.value(jnp.asarray(LOSSES), ones), np.mean(np.log(LOSSES + 0.01)), rtol=1e-6
    )
    pull = jax.grad(found.value)(jnp.asarray(LOSSES), ones)
    np.testing.assert_allclose(pull, 1 / (LOSSES + 0.01) / 4, rtol=1e-6)


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(emphasis=-1.0), "emphasis=-1.0 is not a weight"),
        (dict(floor=float("nan")), "floor=nan is not a weight"),
        (dict(validation_weight=1.5), "outside [0, 1]"),
        (dict(on="test"), "choose train, validation or both"),
        (dict(form="log10"), "choose plain, log or last"),
    ],
)
def test_bad_settings_get_a_sentence(settings, said):
    with pytest.raises(ValueError, match=said.replace("[", r"\[")):
        objective(**settings)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_rounding_makes_of_a_zero_counts_as_zero(dtype):
    """And pulls no gradient, where a slope of 1 / (loss + floor) would have the wrong sign."""
    found, ones = Objective(form="log"), jnp.ones(2)
    edge = found.least(dtype)
    np.testing.assert_allclose(edge, -(float(jnp.finfo(dtype).eps) ** 0.5))
    rounded = jnp.asarray([-2e-7, 0.9 * edge], dtype)
    np.testing.assert_allclose(found.value(rounded, ones), np.log(found.floor), rtol=1e-6)
    assert not np.asarray(jax.grad(found.value)(rounded, ones), np.float32).any()
    assert found.value(rounded, ones).dtype == jnp.float32


@pytest.mark.parametrize("floor", [1e-7, 0.5])
def test_a_negative_loss_has_no_logarithm_whatever_the_floor(floor):
    found, ones = Objective(form="log", floor=floor), jnp.ones(2)
    losses = jnp.asarray([1.0, -0.1])
    assert np.isnan(found.value(losses, ones))
    assert found.lowest(losses, ()) < found.least(losses.dtype)
    assert Objective(form="plain").value(losses, ones) == pytest.approx(0.45)
    assert Objective(form="plain").least(losses.dtype) == -np.inf


def test_without_a_floor_zero_has_no_logarithm():
    found = Objective(form="log", floor=0.0)
    assert 0.0 < found.least(jnp.float32) < 1e-30


def test_the_lowest_loss_is_of_what_the_meta_loss_reads():
    training, validation = jnp.asarray([2.0, jnp.nan]), jnp.asarray([-3.0, 5.0])
    assert Objective(on="train").lowest(training, validation) == 2.0
    assert Objective(on="both").lowest(training, validation) == -3.0
    assert Objective(on="train").lowest(training[1:], ()) == np.inf
    # Of a window the form "last" reads the last.
    rising = jnp.asarray([-4.0, 3.0])
    assert Objective(on="train", form="last").lowest(rising, ()) == 3.0
    assert Objective(on="both", form="last").lowest(rising, validation) == 3.0


@pytest.mark.parametrize(
    "on, form, share",
    [
        ("train", "plain", 1 / 4),
        ("validation", "plain", 1 / 2),
        ("both", "log", 3 / 8),
        ("train", "last", 0.0),
        ("validation", "last", 1.0),
        ("both", "last", 1 / 2),
    ],
)
def test_the_share_of_capped_losses_is_of_what_the_meta_loss_reads(on, form, share):
    training, validation = jnp.asarray([9.0, 1.0, 1.0, 2.0]), jnp.asarray([1.0, 9.0, 1.0, jnp.inf])
    found = Objective(on, form, cap=3.0).metrics(jnp.zeros(()), training, validation)
    assert float(found["capped"]) == share


def test_losses_that_are_not_finite():
    ones, plain = jnp.ones(2), Objective(form="plain", cap=10.0)
    assert np.isnan(plain.value(jnp.asarray([1.0, jnp.nan]), ones))
    assert plain.value(jnp.asarray([1.0, -jnp.inf]), ones) == -np.inf
    assert plain.value(jnp.asarray([1.0, jnp.inf]), ones) == 5.5  # Above the cap, like 1e30.
