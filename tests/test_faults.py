"""Disks fill, directories vanish, clocks step back: one sentence, and what was good stays good."""

import errno
import io
import itertools
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import time

import jax
import numpy as np
import pytest

from l2l.console import errors
from l2l.console.errors import UserError
from l2l.data import datasets
from l2l.evaluation import figures
from l2l.optimizers import registry
from l2l.storage import exports, files, loading
from l2l.training import finish
from l2l.training.callbacks import DONE, TERMINATED
from l2l.training.experiment import build_experiment
from l2l.training.run import train
from l2l.training.run_log import RunLog


@pytest.fixture(autouse=True)
def no_comparison(monkeypatch):
    """The final comparison with tuned Adam costs more than all else here, and has its own tests."""

    def conclude(experiment, theta, directory, key, snapshot):
        path = exports.export(directory / exports.EXPORT, experiment.specification, theta)
        files.write(directory / finish.SUMMARY, b"concluded")
        return str(path)

    monkeypatch.setattr(finish, "conclude", conclude)


def at_step(step, action):
    """Callbacks: something happens to the machine in the group that ends at `step`."""

    def happens(loop, group):
        if loop.step == step:
            action()

    return [happens]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Bytes of the export of an uninterrupted run, made once."""
    made = {}

    def of(tiny):
        if not made:
            directory = tmp_path_factory.mktemp("whole") / "run"
            assert train(build_experiment(tiny), directory) == DONE
            made[0] = (directory / exports.EXPORT).read_bytes()
        return made[0]

    return of


@pytest.fixture
def disk(tmp_path):
    """A file system of 2 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def read_only():
    """(folder, whether) -> None. Permissions do not hold root back; a mount does."""
    mounted = []

    def change(folder, on):
        if os.geteuid():
            folder.chmod(0o555 if on else 0o755)
            return
        try:
            if on:
                for how in ("bind", "remount,bind,ro"):
                    command = ["mount", "-o", how, str(folder), str(folder)]
                    subprocess.run(command, check=True, capture_output=True)
                    mounted[:] = [folder]
            else:
                subprocess.run(["umount", str(folder)], check=True)
                mounted.clear()
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("mounting a folder on itself is not permitted here")

    yield change
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def fill(folder):
    """Writes until nothing fits."""
    with open(folder / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"0" * 512)
        except OSError as error:
            assert error.errno == errno.ENOSPC


def saved(directory):
    return sorted(int(p.name) for p in (directory / "checkpoints").iterdir() if p.name.isdigit())


def goes_on(tiny, directory, expected):
    """The cause is mended: the same command ends with the theta of a run that nothing befell."""
    assert train(build_experiment(tiny), directory) == DONE
    assert (directory / exports.EXPORT).read_bytes() == expected(tiny)


def befalls(tiny, directory, monkeypatch, action, step=6):
    """Something happens in a run when its first checkpoint is on the disk: the sentence it ends
    with."""

    def happens():
        deadline = time.monotonic() + 60
        while not (directory / "checkpoints" / "3").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        action()

    with pytest.raises(UserError) as error:
        train(build_experiment(tiny), directory, extra=at_step(step, happens))
    return str(error.value)


def test_a_disk_that_fills_up(tiny, disk, monkeypatch, expected, capfd):
    said = befalls(tiny, disk / "run", monkeypatch, lambda: fill(disk))
    assert re.fullmatch(r"\S+/run/\S+: No space left on device. Make room, then give .*", said)
    assert saved(disk / "run") == [3]
    # Nothing of Orbax's own on the screen: its threads know many words for the same.
    assert "Traceback" not in capfd.readouterr().err
    (disk / "filler").unlink()
    goes_on(tiny, disk / "run", expected)


def test_files_that_may_not_grow(tiny, tmp_path, monkeypatch, expected):
    """The same without a mount: a limit on the size of files, which Orbax meets in its threads."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def low():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, limit[1]))

    try:
        said = befalls(tiny, tmp_path / "run", monkeypatch, low)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "File too large. Raise the limit" in said
    assert saved(tmp_path / "run") == [3]
    goes_on(tiny, tmp_path / "run", expected)


@pytest.mark.parametrize("gone", ["", "checkpoints"])
def test_a_directory_that_vanishes(tiny, tmp_path, monkeypatch, expected, gone):
    directory = tmp_path / "run"
    said = befalls(tiny, directory, monkeypatch, lambda: shutil.rmtree(directory / gone))
    assert said.startswith(f"{directory}/checkpoints is gone")
    assert not list(directory.glob("checkpoints/*"))  # Not made anew behind the user's back.
    if gone:
        goes_on(tiny, directory, expected)


def test_a_directory_that_turns_read_only(tiny, tmp_path, monkeypatch, expected, read_only):
    directory = tmp_path / "run"
    folder = directory / "checkpoints"
    said = befalls(tiny, directory, monkeypatch, lambda: read_only(folder, True))
    assert str(folder) in said and "ake it " in said and "writable" in said
    with pytest.raises(UserError) as error:
        train(build_experiment(tiny), directory)
    assert "writable" in str(error.value)
    read_only(folder, False)
    assert saved(directory) == [3]
    goes_on(tiny, directory, expected)


@pytest.mark.parametrize("where", ["metrics.jsonl", "events"])
def test_logs_that_cannot_be_written(tmp_path, where):
    """Of either log: the caller hears of it, and neither waits for ever."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    out = RunLog(tmp_path, 100, stream=io.StringIO())
    out.log(1, {"loss": 1.0})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limit[1]))
        numbers = {"note": "x" * 500} if where == "metrics.jsonl" else {"x" * 500: 1.0, "y": 2.0}
        with pytest.raises(UserError) as error:
            for step in range(2, 100):
                out.log(step, numbers)
            out.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert re.fullmatch(rf"{tmp_path}\S*: File too large. Raise the limit.*", sentence_of(error))
    out = RunLog(tmp_path, 100, begun=1, stream=io.StringIO())  # The half line is dropped.
    out.log(2, {"loss": 2.0})
    out.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]


