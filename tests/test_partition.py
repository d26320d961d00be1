"""Several optimizers by parameter, each as if it were alone; and Adam among them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2l.core import base
from l2l.core.unroll import Inner
from l2l.estimators import autodiff
from l2l.estimators.first_order import first_order
from l2l.estimators.objective import Objective
from l2l.optimizers.adam import adam
from l2l.optimizers.by_parameter import by_parameter
from l2l.optimizers.lstm import lstm
from l2l.optimizers.published import rnnprop
from l2l.tasks import simple_multi

PARAMS = {
    "layers": [{"w": jnp.ones((4, 5)), "b": jnp.zeros(5)}, {"w": jnp.ones((5, 1))}],
    "s": jnp.ones(()),
}
PARTS = {"matrices": lstm(hidden_size=2), "rest": rnnprop(hidden_size=2)}
LABELS = (("layers/*/w", "matrices"), ("*", "rest"))


def shaken(learned):
    theta = learned.init(jax.random.key(0))
    return jax.tree.map(
        lambda x: x + 0.1 * jnp.cos(jnp.arange(1.0, x.size + 1)).reshape(x.shape), theta
    )


def run(transform, params, steps=3):
    state = transform.init(params)
    for _ in range(steps):
        gradients = jax.tree.map(lambda x: jnp.sin(x) + 0.1, params)
        updates, state = transform.update(gradients, state, params, num_steps=5)
        params = optax.apply_updates(params, updates)
    return params


def test_each_part_acts_as_if_alone():
    both = by_parameter(PARTS, LABELS)
    theta = shaken(both)
    after = jax.jit(lambda: run(both.bind(theta), PARAMS))()
    alone = {n: jax.jit(lambda n=n: run(PARTS[n].bind(theta[n]), PARAMS))() for n in PARTS}
    for i in (0, 1):
        np.testing.assert_allclose(
            after["layers"][i]["w"], alone["matrices"]["layers"][i]["w"], rtol=1e-6
        )
    np.testing.assert_allclose(after["layers"][0]["b"], alone["rest"]["layers"][0]["b"], rtol=1e-6)
    np.testing.assert_allclose(after["s"], alone["rest"]["s"], rtol=1e-6)


def test_the_first_pattern_that_matches_wins_and_plain_text_matches_inside():
    fast, slow = adam(1.0), adam(0.01)
    both = by_parameter(
        {"fast": fast, "slow": slow}, [("0/b", "fast"), ("b", "slow"), ("", "slow")]
    )
    transform = both.bind(both.init(jax.random.key(0)))
    updates, _ = transform.update(PARAMS, transform.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["layers"][0]["b"], 0.0)
    np.testing.assert_allclose(updates["layers"][0]["w"], -0.01, rtol=1e-5)
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    updates, _ = transform.update(ones, transform.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["layers"][0]["b"], -1.0, rtol=1e-5)


def test_the_engine_takes_both_parts_at_once():
    """First-order meta-gradients of L2L's simple-multi: those of plain autodiff."""
    both = by_parameter(
        {"lstm": lstm(hidden_size=2), "adam": adam(0.1, learned=True)},
        [("x_0", "lstm"), ("x_1", "adam")],
    )
    inner, stage = Inner(simple_multi(), both, 3), base.Stage(*map(jnp.float32, (6, 9, 0)))
    theta = shaken(both)
    out = []
    for make in (first_order, autodiff.truncated):
        estimator = make(inner, Objective("train", "log"))
        state = estimator.init(jax.random.split(jax.random.key(1), 2), theta, stage)
        out.append(jax.jit(estimator.estimate)(theta, state, (), stage)[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *out)
    assert np.all(np.asarray(out[0]["adam"]) != 0)
    assert np.any(np.asarray(out[0]["lstm"]["network"]["out"]["w"]) != 0)


@pytest.mark.parametrize("learned", [False, True])
def test_adam_is_optax_adam(learned):
    settings = dict(b1=0.8, b2=0.99, eps=1e-6, eps_root=1e-5)
    ours = adam(0.03, learned=learned, **settings)
    theta = ours.init(jax.random.key(0))
    assert base.count(theta) == int(learned)
    mine = run(ours.bind(theta), PARAMS, 10)
    other = run(optax.with_extra_args_support(optax.adam(0.03, **settings)), PARAMS, 10)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), mine, other)


def test_nobody_takes_a_parameter():
    both = by_parameter({"a": adam(), "b": adam()}, [("w", "a"), ("b", "b")])
    with pytest.raises(ValueError, match=r"'s' matches none of the patterns \['w', 'b'\]: add one"):
        both.bind(both.init(jax.random.key(0))).init(PARAMS)


@pytest.mark.parametrize(
    "optimizers, labels, message",
    [
        ({"a": adam()}, [("w", "a"), ("*", "c")], r"No optimizer is labelled \['c'\]: .* with a\."),
        ({"a": adam(), "b": adam()}, [("*", "a")], r"No pattern gives a parameter to \['b'\]: add"),
        ({"a": base.fixed(optax.sgd(1.0))}, [("*", "a")], r"\['a'\] have no coordinatewise rule"),
    ],
)
def test_mistakes_in_the_labels(optimizers, labels, message):
    with pytest.raises(ValueError, match=message):
        by_parameter(optimizers, labels)
