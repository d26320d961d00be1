"""Planted faults: the sentence must name the step, the tensor and the quantity."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2l.core import base, unroll
from l2l.core.unroll import Inner
from l2l.estimators import autodiff, first_order, mixture, pes
from l2l.estimators.objective import Objective
from l2l.optimizers.lstm import lstm
from l2l.training import diagnose, meta_step

STAGE = base.Stage(jnp.float32(12), jnp.float32(12), jnp.float32(0))


def lines(name="lines", offset=0.0) -> base.TaskFamily:
    """Regression on rows of the data [steps, 2, 3], row t at step t; the last input is always 0.

    `batch` is given the run's key folded with the step, so the step is found by trying.
    """

    def batch(key, problem, data, split):
        steps = jnp.arange(data.shape[0])
        use = unroll.TRAIN if split == "train" else unroll.VALIDATION
        own = jax.random.fold_in(problem["key"], use)
        keys = jax.vmap(lambda t: jax.random.key_data(jax.random.fold_in(own, t)))(steps)
        here = jnp.argmax(jnp.all(keys == jax.random.key_data(key)[None], 1))
        return {"inputs": data[here] * jnp.array([[1.0, 1.0, 0.0]])}

    def loss(params, problem, batch):
        out = batch["inputs"] @ params["layer"]["w"] + params["layer"]["b"]
        return jnp.mean(out**2) + jnp.sum(params["layer"]["w"][:2] ** 2) - offset

    def init(key, problem):
        return {"layer": {"b": jnp.ones(()), "w": jnp.ones(3)}}

    return base.TaskFamily(
        # `unroll.fresh` samples from the run's key folded with SAMPLE; tests set the key itself.
        sample=lambda key: {"key": key},
        init=init,
        batch=batch,
        loss=loss,
        name=name,
    )


def numbers():
    return jax.random.uniform(jax.random.key(9), (14, 2, 3))


def learned_adam(eps_root=1e-8) -> base.LearnedOptimizer:
    return base.lift(
        lambda key: {"log_lr": jnp.log(jnp.float32(0.05))},
        lambda theta: optax.adam(jnp.exp(theta["log_lr"]), eps_root=eps_root),
    )


def small(**settings):
    return lstm(hidden_size=2, **settings)


def located(optimizer, data, *, windows=1, family=None, **settings):
    """`locate` for the window after so many finished ones."""
    inner = Inner(family or lines(), optimizer, 4, stagger=False)
    theta, key = optimizer.init(jax.random.key(1)), jax.random.key(2)
    run = unroll.fresh(inner, key, theta, STAGE)._replace(problem={"key": key})
    for _ in range(windows):
        run, _ = unroll.unroll(run, numbers(), inner.family, optimizer.bind(theta), inner.length)
    return diagnose.locator(inner, **settings)(theta, run, data)


def test_a_healthy_window_has_no_fault():
    assert located(small(), numbers()) is None
    assert located(learned_adam(), numbers(), order="exact") is None


@pytest.mark.parametrize("optimizer", [small, learned_adam])
def test_nan_in_the_data(optimizer):
    sentence = located(optimizer(), numbers().at[6, 1, 0].set(jnp.nan), objective=Objective())
    where = "batch's inputs[1, 0] (nan, 1 of 6 numbers) is not finite."
    assert sentence == f"at inner step 6 the training {where}"
    # The loss that follows the window's last update is evaluated at the batch of step 8.
    sentence = located(optimizer(), numbers().at[8, 1, 0].set(jnp.nan), objective=Objective())
    assert sentence == "after inner step 7 the training loss (nan) is not finite."
    both = Objective("both")  # Validation batches are taken after the update.
    sentence = located(optimizer(), numbers().at[6, 1, 0].set(jnp.nan), objective=both)
    assert sentence == f"after inner step 5 the validation {where}"


def test_overflow_of_the_gradient():
    """The loss is finite, and so is what it is made of."""
    family = lines()

    def loss(params, problem, batch):
        return family.loss(params, problem, batch) + jnp.sqrt(0.0 * params["layer"]["b"])

    sentence = located(small(), numbers(), windows=0, family=family._replace(loss=loss))
    assert sentence == "at inner step 0 the gradient of layer/b (nan) is not finite."


def test_overflow_of_a_feature():
    """At eps_root = 0 and a gradient of zero, a feature that divides by √v̂ alone is 0/0."""
    optimizer = small()
    rule = optimizer.rule

    def observe(gradient, accumulators, params, step):
        rows, accumulators = rule.observe(gradient, accumulators, params, step)
        return rows.at[3].set(gradient / jnp.abs(gradient)), accumulators

    own = rule._replace(observe=observe)
    sentence = located(optimizer._replace(rule=own), numbers())
    assert sentence.startswith("at inner step 4 feature g/√v̂ of layer/w[2] (nan, 1 of 3 numbers)")


def test_overflow_of_the_update():
    optimizer = small()
    made = optimizer._replace(
        init=lambda key: optimizer.init(key) | {"log_learning_rate": jnp.float32(100.0)}
    )
    sentence = located(made, numbers(), windows=0)
    assert sentence.startswith("at inner step 0 the update of layer/b (-inf) is not finite")


def test_weights_and_losses_without_logarithm():
    optimizer = small()
    broken = optimizer._replace(
        init=lambda key: optimizer.init(key) | {"log_learning_rate": jnp.float32(jnp.nan)}
    )
    sentence = located(broken, numbers(), windows=0)
    assert sentence == (
        "before the window the optimizer's weight log_learning_rate (nan) is not finite."
    )
    family = lines(offset=100.0)
    assert located(small(), numbers(), family=family, objective=Objective(form="plain")) is None
    sentence = located(small(), numbers(), family=family, objective=Objective(form="log"))
    assert "at inner step 4 the training loss is -" in sentence
    assert "no logarithm: choose objective.form 'plain'" in sentence


def test_roots_without_a_derivative():
    """eps_root = 0: every number of the run is finite, the exact meta-gradient is not."""
    sentence = located(small(eps_root=0.0), numbers(), order="exact")
    assert sentence.startswith(
        "at inner step 5 the derivative, with respect to the gradient, "
        "of feature m̂(0.9)/√v̂ of layer/w[2] (nan"
    )
    assert "set the optimizer's eps_root above zero" in sentence
    sentence = located(learned_adam(eps_root=0.0), numbers(), order="exact")
    assert (
        "at inner step 5 the derivative, with respect to the gradient, of the update of layer/w[2]"
        in sentence
    )
    assert located(small(eps_root=0.0), numbers(), order="first") is None


def plain_family(name="plain") -> base.TaskFamily:
    """Rows of the data at random, without the test's clock."""
    return lines(name)._replace(
        sample=lambda key: (),
        batch=lambda key, problem, data, split: {
            "inputs": data[0] * jnp.array([[1.0, 1.0, 0.0]]) + 0.01 * jax.random.uniform(key)
        },
    )