def sentence_of(error):
    return str(error.value)


def test_an_export_that_does_not_fit_leaves_the_old_one(tmp_path):
    path = tmp_path / exports.EXPORT
    specification = {"name": "lstm", "hidden_size": 2}
    theta = registry.optimizer(specification).init(jax.random.key(0))
    before = exports.export(path, specification, theta).read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
        with pytest.raises(UserError) as error:
            exports.export(path, specification, theta)
        with pytest.raises(UserError) as figure:
            figures.curves({"a": {"b": np.ones((2, 9))}}, tmp_path / "curves.png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert sentence_of(error).startswith(f"{path}: File too large.")
    assert sentence_of(figure).startswith(f"{tmp_path}/curves.png: File too large.")
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_a_half_written_export_of_a_run_is_written_anew(tiny, tmp_path, monkeypatch, expected):
    conclude = finish.conclude

    def dies(experiment, theta, directory, key, snapshot):
        (directory / exports.EXPORT).write_bytes(expected(tiny)[:200])
        raise errors.about(directory, OSError(errno.EIO, "Input/output error"))

    expected(tiny)
    monkeypatch.setattr(finish, "conclude", dies)
    with pytest.raises(UserError) as error:
        train(build_experiment(tiny), tmp_path)
    assert "The disk may be failing" in sentence_of(error)
    with pytest.raises(ValueError, match="not a complete export"):
        loading.load(tmp_path)
    monkeypatch.setattr(finish, "conclude", conclude)
    goes_on(tiny, tmp_path, expected)


def test_an_interrupt_during_the_comparison_ends_it_at_once(tiny, tmp_path, monkeypatch, expected):
    conclude = finish.conclude
    expected(tiny)  # With the conclusion of every test here.

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("went on")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        monkeypatch.setattr(finish, "conclude", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(build_experiment(tiny), tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    monkeypatch.setattr(finish, "conclude", conclude)
    goes_on(tiny, tmp_path, expected)


def test_a_clock_that_steps_back(tiny, tmp_path, monkeypatch, expected, capsys):
    """An hour back in the middle of a run, and a day at its resumption: steps decide, not times."""
    now, shift = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: now() + shift[0])

    def back():
        shift[0] = -3600.0
        os.kill(os.getpid(), signal.SIGTERM)

    assert train(build_experiment(tiny), tmp_path, extra=at_step(6, back)) == TERMINATED
    shift[0] = -86400.0
    goes_on(tiny, tmp_path, expected)
    assert saved(tmp_path) == [6, 9, 12]
    assert not re.search(r"-\d+:\d\d:\d\d left", capsys.readouterr().err)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    assert all(a["seconds"] <= b["seconds"] for a, b in itertools.pairwise(rows))
    assert len(list(tmp_path.glob("events.*"))) == 2  # The second did not overwrite the first.


def test_data_that_is_damaged_later_leaves_the_run_as_it_was(tiny, tmp_path, monkeypatch):
    """A run stops; its data file is cut; the same command says so and touches no checkpoint."""
    directory, data = tmp_path / "run", tmp_path / "data" / "mnist"
    data.mkdir(parents=True)
    for part, count in (("train", 60), ("t10k", 20)):
        pixels = struct.pack(">4B3I", 0, 0, 8, 3, count, 28, 28) + bytes(count * 784)
        (data / f"{part}-images-idx3-ubyte").write_bytes(pixels)
        labels = struct.pack(">4BI", 0, 0, 8, 1, count) + bytes(count)
        (data / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    monkeypatch.setenv("L2L_DATA_DIR", str(tmp_path / "data"))
    experiment = build_experiment(tiny)  # Of quadratics, which read this data and leave it.
    family = experiment.families[0]._replace(data=lambda: datasets.load("mnist14")[:0])
    experiment = experiment._replace(families=(family,))
    stop = at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(experiment, directory, extra=stop) == TERMINATED
    datasets._load.cache_clear()
    images = data / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"-ubyte has 46,940 bytes .* promises 47,040: .*fetch it"):
        train(experiment, directory)
    assert saved(directory) == [3]


@pytest.mark.parametrize("damaged", ["{", "[" * 100_000, "[1]", "\xff\xfe"])
def test_a_damaged_config_is_told_of_and_kept(tiny, tmp_path, damaged):
    (tmp_path / "config.json").write_bytes(damaged.encode("latin1"))
    with pytest.raises(ValueError, match="restore it, or choose another directory"):
        train(build_experiment(tiny), tmp_path)
    assert (tmp_path / "config.json").read_bytes() == damaged.encode("latin1")
