"""The process is the user's: what a call from a notebook or a script finds, it leaves."""

import io
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from quick import xla_flags
from together import config_of

import l2l
from l2l.cluster import environment
from l2l.console import progress
from l2l.console.errors import UserError
from l2l.evaluation import curves
from l2l.storage import checkpoint
from l2l.training import provenance, run, sections
from l2l.training.callbacks import DONE, TERMINATED
from l2l.training.experiment import build_experiment
from l2l.training.run import train
from l2l.training.run_directory import Signals
from l2l.training.run_log import RunLog


def strict(text):
    """JSON as the standard has it, without NaN and Infinity."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def state_of_the_process():
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    names = [None, *logging.root.manager.loggerDict, "absl", "asyncio", "matplotlib"]
    loggers = [logging.getLogger(name) for name in dict.fromkeys(names)]
    logs = {x.name: (x.level, x.disabled, [*x.filters], [*x.handlers]) for x in loggers}
    return handlers, logs, list(sys.path)


def test_a_run_leaves_handlers_loggers_and_programs_as_they_were(tiny, tmp_path, monkeypatch):
    """A whole run with its comparison, in this process: no logger is silenced, no signal handler
    stays, and the programs of the caller are not dropped."""
    monkeypatch.setattr(jax, "clear_caches", lambda: pytest.fail("the caches are not ours"))
    experiment = build_experiment(tiny)
    handlers, logs, path = state_of_the_process()
    assert train(experiment, tmp_path) == DONE
    handlers_now, logs_now, path_now = state_of_the_process()
    assert handlers_now == handlers and path_now == path
    assert {name: logs_now[name] for name in logs} == logs


def test_commands_drop_programs_where_notebooks_keep_them(monkeypatch):
    dropped = []
    monkeypatch.setattr(jax, "clear_caches", lambda: dropped.append(True))
    curves.forget()
    assert not dropped
    monkeypatch.setattr(environment, "prepared", True)
    curves.forget()
    assert dropped


def test_a_second_interrupt_is_a_keyboard_interrupt_and_ends_no_kernel():
    # Where the tests run in the background the shell has it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Signals() as signals:
            signal.raise_signal(signal.SIGINT)
            assert signals.got == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_that_python_did_not_install_is_no_error():
    before = signal.getsignal(signal.SIGTERM)
    try:
        with Signals() as signals:
            signals.before[signal.SIGTERM] = None  # As `signal.signal` returns it then.
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_others_log_is_heard_while_checkpoints_are_written(tmp_path, caplog):
    saver = checkpoint.Saver(tmp_path)
    with caplog.at_level(logging.INFO, "absl"):
        logging.getLogger("absl").warning("of the user's own")
        logging.getLogger("asyncio").warning("of another library")
        saver.save(1, {"w": np.ones(3)})
        saver.close()
    assert caplog.messages == ["of the user's own", "of another library"]


def test_a_command_does_not_hear_of_fonts_and_a_library_call_does():
    """In processes of their own, where matplotlib lists its fonts as it does on a first run."""
    program = (
        "import logging, sys; from l2l.cluster import environment;"
        "sys.argv[1] == 'command' and environment.prepare();"
        "logging.getLogger('matplotlib.font_manager').warning('building the font cache')"
    )
    heard = {}
    for who in ("command", "library"):
        done = subprocess.run(
            [sys.executable, "-c", program, who], capture_output=True, text=True, check=True
        )
        heard[who] = done.stderr
    assert heard == {"command": "", "library": "building the font cache\n"}


# --- metrics and configurations are JSON -------------------------------------------------------


def test_rows_of_the_log_are_json(tmp_path):
    out = RunLog(tmp_path, 9, stream=io.StringIO())
    numbers = {"loss": float("nan"), "best": float("inf"), "worst": -np.float32("inf"), "n": 3}
    out.log(1, numbers)
    out.close()
    row = strict((tmp_path / "metrics.jsonl").read_text())
    assert row == {"step": 1, "loss": None, "best": "inf", "worst": "-inf", "n": 3}


def test_a_board_forgets_what_comes_again(tmp_path):
    """Of TensorBoard's events, those of the steps after the one that a run goes on from."""
    from tensorboardX.proto import event_pb2

    RunLog(tmp_path, 9, begun=3, stream=io.StringIO()).close()
    (path,) = tmp_path.glob("events.out.tfevents.*")
    content, starts = path.read_bytes(), []
    while content:  # Of each event its length in 8 bytes, 4 of a checksum, and 4 behind it.
        size = int.from_bytes(content[:8], "little")
        event = event_pb2.Event.FromString(content[12 : 12 + size])
        if event.session_log.status == event_pb2.SessionLog.START:
            starts.append(event.step)
        content = content[16 + size :]
    assert starts == [4]


