"""What is typed reaches the run: over what a configuration says and over what it leaves out, from
files that are ordinary Python modules."""

import inspect
import os
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from absl import flags

from l2l import sweep
from l2l.console import configuration, modules, schema
from l2l.console.errors import UserError
from l2l.optimizers.registry import OPTIMIZERS
from l2l.tasks import registry
from l2l.training import curriculum
from l2l.training.experiment import build_experiment, objective
from l2l.training.sections import HORIZONS, Evaluation, Running, Saving, settings_of

SMALL = """
def get_config():
    return dict(task=dict(name="quadratic", dimension=2), optimizer=dict(name="lstm"))
"""


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    """Files of one test are no neighbours of the next one's."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(modules, "_FOLDERS", [])
    for name in ("neighbour", "late"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(SMALL)
    return path


def read(path, *arguments):
    argv = ["launch", f"--config={path}", *arguments]
    return configuration.parse(argv, flags.FlagValues(), lambda: settings_of, "").config


@pytest.mark.parametrize(
    "typed, where, value",
    [
        ("seed=1", ("seed",), 1),
        ("start=lstm", ("start",), "lstm"),
        ("meta.clip=.1", ("meta", "clip"), 0.1),
        ("meta.clip=1", ("meta", "clip"), 1.0),
        ("meta.optimizer.learning_rate=1e-2", ("meta", "optimizer", "learning_rate"), 1e-2),
        ("evaluation.horizons=7", ("evaluation", "horizons"), (7,)),
        ("horizon.start=100", ("horizon", "start"), 100),  # None by default: of no type.
        ("inner.length=3", ("inner", "length"), 3),
        ("inner.stagger=false", ("inner", "stagger"), False),
        ("optimizer.learning_rate=1", ("optimizer", "learning_rate"), 1.0),
        ("task.weight=2", ("task", "weight"), 2.0),
        ("estimator.name=truncated", ("estimator", "name"), "truncated"),
    ],
)
def test_what_may_be_left_out_may_be_typed(small, typed, where, value):
    found = read(small, f"--config.{typed}").to_dict()
    for key in where:
        found = found[key]
    assert found == value and type(found) is type(value)
    build_experiment(read(small, f"--config.{typed}"))


def test_only_what_is_typed_is_filled_in(small):
    """A directory of an earlier run stays its configuration's."""
    assert read(small).to_dict() == schema.plain(read(small)) == eval_config(SMALL)
    assert read(small, "--config.meta.clip=.1").to_dict() == eval_config(SMALL) | {
        "meta": {"clip": 0.1}
    }


def eval_config(text) -> dict:
    names: dict = {}
    exec(text, names)
    return names["get_config"]()


def test_a_name_that_is_typed_decides_what_else_may_be(small):
    config = read(small, "--config.meta.optimizer.momentum=.9", "--config.meta.optimizer.name=sgd")
    assert config.meta.optimizer.name == "sgd" and config.meta.optimizer.momentum == 0.9
    config = read(small, "--config.horizon.name=stages", "--config.horizon.patience=2")
    assert config.to_dict()["horizon"] == {"name": "stages", "patience": 2}


def test_a_schedule_may_become_a_number(small):
    small.write_text(
        "def get_config():\n    rate = dict(name='cosine_decay_schedule', init_value=3e-3)\n"
        "    return dict(meta=dict(optimizer=dict(name='adam', learning_rate=rate)))"
    )
    config = read(small, "--config.meta.optimizer.learning_rate=1e-2")
    assert config.meta.optimizer.learning_rate == 1e-2
    init = "--config.meta.optimizer.learning_rate.init_value=1"
    assert read(small, init).meta.optimizer.learning_rate.init_value == 1.0


def test_every_section_and_setting_can_be_typed(small):
    """Over a configuration that says next to nothing: the defaults that are plain, one and all."""
    records = {
        "meta": Running,
        "evaluation": Evaluation,
        "checkpoint": Saving,
        "imitation": curriculum.Imitation,
        "objective": objective.objective,
        "optimizer": OPTIMIZERS["lstm"],
        "task": registry.TASKS["quadratic"],
        "horizon": HORIZONS["log_uniform"],
    }
    checked = 0
    for section, factory in records.items():
        for key, parameter in inspect.signature(factory).parameters.items():
            if isinstance(parameter.default, bool | int | float | str | tuple):
                config = read(small, f"--config.{section}.{key}={parameter.default}").to_dict()
                assert config[section][key] == parameter.default, (section, key)
                checked += 1
    assert checked > 3 * len(records)


