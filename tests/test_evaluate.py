"""Evaluation against closed forms, a plain Python loop, and itself on another number of devices."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import xla_flags

from l2l import tasks
from l2l.core import base, unroll
from l2l.estimators import autodiff, first_order, pes
from l2l.estimators.objective import Objective
from l2l.evaluation import baselines, cache, cli, comparison, report, statistics, tuning
from l2l.evaluation import curves as evaluate
from l2l.evaluation.cells import Cell
from l2l.evaluation.curves import Problems
from l2l.evaluation.tuning import Grid
from l2l.optimizers import lstm
from l2l.optimizers.adam import learned_adam
from l2l.training import meta_step

CURVATURE = jnp.asarray([1.0, 0.5, 0.1])


def bowl():
    """½ Σ a x² from a random x: solvable by hand."""
    return base.TaskFamily(
        sample=lambda key: (),
        init=lambda key, problem: jax.random.normal(key, (3,)),
        batch=lambda key, problem, data, split: (),
        loss=lambda x, problem, batch: 0.5 * jnp.sum(CURVATURE * x**2),
        name="bowl",
    )


def noisy():
    """The bowl with a gradient of its own in every batch."""

    def loss(x, problem, batch):
        return 0.5 * jnp.sum(CURVATURE * x**2) + jnp.sum(batch * x)

    def batch(key, problem, data, split):
        return jnp.zeros(3) if key is None else 0.1 * jax.random.normal(key, (3,))

    return bowl()._replace(batch=batch, loss=loss, name="noisy")


def test_sgd_on_a_quadratic_is_the_closed_form():
    # x_t = (1 − αa)^t x_0, so that L_t = ½ Σ a (1 − αa)^{2t} x_0².
    key, rate, steps = jax.random.key(1), 0.3, 12
    curves = evaluate.evaluate(
        key, optax.sgd(rate), bowl(), (), num_problems=3, num_steps=steps, checkpoints=(5,)
    )
    fold = jax.random.fold_in
    x0 = np.stack([bowl().init(fold(fold(key, i), unroll.INIT), ()) for i in range(3)])
    t = np.arange(steps + 1)[:, None]
    a = np.asarray(CURVATURE)
    truth = 0.5 * np.sum(a * (1 - rate * a) ** (2 * t) * x0[:, None] ** 2, -1)
    np.testing.assert_allclose(curves.losses, truth[:, :-1], rtol=2e-5)
    np.testing.assert_allclose(curves.train_loss, truth[:, [5, 12]], rtol=2e-5)
    np.testing.assert_array_equal(curves.test_loss, curves.train_loss)
    np.testing.assert_array_equal(curves.steps, [5, 12])
    assert np.isnan(curves.test_accuracy).all() and not curves.diverged.any()


@pytest.mark.parametrize("name", ["adam", "schedule_free"])
def test_a_run_equals_a_plain_loop(name, monkeypatch):
    monkeypatch.setattr(evaluate, "EXAMPLES", 100)
    family = tasks.mlp(hidden=(4,), activations=("tanh",), batch_size=8)
    key, steps = jax.random.key(2), 6
    data, optimizer = family.data(), optax.adam(1e-2)
    if name == "schedule_free":
        optimizer = optax.chain(optax.contrib.schedule_free_adamw(1e-2), optax.identity())
    curves = evaluate.evaluate(key, optimizer, family, data, 2, steps)
    step_loss = jax.jit(jax.value_and_grad(family.loss))
    fold = jax.random.fold_in
    for i in range(2):
        own = fold(key, i)
        problem = family.sample(fold(own, unroll.SAMPLE))
        params = family.init(fold(own, unroll.INIT), problem)
        whole = family.batch(None, problem, data, "validation")
        count = whole.labels.size
        assert count > 200 and count % 100
        rows = [row * count // 100 for row in range(100)]
        part = jax.tree.map(lambda x, rows=rows: jnp.stack([x[row] for row in rows]), whole)
        state, losses, validation, judged = optimizer.init(params), [], [], params
        for t in range(steps):
            batch = family.batch(fold(fold(own, unroll.TRAIN), t), problem, data, "train")
            loss, gradient = step_loss(params, problem, batch)
            updates, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            losses.append(loss)
            judged = params
            if name == "schedule_free":
                judged = optax.contrib.schedule_free_eval_params(state[0], params)
            validation.append(family.loss(judged, problem, part))
        test = family.batch(None, problem, data, "test")
        train = family.batch(None, problem, data, "train")
        np.testing.assert_allclose(curves.losses[i], losses, rtol=1e-5)
        np.testing.assert_allclose(
            [curves.train_loss[i, 0], curves.test_loss[i, 0], curves.test_accuracy[i, 0]],
            [family.loss(judged, problem, b) for b in (train, test)]
            + [family.accuracy(judged, problem, test)],
            rtol=1e-5,
        )
        np.testing.assert_array_equal(curves.validation_steps, range(1, steps + 1))
        np.testing.assert_allclose(curves.validation_loss[i], validation, rtol=1e-5)


def test_the_validation_loss_is_measured_at_evenly_spaced_steps():
    # Of SGD on ½ Σ a x² without noise: L_t as in the closed form above, at t = 3, 6, …, 60.
    key, rate = jax.random.key(1), 0.3
    one = evaluate.evaluate(key, optax.sgd(rate), bowl(), (), 1, 60, checkpoints=(7,))
    marks = sorted([*range(3, 61, 3), 7])
    np.testing.assert_array_equal(one.validation_steps, marks)
    x0 = bowl().init(jax.random.fold_in(jax.random.fold_in(key, 0), unroll.INIT), ())
    a, t = np.asarray(CURVATURE), np.asarray(marks)[:, None]
    truth = 0.5 * np.sum(a * (1 - rate * a) ** (2 * t) * np.asarray(x0) ** 2, -1)
    np.testing.assert_allclose(one.validation_loss[0], truth, rtol=2e-5)
    assert evaluate.validation_steps(7) == list(range(1, 8))  # No step twice, none left out.
    assert len(evaluate.validation_steps(1001)) == evaluate.VALIDATIONS


@pytest.mark.parametrize("count", [3, 7, 1024])
def test_a_sample_of_rows_reaches_from_the_first_to_the_last(count):
    """In the examples of a data set and in the windows of a text, whose order is that of reading;
    a batch may hold a key as well, of a noise."""
    for whole in (count, count + 1, 2 * count - 1, 2 * count, 3 * count - 1):
        noise = jax.random.key(0)
        batch = (np.arange(whole), np.arange(whole)[:, None] + np.arange(2), noise)
        rows, windows, same = evaluate.spaced(batch, count)
        assert len(set(rows.tolist())) == len(rows) == count and same is noise
        np.testing.assert_array_equal(windows[:, 0], rows)
        # No gap is wider than the widest that there must be, at the ends neither.
        gaps = np.diff([*rows, whole])
        assert rows[0] == 0 and gaps.min() >= whole // count and gaps.max() <= -(-whole // count)
    graph = (np.arange(9 * count), np.arange(5 * count))  # Edges, say, which name the nodes.
    assert evaluate.spaced(graph, count) is graph


def test_the_validation_loss_of_a_batch_with_a_key_is_over_the_sample(monkeypatch):
    monkeypatch.setattr(evaluate, "EXAMPLES", 50)
    family = tasks.vae(dataset="digits", hidden=(3,), latent=1, batch_size=4)
    data, key = family.data(), jax.random.key(1)
    found = evaluate.evaluate(key, optax.sgd(0.0), family, data, 1, 1).validation_loss[0, 0]
    run = evaluate.beginning(family, jax.random.fold_in(key, 0))
    whole = family.batch(None, run.problem, data, "validation")
    rows = [row * len(whole.inputs) // 50 for row in range(50)]
    part = whole._replace(inputs=jnp.stack([whole.inputs[row] for row in rows]))
    np.testing.assert_allclose(found, family.loss(run.params, run.problem, part), rtol=1e-5)


def test_what_was_measured_on_other_rows_is_another_program(monkeypatch):
    """So that a cache does not mix them."""
    family = tasks.mlp(hidden=(), activations=("relu",), batch_size=8)
    monkeypatch.setattr(evaluate, "EXAMPLES", 100)

    def first_rows(batch, count):
        return jax.tree.map(lambda x: x[:: len(x) // count][:count], batch)

    def shifted(batch, count):
        return jax.tree.map(lambda x: x[np.arange(count) * len(x) // count + 1], batch)

    arguments = base.fixed(optax.sgd(0.1)), family, (), (2,), KEY, family.data()
    programs = {cache.program(*arguments)}
    for other in (first_rows, shifted):
        monkeypatch.setattr(evaluate, "spaced", other)
        programs.add(cache.program(*arguments))
    assert len(programs) == 3


def test_divergence_is_flagged_from_where_it_happens():
    def run(rate):
        key = jax.random.key(0)
        return evaluate.evaluate(key, optax.sgd(rate), bowl(), (), 2, 200, checkpoints=(1,))

    assert run(4.0).diverged.tolist() == [[True, True]] * 2  # |1 − 4a| = 3 where a = 1.
    assert not run(0.1).diverged.any()
    poisoned = optax.chain(
        optax.sgd(0.1),
        optax.stateless(lambda u, p: jax.tree.map(lambda u, p: u + jnp.sqrt(p * 0 - 1), u, p)),
    )
    curves = evaluate.evaluate(jax.random.key(0), poisoned, bowl(), (), 2, 3, checkpoints=(1,))
    assert curves.diverged.all()


@pytest.mark.parametrize("least", [-5000.0, -1.0, 0.0])
def test_divergence_is_the_same_notion_below_zero(least):
    """A bowl that is lower by a constant: what comes down has not diverged, and what goes up, by
    more than the loss was at first, has."""
    family = bowl()._replace(loss=lambda x, problem, batch: bowl().loss(x, problem, batch) + least)

    def diverged(rate):
        run = evaluate.evaluate(jax.random.key(0), optax.sgd(rate), family, (), 2, 60)
        return run.diverged.ravel().tolist()

    assert diverged(0.1) == [False, False]
    assert diverged(4.0) == [True, True]  # By then 3⁶⁰ times the square.


def test_the_bound_of_divergence():
    """ℓ − ℓ₀ > (blowup − 1) |ℓ₀|, for a loss that is what the parameter is, raised by 1 a step."""
    family = base.TaskFamily(
        sample=lambda key: (),
        init=lambda key, problem: jnp.asarray(start),
        batch=lambda key, problem, data, split: (),
        loss=lambda x, problem, batch: x,
    )
    marks = (1, 2, 3, 5, 6, 7)
    for start, blowup, expected in (
        (3.0, 2.0, [0, 0, 0, 1, 1, 1]),
        (3.0, 3.0, [0, 0, 0, 0, 0, 1]),
        (-2.0, 2.0, [0, 0, 1, 1, 1, 1]),
        (-2.0, 4.0, [0, 0, 0, 0, 0, 1]),
        (0.0, 2.0, [1, 1, 1, 1, 1, 1]),
    ):
        found = evaluate.evaluate(
            *(jax.random.key(0), optax.sgd(-1.0), family._replace(name=str(start)), (), 1, 7),
            checkpoints=marks,
            blowup=blowup,
        )
        assert found.diverged[0].tolist() == [bool(x) for x in expected], (start, blowup)


def test_ratios_of_losses():
    own = [1.0, 0.0, np.inf, 1.0, -1.0, 1.0, np.nan, np.inf, 1e-9]
    other = [4.0, 4.0, 4.0, np.inf, -4.0, -4.0, 1.0, np.inf, 0.0]
    expected = [0.25, 1e-8 / 4, np.inf, 0, np.nan, np.nan, np.inf, 1, 1]
    np.testing.assert_allclose(statistics.ratio(own, other), expected, rtol=1e-12)


def measured(family, tmp_path):
    """(the row of a slow descent, that of the best of three, the text of their table)."""
    grid = Grid("sgd", rates=(0.1, 1.0, 3), extensions=0)
    cell, problems = Cell(family.name, family), Problems(jax.random.key(0), 2)
    entry = comparison.Entry("slow", optax.sgd(1e-3))
    rows = list(comparison.measure([entry], [cell], (4,), problems, grids=(grid,)))
    assert [row.optimizer for row in rows] == ["slow", "sgd, tuned"]
    return *rows, report.write(tmp_path, rows, [cell], (4,))


def test_the_tuned_baseline_beats_a_slow_descent(tmp_path):
    slow, tuned, text = measured(bowl()._replace(name="bowl"), tmp_path)
    assert slow.ratio > 1 and tuned.ratio == 1 and tuned.sooner["sgd"]["steps"] == 1
    assert baselines.parse(tuned.setting) and tuned.setting.startswith("sgd(learning_rate=")
    assert np.isnan(tuned.sooner["sgd"]["time"]) and "time" not in text  # Nothing was timed.
    assert "## 4 steps" in text and str(tmp_path / "curves-4.png") in text


def test_negative_losses_have_no_ratio_and_a_figure(tmp_path):
    family = bowl()._replace(
        loss=lambda x, problem, batch: bowl().loss(x, problem, batch) - 5000.0, name="low"
    )
    slow, tuned, text = measured(family, tmp_path)
    assert np.isnan(slow.ratio) and np.isnan(tuned.ratio)
    assert slow.diverged == tuned.diverged == 0
    assert "low: a training loss is negative, and such losses have no ratio" in text
    assert (tmp_path / "curves-4.png").exists()


def test_losses_of_nan_alone_give_a_table(tmp_path):
    family = bowl()._replace(
        loss=lambda x, problem, batch: jnp.mean(jnp.sqrt(-1 - x**2)), name="root"
    )
    slow, tuned, text = measured(family, tmp_path)
    assert slow.diverged == tuned.diverged == 2 and np.isnan(slow.ratio)
    assert "2/2" in (tmp_path / "table.md").read_text()
    assert "root: no run has a finite training loss" in text
    assert (tmp_path / "curves-4.png").read_bytes().startswith(b"\x89PNG")


def test_a_problem_without_a_loss_does_not_choose_the_baseline(tmp_path):
    """Of two problems one has none: the best rate is that on the other."""

    def loss(x, problem, batch):
        return jnp.where(problem > 0, bowl().loss(x, (), batch), jnp.nan)

    family = bowl()._replace(sample=jax.random.normal, loss=loss, name="half")
    slow, tuned, text = measured(family, tmp_path)
    assert slow.diverged == tuned.diverged == 1
    assert slow.train == tuned.train == np.inf and slow.ratio > 1
    assert np.isnan(slow.interval).all() and np.isnan(tuned.interval).all()
    assert "half: no optimizer has a finite training loss on every problem" in text


def half(dtype):
    """The distance from 2 of three numbers of half precision."""
    return base.TaskFamily(
        sample=lambda key: (),
        init=lambda key, problem: jax.random.normal(key, (3,)).astype(dtype),
        batch=lambda key, problem, data, split: (),
        loss=lambda x, problem, batch: jnp.mean((x - 2) ** 2),
        name=str(dtype),
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_meta_trains_and_is_tuned(dtype):
    stage = base.Stage(jnp.float32(4), jnp.float32(8), jnp.float32(0.1))
    for optimizer, estimator in (
        (lstm.lstm(hidden_size=2), first_order.first_order),
        (learned_adam(), autodiff.truncated),
        (learned_adam(), pes.pes),
    ):
        inner = unroll.Inner(half(dtype), optimizer, 2)
        made = meta_step.Meta(
            estimator(inner, Objective("both")), optimizer, optax.adam(1e-2), num_problems=2
        )

        def twice(state, made=made):
            return jax.lax.scan(lambda s, _: meta_step.meta_step(made, s, ()), state, None, 2)

        state = jax.eval_shape(lambda key, m=made: meta_step.meta_init(key, m, stage), KEY)
        after, metrics = jax.eval_shape(twice, state)
        assert metrics["meta_loss"].dtype == jnp.float32
        run = next(x for x in jax.tree.leaves(after.estimator, is_leaf=is_run) if is_run(x))
        assert run.params.dtype == dtype
    for kind in baselines.KINDS:
        optimizer = baselines.grid(kind)

        def run(theta, key, optimizer=optimizer):
            start = evaluate.beginning(half(dtype), key)
            return evaluate.one_run(optimizer, theta, half(dtype), start, (), (2, 4))

        curves = jax.eval_shape(run, baselines.setting(0.1), KEY)
        assert curves.train_loss.dtype == jnp.float32
    grid = Grid("adam", rates=(1e-2, 1.0, 3), extensions=0)
    tuned = tuning.tune(grid, half(dtype), (), Problems(KEY, 2), (60,))
    assert tuned.by_train_loss[60].train_loss[0] < 0.1  # From some 4.


KEY = jax.random.key(0)


def is_run(x):
    return isinstance(x, base.InnerState)


def test_an_update_is_cast_as_optax_casts_it():
    """bfloat16 parameters and float32 updates: the sum is rounded, not the update. Next above 1 is
    1 + 2⁻⁷: to it goes what adds more than half of that, and half of it exactly stays at 1."""
    family = half("bfloat16")
    run = evaluate.beginning(family, KEY)._replace(params=jnp.ones(3, jnp.bfloat16))
    for more, end in ((2**-12, 1 + 2**-7), (0.0, 1.0)):
        update = jnp.full(3, 2**-8 * (1 + more), jnp.float32)
        transform = optax.with_extra_args_support(optax.stateless(lambda g, p, u=update: u))
        found, _ = unroll.unroll(evaluate.opened(transform, run, 1), (), family, transform, 1)
        assert found.params.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found.params.astype("float32"), np.full(3, end))


def test_another_version_of_jax_is_another_program(monkeypatch):
    arguments = (base.fixed(optax.sgd(0.1)), bowl(), (), (2,), KEY, ())
    before = cache.program(*arguments)
    assert cache.program(*arguments) == before
    monkeypatch.setattr(jax, "__version__", "0.0.1")
    assert cache.program(*arguments) != before


def test_a_new_theta_compiles_nothing_and_the_horizon_is_told():
    traces = []

    def bind(theta):
        def update(updates, state, params=None, *, num_steps=None, **extra_args):
            traces.append(num_steps)
            return jax.tree.map(lambda g: -theta * g / num_steps, updates), state

        return optax.GradientTransformationExtraArgs(lambda params: (), update)

    learned = base.LearnedOptimizer(lambda key: jnp.ones(()), bind)
    run = evaluate.compile_evaluation(learned, bowl(), 2, 10)
    run(jnp.asarray(1.0), jax.random.key(0), ())
    before = len(traces)
    changed = run(jnp.asarray(2.0), jax.random.key(5), ())
    assert len(traces) == before
    same = evaluate.evaluate(jax.random.key(5), optax.sgd(0.2), bowl(), (), 2, 10)
    np.testing.assert_allclose(changed.losses, same.losses, rtol=1e-6)


def test_a_learned_optimizer_bound_or_with_theta_gives_the_same():
    optimizer = lstm.lstm(hidden_size=2)
    theta = optimizer.init(jax.random.key(0))
    arguments = (bowl(), (), 2, 4)
    bound = evaluate.evaluate(jax.random.key(0), optimizer.bind(theta), *arguments)
    free = evaluate.evaluate(jax.random.key(0), optimizer, *arguments, theta=theta)
    np.testing.assert_allclose(bound.losses, free.losses, rtol=1e-6)


@pytest.mark.parametrize("settings", [dict(num_steps=0), dict(checkpoints=(9,))], ids=str)
def test_impossible_runs_are_refused_in_one_sentence(settings):
    arguments = dict(num_problems=1, num_steps=4) | settings
    with pytest.raises(ValueError, match=r"give steps between|must be 1 or more"):
        evaluate.evaluate(jax.random.key(0), optax.sgd(0.1), bowl(), (), **arguments)


PROGRAM = """
import json, jax, optax
from l2l.evaluation import curves as evaluate
from l2l import tasks
family = tasks.mlp(hidden=(), activations=("relu",), batch_size=8)
run = evaluate.evaluate(jax.random.key(3), optax.adam(1e-2), family, family.data(), 3, 5)
print(json.dumps([jax.device_count(), run.losses.tolist(), run.test_loss.tolist()]))
"""


def test_two_devices_give_what_one_gives():
    def run(devices):
        env = dict(os.environ, XLA_FLAGS=xla_flags(devices), JAX_PLATFORMS="cpu")
        cli = [sys.executable, "-c", PROGRAM]
        return subprocess.Popen(cli, env=env, stdout=subprocess.PIPE, text=True)

    one, two = (json.loads(process.communicate()[0]) for process in [run(1), run(2)])
    assert (one[0], two[0]) == (1, 2)
    assert one[1:] == two[1:]


def test_prefixes_of_a_constant_rate_equal_direct_runs():
    family, key = noisy(), jax.random.key(4)
    grid = Grid("adam", (1e-3, 1e-1, 3), eps_roots=(0.0, 1e-8), each=None, extensions=0)
    told = []
    problems, hear = Problems(key, 2), lambda share, text: told.append(share)
    tuned = tuning.tune(grid, family, (), problems, (3, 6), progress=hear)
    assert told == sorted(told) and told[-1] == 1  # All steps that were foreseen.
    assert len(tuned.points) == 2 * 2 * 3 * 3
    for point in tuned.points[:: len(tuned.points) // 5]:
        name = baselines.expression("adam", tuning.point_setting(point))
        direct = evaluate.evaluate(key, baselines.parse(name), family, (), 2, point.horizon)
        np.testing.assert_allclose(point.train_loss, direct.train_loss[:, 0], rtol=1e-5)


def test_a_grid_grows_where_its_best_is_at_the_edge_and_says_so():
    # With a ≤ 1 the rate for ten steps is near 1: sought from far below and from far above.
    problems = Problems(jax.random.key(0), 2)
    for rates, end in (((1e-3, 1e-1, 5), 1), ((4.0, 400.0, 5), -1)):
        grid = Grid("sgd", rates, schedules=("constant",), settings={"momentum": 0.0})
        tuned = tuning.tune(grid, bowl(), (), problems, (10,))
        best = tuned.by_train_loss[10]
        assert 0.3 < best.learning_rate < 2.5
        rates = [point.learning_rate for point in tuned.points]
        assert len(rates) > 5 and len(rates) % 3 == 2 and len(set(rates)) == len(rates)
        assert "were extended to" in tuned.notes[0] and len(tuned.notes) == 1, end
    grid = Grid("sgd", rates=(1e-6, 1e-5, 5), schedules=("constant",), extensions=1)
    stuck = tuning.tune(grid, bowl(), (), problems, (10,))
    assert "sits at the edge" in stuck.notes[-1] and "allow more than 1" in stuck.notes[-1]
    assert len(stuck.points) == 5 + tuning.EXTENSION


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"rates": (0.1, 0.01, 3)}, r"rates=\(0.1, 0.01, 3\) is not a grid"),
        ({"rates": (0.0, 0.1, 3)}, r"rates=\(0, 0.1, 3\) is not a grid"),
        ({"rates": (0.01, 0.1, 1)}, "2 rates or more"),
        ({"schedules": ("cosine", "linear")}, r"Unknown schedules \['linear'\]: choose from"),
    ],
)
def test_spaces_that_are_none_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Grid("adam", **settings).trials()


def test_of_equal_accuracies_the_lower_training_loss_wins():
    points = [
        tuning.Point(
            *("adam", 9, rate, "constant", 0.0, 0.0),
            *([train], [1.0], [1.0], [accuracy], [False]),
        )
        for rate, train, accuracy in ((0.1, 2.0, 0.9), (0.2, 1.0, 0.9), (0.3, 0.5, 0.8))
    ]
    assert tuning._best(points)[3][9].learning_rate == 0.2
    # In any order of trying.
    assert tuning._best(points[::-1])[3][9].learning_rate == 0.2


def test_the_cache_saves_the_work_and_knows_other_work(tmp_path, monkeypatch):
    def tune(key, **settings):
        grid = Grid("sgd", (0.1, 1.0, 3), ("cosine",), extensions=0, settings=settings)
        return tuning.tune(grid, bowl(), (), Problems(key, 2), (4,), cache_dir=tmp_path)

    first = tune(jax.random.key(0))
    files = set(tmp_path.iterdir())
    assert len(files) == 1
    other = tune(jax.random.key(1))
    momentum = tune(jax.random.key(0), momentum=0.5)
    assert len(set(tmp_path.iterdir())) == 3
    assert other.points[0].train_loss != first.points[0].train_loss
    assert momentum.points[0].train_loss != first.points[0].train_loss
    (file,) = files
    whole = file.read_text()
    for damaged in (whole[: len(whole) // 2], whole[:-9].replace("0", "1") + whole[-9:]):
        file.write_text(damaged)
        # Compared as text: there is no accuracy, and NaN is not NaN.
        assert str(tune(jax.random.key(0))) == str(first)  # Computed anew.
        assert file.read_text() == whole
    monkeypatch.setattr(evaluate, "compile_evaluation", lambda *a, **k: None)  # Not called now.
    assert str(tune(jax.random.key(0))) == str(first)


def test_nan_counts_as_infinite_and_never_wins():
    grid = Grid("sgd", rates=(1e-2, 1e4, 4), settings={"momentum": 0.0})
    tuned = tuning.tune(grid, bowl(), (), Problems(jax.random.key(0), 2), (60,))
    worst = max(tuned.points, key=lambda p: p.learning_rate)
    assert np.isinf(worst.train_loss).all() and all(worst.diverged)
    assert tuned.by_train_loss[60].learning_rate < 3 and tuned.by_test_accuracy == {}
    # Where all are lost none is the best, and further rates are no remedy.
    grid = grid._replace(rates=(1e6, 1e8, 3), schedules=("constant",))
    lost = tuning.tune(grid, bowl(), (), Problems(jax.random.key(0), 2), (60,))
    assert np.isinf([point.train_loss for point in lost.points]).all()
    assert len(lost.points) == 3 and lost.notes == []


def test_the_command_writes_table_json_and_figure(tmp_path):
    cli = [sys.executable, "-m", "l2l.evaluate", "--optimizer=adam,sgd(0.1, momentum=0.5)"]
    cli += ["--task=quadratic", "--set", "dimension=2", "--set", "batch_size=3"]
    cli += ["--horizons=4", "--seeds=2", "--baseline=none", f"--output={tmp_path / 'a'}"]
    env = dict(os.environ, JAX_PLATFORMS="cpu")
    out = subprocess.run(cli, env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    table = (tmp_path / "a" / "table.md").read_text()
    shown = out.stdout[out.stdout.index("## 4 steps") :].split("\n\n")[1]
    assert shown in table and "sgd(0.1, momentum=0.5)" in shown
    assert (tmp_path / "a" / "curves-4.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((tmp_path / "a" / "results.json").read_text())
    assert len(content["rows"]) == 2 and len(content["rows"][0]["each"]["train_loss"]) == 2


def test_options_are_read_as_typed():
    assert cli.split("adam, sgd(0.1, momentum=0.9)") == ["adam", "sgd(0.1, momentum=0.9)"]
    assert cli.split("{'a': 1, 'b': 2}, [3, 4],") == ["{'a': 1, 'b': 2}", "[3, 4]"]
    assert cli._assignment("hidden=64,64") == ("hidden", (64, 64))
    assert cli._assignment("activations=relu") == ("activations", "relu")
    cells = cli.read_cells([{"name": "mlp", "hidden": 4}], "activations=relu,tanh")
    names = [f"mlp-digits-4 activations={name}" for name in ("relu", "tanh")]
    assert [cell.name for cell in cells] == names