def test_a_configuration_is_json_and_its_own_again(tiny, tmp_path, monkeypatch):
    tiny["objective"]["cap"] = float("inf")
    monkeypatch.setattr(run, "_run", lambda *_: DONE)
    for _ in range(2):  # The second time it is compared with what was written.
        assert train(build_experiment(tiny), tmp_path) == DONE
    assert strict((tmp_path / "config.json").read_text())["objective"]["cap"] == "inf"


def test_a_default_is_the_same_written_down_or_not(tiny, tmp_path, monkeypatch):
    """In directories of before too, which hold what was typed alone."""
    monkeypatch.setattr(run, "_run", lambda *_: DONE)
    explicit = {**tiny, "start": "", "meta": {**tiny["meta"], "clip": 1.0}}
    explicit["task"] = {**tiny["task"], "weight": 1.0}
    assert train(build_experiment(tiny), tmp_path / "new") == DONE
    assert train(build_experiment(explicit), tmp_path / "new") == DONE
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text(json.dumps(tiny))
    for config in (tiny, explicit):
        assert train(build_experiment(config), tmp_path / "old") == DONE


def test_a_run_does_not_go_on_with_other_defaults(tiny, tmp_path, monkeypatch):
    """As of a later l2l; it goes on where the earlier one is written down."""
    monkeypatch.setattr(run, "_run", lambda *_: DONE)
    del tiny["checkpoint"]["keep"]
    assert train(build_experiment(tiny), tmp_path) == DONE
    later = {"checkpoint": lambda every=200, keep=5: None}
    monkeypatch.setattr(sections, "_RECORDS", sections._RECORDS | later)
    sentence = r"\(checkpoint.keep is 3 there, 5 here\)\. .* to go on in it, use its settings\.$"
    with pytest.raises(UserError, match=sentence):
        train(build_experiment(tiny), tmp_path)
    tiny["checkpoint"]["keep"] = 3
    assert train(build_experiment(tiny), tmp_path) == DONE


def test_a_filled_configuration_is_one_and_stays_as_it_is(tiny):
    """Of a mixture, augmentations, chains and schedules."""
    noise = {"name": "noise"}
    tiny["task"] = ({"name": "mlp", "augmentations": (noise,)}, {**tiny["task"], "weight": 2.0})
    schedule = {"name": "cosine_decay_schedule", "init_value": 0.1}
    tiny["meta"]["optimizer"] = (
        {"name": "clip", "max_delta": 1.0},
        {"name": "sgd", "learning_rate": schedule},
    )
    whole = sections.filled(tiny)
    assert whole["task"][0]["augmentations"][0].keys() > noise.keys()
    assert whole["meta"]["optimizer"][1]["learning_rate"]["alpha"] == 0.0
    assert sections.filled(whole) == whole
    assert build_experiment(whole).running == build_experiment(sections.filled(whole)).running


def test_what_a_run_was_made_of_is_noted_and_told_of(tiny, tmp_path):
    """Once for each change; what a crash has undone is forgotten."""
    experiment = build_experiment(tiny)
    family = experiment.families[0]

    def loss(params, problem, batch):
        return 2 * family.loss(params, problem, batch)

    other = experiment._replace(families=(family._replace(loss=loss),))
    data, more = (np.zeros(3),), (np.ones(3),)

    def record(experiment, data, step):
        return provenance.record(experiment, data, tmp_path, step)

    assert record(experiment, data, 0) is None
    assert record(other, data, 0) is None  # From the beginning again.
    assert record(experiment, data, 0) is None
    assert record(build_experiment(tiny), (np.zeros(3),), 3) is None  # Made anew, and the same.
    said = record(other, data, 6)
    assert said is not None and "task quadratic-2 computes something else." in said
    assert record(other, data, 9) is None
    said = record(other, more, 9)
    assert said is not None and "before meta-step 9: the data are others." in said
    rows = strict((tmp_path / "provenance.json").read_text())
    assert [row["meta_step"] for row in rows] == [0, 6, 9]
    rows[-1]["versions"]["l2l"] = "0.0.1"
    (tmp_path / "provenance.json").write_text(json.dumps(rows))
    said = record(other, more, 12)
    assert said is not None and f"l2l is {l2l.__version__}, and was 0.0.1." in said
    (tmp_path / "provenance.json").write_text("[{")
    assert record(other, more, 15) is None


# --- a failed start ----------------------------------------------------------------------------