@pytest.mark.parametrize(
    "typed, sentence",
    [
        ("meta.stps=3", r"--config\.meta\.stps.*Did you mean --config\.meta\.steps\?"),
        ("mta.steps=3", r"--config\.mta: .*Did you mean --config\.meta\?"),
        ("optimizer.hiden_size=3", "Did you mean --config.optimizer.hidden_size"),
        ("seed.x=3", "seed is 0 by default and has no keys"),
        ("task[3].x=3", "no such key"),
        ("meta.steps=a", "invalid literal"),
        ("task.dimension.x=3", "no such key"),
    ],
)
def test_a_key_that_is_not_there_is_one_sentence(small, typed, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        read(small, f"--config.{typed}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("x = 1", "has no function get_config"),
        ("def get_config(): pass", "returned None"),
        ("def get_config(): return 3", "returned 3"),
    ],
)
def test_a_file_that_is_no_configuration_is_one_sentence(small, text, sentence):
    small.write_text(text)
    with pytest.raises(UserError, match=sentence):
        read(small)
    with pytest.raises(UserError, match=r"smal\.py could not .*Did you mean .*small\.py"):
        read(small.with_name("smal.py"))


@pytest.mark.parametrize(
    "text, kind",
    [
        ("def get_config(): return {}['a']", KeyError),
        ("def get_config(): return None.a", AttributeError),
        ("def get_config(): return int('a')", ValueError),
        ("import nothing_of_that_name", ModuleNotFoundError),
        ("open('/nothing/there')", FileNotFoundError),
    ],
)
def test_an_error_in_a_users_file_is_its_own(small, text, kind):
    """Neither dressed as a key that is missing nor as anything else that l2l would say."""
    small.write_text(text)
    with pytest.raises(kind) as error:
        read(small)
    assert not isinstance(error.value, UserError) and str(small) in str(error.traceback[-1].path)


