"""What a user can mend is one sentence; an error in their own code, or in ours, keeps its traceback
and says which function of which task was called with what."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from together import config_of

import l2l
from l2l.console.commands import command
from l2l.console.errors import UserError
from l2l.evaluation import cli, entries
from l2l.storage import exports, files, loading
from l2l.tasks import called, registry
from l2l.training import run_directory, sections, sweep_summary
from l2l.training.experiment import build_experiment
from l2l.training.run import train

TASK = """
import jax
import jax.numpy as jnp
from l2l import TaskFamily

def family(wrong: str = "", dimension: int = 3) -> TaskFamily:
    def sample(key):
        if wrong == "sample":
            raise KeyError("sample")
        return jnp.ones(2)

    def init(key, problem):
        if wrong == "nothing":
            return None
        if wrong == "counter":
            return {"w": jnp.ones(dimension), "count": jnp.zeros((), jnp.int32)}
        if wrong == "function":
            return {"w": jnp.ones(dimension), "activation": jnp.tanh}
        return {"w": jnp.ones(dimension), "b": jnp.zeros((dimension, 2), jnp.bfloat16)}

    def batch(key, problem, data, split):
        return None if wrong == "batch" else (jnp.ones((5, dimension)), split == "test")

    def loss(params, problem, batch):
        if wrong == "loss":
            return batch[0] @ jnp.ones(7)
        if wrong == "none":
            return None
        if wrong == "vector":
            return batch[0].sum(0) * params["w"]
        if wrong == "whole":
            return jnp.ones((), int)
        if wrong == "constant":
            return 0.5
        return ((batch[0] @ params["w"]) ** 2).mean()

    def accuracy(params, problem, batch):
        return params["nothing"]

    return TaskFamily(sample, init, batch, loss, accuracy)

def forgotten():
    family()
