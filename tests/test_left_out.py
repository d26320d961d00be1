"""What is not finite is left out, counted and said; what no meta-loss can take stops the run."""

import json
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2l.console.errors import UserError
from l2l.core import base
from l2l.core.unroll import Inner
from l2l.estimators import autodiff
from l2l.estimators.mixture import mixture
from l2l.estimators.objective import Objective
from l2l.storage import exports
from l2l.training import callbacks, diagnose, finish, meta_step
from l2l.training.callbacks import DONE, NOT_FINITE, Validate
from l2l.training.experiment import build_experiment
from l2l.training.loop import start
from l2l.training.run import train

STAGE = base.Stage(jnp.float32(4), jnp.float32(8), jnp.float32(0))
THETA = base.lift(lambda key: jnp.zeros(2), optax.sgd)


def constant(gradients, losses):
    """An estimator whose problem i has gradient i of `gradients` [n, 2] and meta-loss i."""

    def estimate(theta, state, data, stage):
        rows = {"meta_loss": jnp.asarray(losses)[state], "loss": jnp.zeros(len(state))}
        return jnp.asarray(gradients)[state], state, rows | {"lowest": rows["loss"]}

    def init(keys, theta, stage):
        # The problem's number, from its key: `meta_init` folds the problem's number into one key.
        own = jax.random.fold_in(jax.random.key(5), 1)
        known = jax.vmap(lambda i: jax.random.key_data(jax.random.fold_in(own, i)))(jnp.arange(4))
        same = jnp.all(known[None] == jax.random.key_data(keys)[:, None], -1)
        return jnp.argmax(same, 1)

    return base.MetaGradient(init, estimate)


def steps_of(estimator, devices, group=1, clip=10.0, by=optax.sgd):
    """(the state after `group` meta-steps by SGD at rate 1 from theta = 0, metrics)."""
    made = meta_step.Meta(estimator, THETA, by(1.0), num_problems=4, clip=clip)
    state = meta_step.spread(meta_step.meta_init(jax.random.key(5), made, STAGE), devices)
    return meta_step.compile_steps(made, group, jax.devices()[:devices])(state, ())


GRADIENTS = np.array([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5], [30.0, 40.0]], np.float32)
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_problem_that_is_not_finite_counts_as_zero(devices, where):
    gradients, losses = GRADIENTS.copy(), np.zeros(4, np.float32)
    if where == "gradient":
        gradients[1, 1] = INF
    else:
        losses[1] = NAN
    state, metrics = steps_of(constant(gradients, losses), devices)
    # The last is clipped from length 50 to 10: (6, 8). The mean is over four, one of which is 0.
    expected = -np.sum([[1.0, 2.0], [0.5, 0.5], [6.0, 8.0]], 0) / 4
    np.testing.assert_allclose(jax.device_get(state.theta), expected, rtol=1e-6)
    assert jax.device_get(metrics["finite"]).tolist() == [[True, False, True, True]]
    counts = [int(x) for x in (state.bad, state.skipped, state.dropped)]
    assert counts == [0, 0, 1]


def test_a_step_without_any_finite_problem_changes_nothing():
    lost = constant(GRADIENTS, np.full(4, -INF, np.float32))
    state, _ = steps_of(lost, 2, group=3, by=optax.adam)
    np.testing.assert_array_equal(jax.device_get(state.theta), np.zeros(2))
    assert int(optax.tree.get(state.opt_state, "count")) == 0
    assert [int(x) for x in (state.step, state.bad, state.skipped, state.dropped)] == [3, 3, 3, 12]


@pytest.mark.parametrize("devices", [1, 2])
def test_a_family_that_is_never_finite_is_bad_though_the_others_go_on(devices):
    def family(losses):
        made = constant(GRADIENTS, losses)
        # Mixtures fold the estimator's number into the keys: these tests do without.
        return made._replace(init=lambda keys, theta, stage: jnp.zeros(len(keys), jnp.int32))

    mixed = mixture([family(np.zeros(4)), family(np.full(4, NAN))])
    mixed = mixed._replace(
        estimate=lambda theta, state, data, stage: mixture(
            [family(np.zeros(4)), family(np.full(4, NAN))], reads=(0, 0)
        ).estimate(theta, state, ((),), stage)
    )
    state, metrics = steps_of(mixed, devices, group=3)
    counts = [int(x) for x in (state.bad, state.skipped, state.dropped)]
    assert counts == [3, 0, 12]
    fine = meta_step.by_family(jax.device_get(metrics["finite"]), devices, 2)
    assert fine.tolist() == [[[True] * 4, [False] * 4]] * 3
    np.testing.assert_allclose(jax.device_get(state.theta), -3 * GRADIENTS[0] / 2, rtol=1e-6)