def test_the_tutorials_config_takes_a_seed_alone_and_in_a_sweep(tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs/tutorial/3-your-own-task.md").read_text()
    for name in ("my_task.py", "my_config.py"):
        start = f'```python title="{name}"\n'
        block = page[page.index(start) + len(start) :]
        (tmp_path / name).write_text(block[: block.index("```")])
    monkeypatch.chdir(tmp_path)
    assert read("my_config.py", "--config.seed=1").seed == 1
    runs = sweep.plan(["sweep", "--config=my_config.py", "--seeds=2"])[2]
    assert [run.seed for run in runs] == [0, 1]


# --- a user's file is a module ----------------------------------------------------------------

TASK = """
from __future__ import annotations

import dataclasses
import typing

import jax
from l2l import TaskFamily
from neighbour import SCALE

@dataclasses.dataclass
class Shape:
    size: int = 3
    note: typing.ClassVar[str] = "of the parameters"

def family(scale: float = 1.0, size: int = Shape().size) -> TaskFamily:
    def loss(params, problem, batch):
        import late
        return late.FACTOR * SCALE * scale * (params**2).sum()

    return TaskFamily(
        sample=lambda key: (),
        init=lambda key, problem: jax.random.normal(key, (size,)),
        batch=lambda key, problem, data, split: (),
        loss=loss,
    )
"""


def folder_of(parent, name, scale) -> str:
    """A folder with a task and what it imports from beside itself: the name of the task."""
    folder = parent / name
    folder.mkdir()
    (folder / "task.py").write_text(TASK)
    (folder / "neighbour.py").write_text(f"SCALE = {scale}")
    (folder / "late.py").write_text("FACTOR = 1.0")
    return f"{folder}/task.py:family"


def loss_of(name, **settings) -> float:
    family = registry.task({"name": name, **settings})
    return float(family.loss(jnp.ones(3), (), ()))


def test_a_users_file_is_an_ordinary_module(tmp_path):
    """Dataclasses, postponed annotations, a neighbour to import, at once and later, any folder, and
    a second file of the same name with a neighbour of the same name."""
    first, second = folder_of(tmp_path, "a", 2.0), folder_of(tmp_path, "b", 5.0)
    assert loss_of(first) == 3 * 2.0
    assert loss_of(second, scale=2.0) == 3 * 5.0 * 2.0
    assert loss_of(first) == 3 * 2.0
    with pytest.raises(UserError, match=r"size='3' .* int is needed"):  # Annotations are resolved.
        registry.task({"name": first, "size": "3"})
    shape = modules.attribute(first.removesuffix(":family"), "Shape", "task")
    assert pickle.loads(pickle.dumps(shape(4))) == shape(4)
    later = sys.path.index(str(tmp_path / "a"))
    assert later >= sys.path.index(os.path.dirname(os.__file__))  # It hides nobody's modules.


def test_a_file_that_has_changed_is_read_anew(tmp_path):
    (tmp_path / "it.py").write_text("VALUE = 1")
    place = str(tmp_path / "it.py")
    assert modules.load(place, "task") is modules.load(place, "task")
    (tmp_path / "it.py").write_text("VALUE = 22")
    assert modules.attribute(place, "VALUE", "task") == 22


def test_a_task_is_found_beside_the_configuration_that_names_it(tmp_path, monkeypatch):
    folder_of(tmp_path, "a", 2.0)
    (tmp_path / "a/config.py").write_text(
        "def get_config():\n    return dict(task=dict(name='task.py:family'))"
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    experiment = build_experiment(read("../a/config.py", "--config.task.scale=3"))
    assert float(experiment.families[0].loss(jnp.ones(3), (), ())) == 3 * 2.0 * 3.0


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("{}/a/task.py:famly", "no famly there: did you mean family?"),
        ("{}/a/tsk.py:family", r"no such file\. Did you mean .*/a/task\.py\?"),
        ("{}/aa/task.py:family", r"no such file\. Did you mean .*/a\?"),
        ("l2l.taks:mlp", "No module named 'l2l.taks'"),
        ("l2l.tasks:mlpp", "did you mean mlp?"),
        ("l2l.tasks:", "could not be imported"),
    ],
)
def test_a_task_that_is_not_there_is_one_sentence(tmp_path, name, sentence):
    folder_of(tmp_path, "a", 1.0)
    with pytest.raises(UserError, match=sentence):
        registry.task({"name": name.format(tmp_path)})


def test_a_setting_without_default_is_asked_for(tmp_path):
    (tmp_path / "it.py").write_text("def family(size: int): pass")
    with pytest.raises(UserError, match="needs size"):
        registry.task({"name": f"{tmp_path}/it.py:family"})


@pytest.mark.parametrize(
    "command, lines",
    [
        ("launch", ["--workdir", "--num_processes", "--config.section.key=value"]),
        ("sweep", ["--seeds", "--sweep", "--index", "--gather", "--workdir", "--config:"]),
        (
            "evaluate",
            ["--optimizer", "--suite", "--vary", "--untrained, --nountrained", "--config:"],
        ),
    ],
)
def test_help_lists_the_flags(command, lines):
    done = subprocess.run(
        [sys.executable, "-m", f"l2l.{command}", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr
    assert all(f"\n  {line}" in done.stdout for line in lines)
    assert f"python -m l2l.{command}" in done.stdout


def test_a_sweep_keeps_nested_tuples_whole():
    assert sweep._choices("task=((1,2),(3,4)),[5,(6,7)],8") == [
        "task=((1,2),(3,4))",
        "task=[5,(6,7)]",
        "task=8",
    ]


def test_a_users_task_trains_where_its_module_is_its_own(tmp_path):
    """The whole way to the compiled program: shapes of a mixture of two files of one name."""
    names = [folder_of(tmp_path, "a", 2.0), folder_of(tmp_path, "b", 5.0)]
    experiment = build_experiment({"task": tuple({"name": name} for name in names)})
    losses = [jax.jit(family.loss)(jnp.ones(3), (), ()).item() for family in experiment.families]
    assert losses == [6.0, 15.0]