"""


@pytest.fixture
def task(tmp_path):
    """(wrong) -> a family of the file above, and what it is called."""
    path = tmp_path / "mine.py"
    path.write_text(TASK)
    return lambda wrong="": (registry.task({"name": f"{path}:family", "wrong": wrong}), path)


def through(family):
    """A problem, its parameters, a batch and both measures, as the programs call them."""

    def run(key):
        problem = family.sample(key)
        batch = family.batch(None, problem, (), "train")
        params = family.init(key, problem)
        return family.loss(params, problem, batch), family.accuracy(params, problem, batch)

    return jax.eval_shape(run, jax.random.key(0))


@pytest.mark.parametrize(
    "wrong, kind, note",
    [
        ("sample", KeyError, "function sample of task '{}:family', called as sample(key=key<fry>["),
        (
            "loss",
            TypeError,
            "function loss of task '{}:family', called as loss(params={{'b': bfloat16[3,2], "
            "'w': float32[3]}}, problem=float32[2], batch=(float32[5,3], False)).",
        ),
        ("batch", TypeError, "problem=float32[2], batch=None)."),
        ("", KeyError, "function accuracy of task '{}:family', called as accuracy(params={{"),
    ],
)
def test_an_error_in_a_task_is_its_own_and_says_where(task, wrong, kind, note):
    family, path = task(wrong)
    with pytest.raises(kind) as error:
        through(family)
    assert not isinstance(error.value, UserError)
    assert sum(note.format(path) in text for text in error.value.__notes__) == 1


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ("nothing", "Function init of task .* returned None"),
        ("none", "Function loss of task .* returned None, not one floating-point number"),
        ("vector", r"Function loss of task .* returned float32\[3\], not one"),
        ("whole", r"Function loss of task .* returned int32\[\], not one"),
        ("constant", "Function loss of task .* returned 0.5, a number that is the same for all"),
        ("function", r"Function init of task .* returned .*tanh.* among the parameters"),
        ("counter", r"Function init of task .* returned int32\[\] among the parameters"),
    ],
)
def test_what_a_task_may_not_return_is_one_sentence(task, wrong, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        through(task(wrong)[0])
    assert "\n" not in str(error.value)


def test_a_task_that_returns_nothing_is_one_sentence(task):
    path = task()[1]
    with pytest.raises(UserError, match=r"mine.py:forgotten' returned None: let it return"):
        registry.task({"name": f"{path}:forgotten"})


def test_long_arguments_are_cut():
    tree = {f"layer {i}": jnp.ones((i, 2)) for i in range(1, 100)}
    text = called.shapes(tree)
    assert text.startswith("{'layer 1': float32[1,2], 'layer 10': float32[10,2]")
    assert len(text) == called.LONGEST + 1


def start(place, name, *arguments):
    environment = os.environ | {"PYTHONPATH": str(Path(l2l.__file__).parent.parent)}
    return subprocess.run(
        [sys.executable, "-m", f"l2l.{name}", *arguments],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_a_users_bug_ends_the_commands_with_its_traceback_and_1(task, tmp_path):
    """A shape error in the user's loss, which is a TypeError and no ValueError of l2l's; and the
    next start may be of another configuration."""
    path = task()[1]
    config_of(tmp_path)
    mine = (f"--config.task.name={path}:family", "--config.task.wrong=loss")
    (tmp_path / "config.py").write_text(
        "from tiny import get_config as tiny\ndef get_config():\n    config = tiny()\n"
        "    config.task = dict(name='mine.py:family', wrong='loss')\n    return config"
    )
    done = start(tmp_path, "launch", "--config=config.py", "--workdir=run")
    assert done.returncode == 1 and "l2l: " not in done.stderr, done.stderr
    assert "Traceback" in done.stderr and "batch[0] @ jnp.ones(7)" in done.stderr
    assert "In function loss of task 'mine.py:family', called as loss(params=" in done.stderr
    assert not (tmp_path / "run").exists(), mine
    scored = ("--config=config.py", "--horizons=2", "--seeds=1", "--baseline=none")
    done = start(tmp_path, "evaluate", *scored)
    assert done.returncode == 1 and "called as loss(params=" in done.stderr, done.stderr


def test_a_command_tells_what_can_be_mended_and_nothing_else(capsys):
    def raising(error):
        def main(argv):
            raise error

        return command(main)

    assert raising(UserError("fact:\n cause,\x1b[2J remedy"))([]) == 2
    assert capsys.readouterr().err == "l2l: fact: cause, [2J remedy\n"
    assert raising(KeyboardInterrupt())([]) == 130
    for kind in (ValueError, OSError, KeyError, AttributeError, TypeError):
        with pytest.raises(kind):
            raising(kind("a bug"))([])
    assert capsys.readouterr().err == ""


# --- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", ["", "run", "run/deep"])
def test_a_file_where_a_directory_should_be(tiny, tmp_path, inside):
    (tmp_path / "afile").write_text("mine")
    workdir = tmp_path / "afile" / inside
    with pytest.raises(UserError, match=f"{workdir} cannot be a directory: .*/afile is a file"):
        train(build_experiment(tiny), workdir)
    assert (tmp_path / "afile").read_text() == "mine"


def test_errors_of_the_system_name_the_path_and_a_remedy(tmp_path):
    """None of them passes for damage, which would be another remedy."""
    for name in ("config.json", "results.json"):
        (tmp_path / "run" / name).mkdir(parents=True)
    for action in (
        lambda: run_directory.claim(tmp_path / "run", {}),
        lambda: sweep_summary._results(tmp_path / "run"),
        lambda: files.write(tmp_path / "no" / "file", b""),
        lambda: exports.read(tmp_path / "nothing"),
        lambda: exports.read(tmp_path),
    ):
        with pytest.raises(UserError, match=rf"^{tmp_path}\S*: .*\. Choose another path\.$"):
            action()


def test_an_output_that_cannot_be_is_told_before_anything_is_scored(tmp_path, monkeypatch, capsys):
    (tmp_path / "afile").write_text("mine")
    monkeypatch.setattr(cli.environment, "prepare", lambda: None)  # This process is the tests' own.
    scored = []
    monkeypatch.setattr(cli.comparison, "measure", lambda *_, **__: scored.append(True))
    for what in ("--task=quadratic", "--suite=quick"):
        argv = ["evaluate", what, f"--output={tmp_path}/afile/x"]
        assert cli.main(argv, sections.settings_of) == 2
        said = capsys.readouterr().err.splitlines()
        assert said == [f"l2l: --output={tmp_path}/afile/x cannot be a directory: "
                        f"{tmp_path}/afile is a file. Choose another."]  # fmt: skip
    assert not scored


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("lstmm", "'lstmm'. Did you mean lstm[?] The released .* lstm.*; those of optax adabelief"),
        ("mlpp", "Did you mean mlp[?]"),
        ("sgdd", "Did you mean sgd[?] The released ones are"),
        ("runs/mpl", "at runs/mpl: no such file or directory. Did you mean runs/mlp[?] The"),
        ("rnus/mlp", "Did you mean runs[?] The released ones are"),
        ("myrn", "Did you mean myrun[?]"),
        ("sdg(0.1)", "names 'sdg'"),
    ],
)
def test_an_optimizer_that_is_not_there(tmp_path, monkeypatch, text, sentence):
    (tmp_path / "runs" / "mlp").mkdir(parents=True)
    (tmp_path / "myrun").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence) as error:
        entries.read(text)
    assert "\n" not in str(error.value)


def test_a_name_is_not_moved_by_what_lies_in_the_working_directory(tmp_path, monkeypatch):
    for name in ("lstm", "adam"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert loading.locate("lstm") == loading.released()["lstm"]
    assert entries.read("lstm").name == "lstm"
    assert entries.read("adam").theta is None
    for path in ("./lstm", Path("lstm"), tmp_path / "lstm"):
        with pytest.raises(UserError, match=r"has no optimizer\.safetensors yet"):
            loading.locate(path)