MINE = """
import jax, jax.numpy as jnp
from l2l import TaskFamily

def family(offset: float = 0.0, form: str = "square", numbers: int = 0) -> TaskFamily:
    def loss(params, problem, batch):
        if form == "half":
            return jnp.where(problem < 0.5, jnp.nan, jnp.mean(params**2))
        if form == "square":
            return jnp.mean(params**2) - offset
        return jnp.mean((jnp.sqrt if form == "sqrt" else jnp.log)(params))

    def data():
        return (jnp.full(3, float(numbers)),) if numbers else ()

    return TaskFamily(
        sample=jax.random.uniform,
        init=lambda key, problem: jax.random.normal(key, (12,)),
        batch=lambda key, problem, data, split: (),
        loss=loss,
        data=data,
        name="mine",
    )
"""


@pytest.fixture
def mine(tiny, tmp_path):
    """The configuration of seconds, on a task of one's own with the given settings."""
    (tmp_path / "mine.py").write_text(MINE)
    name = f"{tmp_path}/mine.py:family"

    def config(*tasks, **sections):
        # Adam with learned rates compiles in a fraction of an LSTM's time.
        tiny["optimizer"], tiny["estimator"] = {"name": "learned_adam"}, {"name": "truncated"}
        section = tuple(dict(name=name, **settings) for settings in tasks)
        tiny["task"] = section[0] if len(section) == 1 else section
        return tiny | sections

    return config


@pytest.fixture
def no_comparison(monkeypatch):
    def conclude(experiment, theta, directory, key, snapshot):
        return str(exports.export(directory / exports.EXPORT, experiment.specification, theta))

    monkeypatch.setattr(finish, "conclude", conclude)


@pytest.mark.parametrize("estimator", ["first_order", "truncated", "pes"])
def test_a_loss_without_a_logarithm_stops_the_run(mine, tmp_path, estimator):
    config = mine(dict(offset=5000.0), estimator={"name": estimator})
    if estimator == "first_order":
        config["optimizer"] = {"name": "lstm", "hidden_size": 1}  # One with a rule.
    with pytest.raises(UserError) as error:
        train(build_experiment(config), tmp_path / "run")
    said = str(error.value)
    assert "\n" not in said and "task mine" in said and "-499" in said
    assert 'objective.form to "plain" or "last"' in said and "positive" in said
    assert not (tmp_path / "run" / exports.EXPORT).exists()


def test_a_mixture_names_the_task_whose_loss_it_is(mine, tmp_path):
    config = mine(dict(), dict(offset=5000.0))
    config["task"] = ({"name": "quadratic", "dimension": 2, "batch_size": 3}, config["task"][1])
    with pytest.raises(UserError, match="The loss of task mine has come down to -499"):
        train(build_experiment(config), tmp_path / "run")


def test_negative_losses_are_no_trouble_to_the_plain_form(mine, tmp_path, no_comparison):
    config = mine(dict(offset=5000.0), objective={"on": "train", "form": "plain"})
    assert train(build_experiment(config), tmp_path / "run") == DONE
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(-5001 < row["meta_loss"] < -4990 and row["dropped"] == 0 for row in rows)


@pytest.mark.parametrize("form", ["sqrt", "log"])
def test_a_task_whose_losses_are_nan_is_said_and_exports_nothing(mine, tmp_path, capsys, form):
    """Of twelve normal numbers some are negative, at every step of every problem."""
    config = mine(dict(form=form), objective={"on": "train", "form": "plain"})
    assert train(build_experiment(config), tmp_path / "run") == NOT_FINITE
    said = capsys.readouterr().err
    assert "Meta-step 1 skipped: of all 8 problems the losses are not finite" in said
    assert "at inner step 0 the training loss (nan) is not finite" in said
    assert "Stopped at meta-step 12" in said and "mend that" in said
    assert not (tmp_path / "run" / exports.EXPORT).exists()


def test_what_a_run_goes_on_without_is_counted_by_task_and_not_searched(
    mine, tmp_path, capsys, no_comparison, monkeypatch
):
    """A search compiles for minutes where the model is large, and the run has others to learn from.
    Half of the problems of one of two tasks have no finite loss."""

    def explainer(*args, **settings):
        raise AssertionError("searched for")

    monkeypatch.setattr(diagnose, "explainer", explainer)
    config = mine(dict(form="half"))
    config["task"] = ({"name": "quadratic", "dimension": 2, "batch_size": 3}, config["task"])
    assert train(build_experiment(config), tmp_path / "run") == DONE
    said = capsys.readouterr().err
    found = re.findall(
        r"(\d+) of 48 meta-gradients left out \((\d+) of mine\), as the losses", said
    )
    assert found and all(0 < int(of_task) == int(n) < 24 for n, of_task in found)
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(int(n) for n, _ in found) == rows[-1]["dropped"]


