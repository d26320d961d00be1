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
        (dict(emphasis=-1.0), "emphasis=-1.0 is no weight"),
        (dict(floor=float("nan")), "floor=nan is no weight"),
        (dict(share=1.5), "outside [0, 1]"),
        (dict(on="test"), "choose train, validation or both"),
        (dict(form="log10"), "choose plain, log or last"),
    ],
)
def test_bad_settings_get_a_sentence(settings, said):
    with pytest.raises(ValueError, match=said.replace("[", r"\[")):
        objective(**settings)