def failing(estimator, optimizer, num_problems=2):
    made = meta_step.Meta(estimator, optimizer, optax.sgd(1e-3), num_problems)
    return made, meta_step.meta_init(jax.random.key(0), made, STAGE)


def test_explains_the_failing_meta_step():
    """A learning rate that is NaN from inner step 9 on: windows of 4, so the third meta-step."""

    def make(theta):
        def rate(count):
            return jnp.where(count < 9, jnp.exp(theta["log_lr"]), jnp.nan)

        return optax.sgd(rate)

    optimizer, data = (
        learned_adam()._replace(bind=base.lift(lambda key: None, make).bind),
        numbers(),
    )
    inner = Inner(plain_family(), optimizer, 4, stagger=False)
    made, state = failing(autodiff.truncated(inner, Objective()), optimizer)
    explain = diagnose.explainer(made, [inner])
    sentence = explain(state, data, 5)
    assert sentence == (
        "Meta-step 3, problem 0 (plain): at inner step 9 the update of layer/b (nan) is not finite."
    )
    # What the run saw spares the search for the problem, and is not believed where all is fine.
    assert explain(state, data, 3, np.array([False, True])) == sentence
    for fine in (None, np.array([True, False])):
        said = explain(state, data, 2, fine)
        assert "Run again on one device, the 2 meta-steps after 0 have finite" in said


def test_explains_the_failing_problem():
    """The second moment of problem 1 is poisoned at its coordinate 3: b has one, w the next."""
    optimizer = small()
    inner = Inner(plain_family(), optimizer, 4, stagger=False)
    made, state = failing(first_order.first_order(inner, Objective()), optimizer)
    run = state.estimator.inner
    nu = run.opt_state.accumulators.nu.at[1, 3].set(jnp.nan)
    opt_state = run.opt_state._replace(accumulators=run.opt_state.accumulators._replace(nu=nu))
    estimator = state.estimator._replace(inner=run._replace(opt_state=opt_state))
    poisoned = state._replace(estimator=estimator)
    sentence = diagnose.explainer(made, [inner])(poisoned, numbers(), 3)
    assert sentence.startswith(
        "Meta-step 1, problem 1 (plain): at inner step 0 feature m̂(0.9)/√v̂ of layer/w[2] (nan"
    )


def test_explains_mixtures_and_pairs():
    optimizer, good = learned_adam(), numbers()
    families = [plain_family("good"), plain_family("bad")]
    inners = [Inner(family, optimizer, 4, stagger=False) for family in families]
    for make in (autodiff.truncated, pes.pes):
        mixed = mixture.mixture([make(inner, Objective()) for inner in inners])
        data = (good, good.at[0, 0, 1].set(jnp.nan))
        made, state = failing(mixed, optimizer)
        sentence = diagnose.explainer(made, inners, reads=(0, 1))(state, data, 3)
        assert sentence == (
            "Meta-step 1, problem 0 (bad): at inner step 0 the training batch's "
            "inputs[0, 1] (nan, 1 of 6 numbers) is not finite."
        )