@pytest.mark.parametrize(
    "counts, expected",
    [((2, 5), (0, 1)), ((1, 0, 3, 6), (2, 0)), ((6,), (0, 0)), ((2, 1, 4, 7), (1, 2))],
)
def test_the_search_begins_where_the_steps_in_a_row_did(monkeypatch, counts, expected):
    """`bad` after each group of three: the group and the step in it whose problem is searched."""
    found = []
    for name in ("refuse", "left_out", "summary"):
        monkeypatch.setattr(callbacks, name, lambda loop, group: ())
    monkeypatch.setattr(callbacks, "beginning", lambda loop, *where: found.append(where))
    log = SimpleNamespace(log=lambda *row: None, say=None)
    watch, codes = callbacks.Watch(log), []
    running = SimpleNamespace(max_bad=5, steps=100)
    groups = [SimpleNamespace(metrics={"finite": np.ones((3, 8))}) for _ in counts]
    for bad, group in zip(counts, groups, strict=True):
        state = SimpleNamespace(bad=bad)
        loop = SimpleNamespace(step=3, state=state, experiment=SimpleNamespace(running=running))
        codes.append(watch(loop, group))
    assert codes == [None] * (len(counts) - 1) + [NOT_FINITE]
    group, index = expected
    assert found == [(groups[group], index)]


def test_the_search_compiles_no_meta_step_where_the_first_fails():
    """An estimator that cannot be traced again, and what its run found."""
    family = base.TaskFamily(
        sample=lambda key: jnp.ones(()),
        init=lambda key, problem: jnp.ones(2),
        batch=lambda key, problem, data, split: (),
        loss=lambda params, problem, batch: problem * jnp.sum(jnp.square(params)),
        name="square",
    )
    inner = Inner(family, base.lift(lambda key: jnp.ones(()), optax.sgd), 2, stagger=False)

    def estimate(*args):
        raise AssertionError("the meta-step is compiled again")

    estimator = autodiff.truncated(inner, Objective())._replace(estimate=estimate)
    made = meta_step.Meta(estimator, inner.optimizer, optax.sgd(1e-3), 4)
    state = meta_step.meta_init(jax.random.key(0), made, STAGE)
    run = state.estimator.inner
    run = run._replace(problem=run.problem.at[2].set(NAN))
    state = state._replace(estimator=state.estimator._replace(inner=run))
    said = diagnose.explainer(made, [inner])(state, (), 1, np.arange(4) != 2)
    assert said.startswith("Meta-step 1, problem 2 (square): before the window the problem's (nan)")


def test_all_explanations_of_a_run_share_their_programs():
    traced = []
    family = base.TaskFamily(
        sample=lambda key: (),
        init=lambda key, problem: jnp.ones(2),
        batch=lambda key, problem, data, split: (),
        loss=lambda params, problem, batch: traced.append(0) or jnp.log(-jnp.sum(params)),
    )
    inner = Inner(family, base.lift(lambda key: jnp.ones(()), optax.sgd), 2, stagger=False)
    made = meta_step.Meta(
        autodiff.truncated(inner, Objective()), inner.optimizer, optax.sgd(1e-3), 2
    )
    explain = diagnose.explainer(made, [inner])
    state = meta_step.meta_init(jax.random.key(0), made, STAGE)
    first = explain(state, (), 2)
    before = len(traced)
    again = explain(state._replace(step=state.step + 5), (), 2)
    assert before and len(traced) == before
    assert first.replace("Meta-step 1", "Meta-step 6") == again


@pytest.mark.parametrize("form, expected", [("log", math.log(7.0)), ("plain", 7.0)])
def test_validation_is_of_the_whole_mixture(mine, monkeypatch, form, expected):
    """Constant losses 3 and 7 with weights 1 and 3: what stages validate is the weighted mean."""
    stages = {"name": "stages", "horizons": (4, 8), "every": 3, "patience": 1, "num_problems": 2}
    config = mine(
        dict(offset=-3.0),
        dict(offset=-7.0),
        horizon=stages,
        objective={"on": "train", "form": form},
    )
    config["task"] = tuple(
        dict(task, weight=weight) for task, weight in zip(config["task"], (1.0, 3.0), strict=True)
    )
    experiment = build_experiment(config)
    # Without a gradient nothing moves: the loss is the offset, up to the square of nothing.
    still = tuple(
        family._replace(init=lambda key, problem: jnp.zeros(12)) for family in experiment.families
    )
    experiment = experiment._replace(families=still)
    loop = start(experiment)
    loss, numbers = Validate(None).measure(loop, 8, loop.theta)
    first = math.log(3.0) if form == "log" else 3.0
    np.testing.assert_allclose(loss, (first + 3 * expected) / 4, rtol=0.02)
    np.testing.assert_allclose(numbers["validation/1"], expected, rtol=0.02)
