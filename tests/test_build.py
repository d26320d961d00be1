"""Configurations become objects, or one sentence that says which key and what would do."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2l.console.errors import UserError
from l2l.data import datasets
from l2l.optimizers import adam, binding, registry
from l2l.storage import exports, loading
from l2l.training.experiment import build_experiment
from l2l.training.meta_optimizers import meta_optimizer

NAN = float("nan")
CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))

MISTAKES = [
    ({"tsak": {}}, "Unknown section 'tsak'.*Did you mean 'task'"),
    ({"optimizer": {"name": "lstn"}}, "Unknown optimizer 'lstn'.*Did you mean 'lstm'"),
    ({"optimizer": {"name": "lstm", "hiden_size": 3}}, "Did you mean 'hidden_size'"),
    ({"optimizer": {"name": "lstm", "hidden_size": "3"}}, "hidden_size='3'.* int is needed"),
    ({"optimizer": {"name": "lstm", "decays": 0.9}}, "decays=0.9"),
    ({"evaluation": {"horizons": (100, "")}}, r"horizons=.* is a tuple of int, str: Sequence"),
    ({"optimizer": {"hidden_size": 3}}, "has no name"),
    ({"optimizer": "lstm"}, "has no name"),
    ({"optimizer": {}, "evaluation": {"against": "random_search"}}, "optimizer {} has no name"),
    ({"optimizer": {"name": "by_parameter", "parts": "lstm", "labels": ()}}, "parts='lstm' of"),
    (
        {"optimizer": {"name": "by_parameter", "parts": {}, "labels": ("*", "net")}},
        r"labels=\('\*', 'net'\) of .* are no pairs",
    ),
    ({"optimizer": {"name": 3}}, "has no name"),
    ({"task": ()}, "nothing to train on"),
    ({"task": "mlp"}, "task 'mlp' has no name: write dict.*autoencoder"),
    ({"task": ("mlp", "conv")}, "task 'mlp' has no name"),
    ({"task": None}, "task None has no name"),
    ({"augmentations": "flip"}, "augmentation 'flip' has no name"),
    ({"task": {"name": "mlp", "augmentations": "flip"}}, "augmentation 'flip' has no name"),
    ({"evaluation": {"horizons": ()}}, "leaves the comparison without a length"),
    ({"evaluation": {"tasks": ()}}, "leaves nothing to compare on"),
    ({"evaluation": {"tasks": "mlp"}}, "evaluation.tasks='mlp' is no change"),
    ({"evaluation": {"tasks": ({}, "mlp")}}, "evaluation.tasks='mlp' is no change"),
    ({"meta": {"optimizer": "adam"}}, "meta-optimizer 'adam' has no name"),
    ({"meta": {"optimizer": ("clip", "adam")}}, "meta-optimizer 'clip' has no name"),
    ({"meta": {"optimizer": ()}}, r"meta.optimizer=\(\) takes no step"),
    (
        {"meta": {"optimizer": {"name": "sgd", "learning_rate": {"value": 1}}}},
        "schedule .* no name",
    ),
    ({"theta": {"loss": "l2"}}, "loss 'l2' has no name"),
    ({"task": {"name": "mlp", "augmentation": 1}}, "Unknown setting 'augmentation'"),
    ({"task": {"name": "nothing:here"}}, "could not be imported"),
    ({"task": {"name": "no/such/file.py:family"}}, "could not be imported"),
    ({"inner": {"family": 3}}, "Unknown setting 'family'.*length"),
    ({"estimator": {"name": "first_order", "teacher": 3}}, "Unknown setting 'teacher'"),
    ({"estimator": {"name": "pes"}, "imitation": {"weight": 0.1}}, "cannot imitate"),
    ({"optimizer": {"name": "learned_adam"}}, "choose 'truncated'"),
    ({"horizon": {"name": "stages", "horizons": (20, 10)}}, "do not increase"),
    ({"horizon": {"name": "log_uniform", "shortest": 50, "longest": 10}}, "wrong order"),
    ({"meta": {"steps": 0}}, "steps=0 in meta is too small: 1 or more is needed"),
    ({"optimizer": {"name": "lstm", "hidden_size": -1}}, "hidden_size=-1 in .* 1 or more"),
    (
        {"optimizer": {"name": "dm", "layers": 0}},
        "layers=0 in optimizer 'dm' is too small: 1 or more",
    ),
    ({"optimizer": {"name": "adam"}}, "'adam' has nothing to learn.* set learned=True"),
    (
        {"optimizer": {"name": "sgd"}, "estimator": {"name": "truncated"}},
        "'sgd' has nothing to learn.* theta.start=True",
    ),
    ({"inner": {"length": 0}}, "length=0 in inner is too small"),
    ({"task": {"name": "mlp", "hidden": (8, 0)}}, r"hidden=\(8, 0\) .* 1 or more"),
    ({"checkpoint": {"every": -1}}, "every=-1 .* 0 or more"),
    ({"meta": {"optimizer": {"name": "adma"}}}, "Did you mean 'adam'"),
    ({"meta": {"optimizer": {"name": "adam", "learning_rte": 1}}}, "Did you mean 'learning_rate'"),
    ({"meta": {"clip": 0}}, "meta.clip=0.0 is no length"),
    ({"meta": {"clip": -1.0}}, "meta.clip=-1.0 is no length"),
    ({"meta": {"clip": float("nan")}}, "meta.clip=nan is no length"),
    ({"checkpoint": {"every": 1.5}}, "every=1.5"),
    *(({"objective": {"cap": cap}}, f"cap={cap} leaves") for cap in (0.0, -1.0, NAN)),
    *(
        ({"inner": {"hide_horizon_probability": p}}, f"probability={p} is not a probability")
        for p in (-1.0, 2.0, NAN)
    ),
    ({"estimator": {"name": "first_order", "block": -3}}, "block=-3 is not a whole number"),
    ({"estimator": {"name": "pes", "sigma": float("inf")}}, "sigma=inf perturbs"),
    ({"horizon": {"name": "log_uniform", "growth": NAN}}, "horizon.growth=nan is out of range"),
    ({"task": {"name": "quadratic", "weight": NAN}}, "task.weight=nan is out of range"),
    *(
        ({"imitation": {name: value}}, f"imitation.{name}={value} is out of range")
        for name, value in {
            "weight": NAN,
            "until": -1.0,
            "final": -0.1,
            "learning_rate": 0.0,
        }.items()
    ),
    ({"seed": "a"}, "seed='a'"),
    ({"seed": -1}, "seed=-1 in config is no seed: use 0 to 4294967295"),
    ({"seed": 2**32}, "is no seed"),
    ({"seed": {1, 2}}, "is not text, a number"),
]


@pytest.mark.parametrize("config, sentence", MISTAKES, ids=[m[1][:25] for m in MISTAKES])
def test_a_mistake_is_one_sentence(config, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        build_experiment(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds_and_shows_its_command(path, monkeypatch):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    experiment = build_experiment(module.get_config())
    assert f"python -m l2l.launch --config=configs/{path.name}" in module.__doc__
    assert len(path.read_text().splitlines()) <= 70
    # The steps are a multiple of the group, so that none is cut to their common divisor.
    assert experiment.running.group == module.get_config().meta.group
    like = jax.eval_shape(experiment.optimizer.init, jax.random.key(0))
    jax.eval_shape(experiment.meta.meta_optimizer.init, like)


def test_chains_and_schedules_of_the_meta_optimizer():
    chain = (
        {"name": "clip_by_global_norm", "max_norm": 1},
        {"name": "sgd", "learning_rate": {"name": "cosine_decay_schedule", "init_value": 1.0}},
    )
    transform = meta_optimizer(chain, steps=10)
    state = transform.init(jnp.zeros(()))
    seen = []
    for _ in range(11):
        update, state = transform.update(jnp.float32(3.0), state)
        seen.append(float(update))
    # Clipped to 1, and the cosine lasts for `steps` where its config does not say for how many.
    assert seen[0] == -1.0 and seen[5] == pytest.approx(-0.5) and seen[10] == 0.0


@pytest.mark.parametrize("beside", [{"start": True}, {"loss": {"name": "l2"}}])
def test_a_fixed_optimizer_trains_a_start_or_a_loss(beside):
    exact = {"estimator": {"name": "pes"}, "objective": {"on": "validation"}}
    experiment = build_experiment({"optimizer": {"name": "sgd"}, "theta": beside, **exact})
    theta = jax.eval_shape(experiment.optimizer.init, jax.random.key(0))
    assert jax.tree.leaves(theta) and not jax.tree.leaves(theta.optimizer)


def test_no_meta_gradient_need_be_cut():
    assert build_experiment({"meta": {"clip": float("inf")}}).meta.clip == float("inf")


def test_groups_divide_the_steps():
    assert build_experiment({"meta": {"steps": 60, "group": 50}}).running.group == 10


def test_a_mixture_shares_data_and_takes_weights():
    experiment = build_experiment(
        {
            "task": (
                {"name": "mlp", "hidden": (4,), "weight": 2},
                {"name": "autoencoder"},
                {"name": "quadratic", "augmentations": ({"name": "rescale"},)},
            )
        }
    )
    assert experiment.reads == (0, 0, 1)
    assert [len(jax.tree.leaves(d)) for d in experiment.data()] == [6, 0]
    assert "rescale" in experiment.families[2].name


TASK = """
import jax
from l2l import TaskFamily