def test_a_start_that_fails_leaves_no_claim(tiny, tmp_path, monkeypatch):
    """Data that is not there, a bug, an interrupt: the next start may be of another configuration,
    and what was in the directory is still there."""
    experiment = build_experiment(tiny)

    def fails():
        raise RuntimeError("no data")

    broken = experiment._replace(families=(experiment.families[0]._replace(data=fails),))
    with pytest.raises(RuntimeError, match="no data"):
        train(broken, tmp_path / "a" / "run")
    assert not list(tmp_path.iterdir())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    (tmp_path / "run" / "checkpoints").mkdir()
    with pytest.raises(RuntimeError, match="no data"):
        train(broken, tmp_path / "run")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"notes.txt", "checkpoints"}
    other = build_experiment(tiny | {"seed": 4})
    monkeypatch.setattr(run, "_run", lambda *_: DONE)
    assert train(other, tmp_path / "run") == DONE


@pytest.mark.parametrize("left", ["checkpoints/3/_METADATA", "metrics.jsonl"])
def test_a_claim_stays_where_something_was_made_or_was_claimed_before(
    tiny, tmp_path, monkeypatch, left
):
    experiment = build_experiment(tiny)

    def saves(experiment, directory, *_):
        (directory / left).parent.mkdir(parents=True, exist_ok=True)
        (directory / left).write_text('{"step": 3}')
        raise RuntimeError("later")

    def fails(*_):
        raise RuntimeError("at once")

    with monkeypatch.context() as patch:
        patch.setattr(run, "_run", saves)
        with pytest.raises(RuntimeError, match="later"):
            train(experiment, tmp_path / "saved")
    assert (tmp_path / "saved" / "config.json").exists() and (tmp_path / "saved" / left).exists()
    with monkeypatch.context() as patch:
        patch.setattr(run, "_run", lambda *_: TERMINATED)
        train(experiment, tmp_path / "claimed")
        patch.setattr(run, "_run", fails)
        with pytest.raises(RuntimeError, match="at once"):
            train(experiment, tmp_path / "claimed")
    assert (tmp_path / "claimed" / "config.json").exists()


def test_a_run_without_its_configuration_is_nobodys(tiny, tmp_path):
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds a run, and no config\.json .* another --workdir"):
        train(build_experiment(tiny), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"checkpoints", "lock"}


# --- terminals ---------------------------------------------------------------------------------


def test_the_time_left_is_told_at_the_pace_of_this_process(monkeypatch):
    """Not at that of what was done before it; and every ten seconds at most, but for the end."""
    now, out = [1000.0], io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = progress.Bar(40, "meta-step", 10, out)
    for second, done in ((1030, 20), (1035, 25), (1040, 30), (1041, 40)):
        now[0] = second
        bar.show(done, "fine")
    # 30 s for the first 10 of the 30 that were left, 40 s for 20.
    said = [line.partition("meta-step ")[2] for line in out.getvalue().splitlines()]
    wanted = [f"{n}/40, fine, {left} left" for n, left in ((20, "0:01:00"), (30, "0:00:20"))]
    assert said == [*wanted, "40/40, fine, 0:00:00 left"]


SWEEP = """
import sys
from l2l import sweep
from l2l.training import sweep_summary
sweep.run_all = lambda runs, root, environment: print(
    sweep_summary.write(root, runs, {})) or 0
sys.exit(sweep.main(sys.argv))
"""


# A whole run is long, and shows what the others do.
@pytest.mark.parametrize(
    "name", [pytest.param("launch", marks=pytest.mark.slow), "evaluate", "sweep"]
)
def test_a_terminal_that_is_not_utf_8_is_shown_question_marks(tmp_path, name):
    config_of(tmp_path)
    arguments = {
        "launch": "--config=tiny.py --config.meta.steps=3 --workdir=run×",
        "evaluate": "--optimizer=adam --task=quadratic --set=dimension=2 --horizons=2 --seeds=1 "
        "--baseline=none --output=scores×",
        "sweep": "--config=tiny.py --seeds=2 --workdir=all×",
    }[name].split()
    program = ["-c", SWEEP] if name == "sweep" else ["-m", f"l2l.{name}"]
    done = subprocess.run(
        [sys.executable, *program, *arguments],
        cwd=tmp_path,
        env=os.environ
        | {
            "PYTHONPATH": str(Path(l2l.__file__).parent.parent),
            "PYTHONIOENCODING": "ascii",
            "XLA_FLAGS": xla_flags(1),
        },
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"?" in done.stdout and done.stdout.isascii() and done.stderr.isascii()