def family(scale: float = 1.0) -> TaskFamily:
    return TaskFamily(
        sample=lambda key: (),
        init=lambda key, problem: jax.random.normal(key, (3,)),
        batch=lambda key, problem, data, split: (),
        loss=lambda params, problem, batch: scale * (params**2).sum(),
    )
"""


def test_a_users_own_task_is_a_file(tmp_path):
    (tmp_path / "mine.py").write_text(TASK)
    name = f"{tmp_path}/mine.py:family"
    experiment = build_experiment({"task": {"name": name, "scale": 2.0}})
    assert float(experiment.families[0].loss(jnp.ones(3), (), ())) == 6.0
    with pytest.raises(ValueError, match="Did you mean 'scale'"):
        build_experiment({"task": {"name": name, "scael": 2.0}})


DATA = """
import numpy as np
from l2l import TaskFamily

def family(fill: float = 1.0) -> TaskFamily:
    return TaskFamily(
        sample=lambda key: (),
        init=lambda key, problem: np.zeros(3, np.float32),
        batch=lambda key, problem, data, split: data[0],
        loss=lambda params, problem, batch: ((params - batch) ** 2).sum(),
        data=lambda: (np.full(3, fill, np.float32),),
    )
"""


def test_two_tasks_of_one_factory_read_their_own_data(tmp_path):
    """And share what is equal."""
    (tmp_path / "mine.py").write_text(DATA)
    name = f"{tmp_path}/mine.py:family"
    tasks = [{"name": name, "fill": fill} for fill in (1.0, 2.0, 1.0)]
    experiment = build_experiment({"task": (*tasks, {"name": "mlp"}, {"name": "autoencoder"})})
    data = experiment.data()
    for j, fill in enumerate((1.0, 2.0, 1.0)):
        np.testing.assert_array_equal(experiment.data_of(data, j)[0], np.full(3, fill))
    assert experiment.data_of(data, 0) is experiment.data_of(data, 2)
    assert experiment.data_of(data, 3) is experiment.data_of(data, 4)  # Both read the digits.


def test_the_release_is_the_same_mixture_with_and_without_mnist(monkeypatch, tmp_path):
    """Where MNIST is not there and cannot be fetched, the run says so."""
    path = next(path for path in CONFIGS if path.stem == "release")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    here = module.get_config().to_dict()
    monkeypatch.setenv("L2L_DATA_DIR", str(tmp_path))
    assert module.get_config().to_dict() == here
    datasets._load.cache_clear()
    monkeypatch.setattr("sklearn.datasets.fetch_openml", unreachable)
    with pytest.raises(ValueError, match="mnist"):
        build_experiment(here).data()


def unreachable(*arguments, **settings):
    raise OSError("no network here")


BOTH = {
    "name": "by_parameter",
    "parts": {"net": {"name": "dm", "hidden_size": 2}, "adam": {"name": "adam"}},
    "labels": (("x_0", "net"), ("x_1", "adam")),
}


@pytest.mark.parametrize("section", [{"name": "lstm", "decays": (0.9, 0.99)}, BOTH], ids=str)
def test_two_loads_of_one_export_share_their_programs(tmp_path, section):
    theta = registry.optimizer(section).init(jax.random.key(0))
    path = exports.export(tmp_path / "it.safetensors", section, theta)
    params = {"x_0": jnp.ones(2), "x_1": jnp.ones(3)}
    sizes = set()
    for _ in range(2):
        loaded = loading.load(path)
        loaded.update(params, loaded.init(params), params)
        sizes.add((binding._begin._cache_size(), binding._advance._cache_size()))
    assert len(sizes) == 1


def test_injected_knobs_compile_no_step_anew():
    params = jnp.ones(3)
    injected = optax.inject_hyperparams(loading.load)("dm", learning_rate=0.5)
    state, sizes = injected.init(params), set()
    for _ in range(3):
        _, state = injected.update(params, state, params)
        sizes.add(binding._advance._cache_size())
    assert len(sizes) == 1


def test_what_a_user_registers_is_made_as_it_is_now(monkeypatch):
    """Also under a name of ours, and as a part."""
    ours = registry.optimizer({"name": "adam"})
    assert registry.optimizer({"name": "adam"}) is ours
    assert registry.optimizer({"name": "adam", "learning_rate": 0.1}) is not ours
    rate = [0.1]

    def mine():
        return adam.adam(rate[0])

    def first_step(section):
        transform = registry.optimizer(section).bind({"net": (), "adam": ()})
        params = {"x_0": jnp.ones(2), "x_1": jnp.ones(3)}
        return float(transform.update(params, transform.init(params), params)[0]["x_1"][0])

    fixed = {**BOTH, "parts": {"net": {"name": "adam"}, "adam": {"name": "adam"}}}
    steps = [first_step(fixed)]
    monkeypatch.setitem(registry.OPTIMIZERS, "adam", mine)
    steps.append(first_step(fixed))
    rate[0] = 0.2
    steps.append(first_step(fixed))
    assert steps == pytest.approx([-1e-3, -0.1, -0.2], rel=1e-4)


def test_two_optimizers_by_parameter_survive_their_export(tmp_path):
    theta = registry.optimizer(BOTH).init(jax.random.key(0))
    path = exports.export(tmp_path / "multi.safetensors", BOTH, theta)
    loaded = loading.load(path)
    params = {"x_0": jnp.ones(2), "x_1": jnp.ones(3)}
    updates, _ = loaded.update(params, loaded.init(params), params)
    adam = optax.adam(1e-3, eps_root=1e-8)
    expected, _ = adam.update(params["x_1"], adam.init(params["x_1"]))
    np.testing.assert_allclose(updates["x_1"], expected, rtol=1e-6)
    assert not np.allclose(updates["x_0"], expected[0])


def test_tasks_to_be_judged_on_replace_settings_and_lose_augmentations():
    experiment = build_experiment(
        {
            "task": {"name": "mlp", "hidden": (4,)},
            "augmentations": {"name": "rescale"},
            "evaluation": {"tasks": ({"activations": ("relu",)}, {"activations": ("tanh",)})},
        }
    )
    names = [name for name, _ in experiment.judged]
    assert names == [f"mlp-digits-4 activations={name}" for name in ("relu", "tanh")]
    assert "rescale" in experiment.families[0].name
