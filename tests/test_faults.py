"""Disks fill, directories vanish, clocks step back: one sentence, and what was good stays good."""

import errno
import os
import re
import resource
import shutil
import subprocess
import time

import pytest

from l2l import build, checkpoint, files, outcome, train


@pytest.fixture(autouse=True)
def no_comparison(monkeypatch):
    """The final comparison with tuned Adam costs more than all else here, and has its own tests."""

    def conclude(experiment, theta, directory, key, snapshot):
        path = checkpoint.export(directory / checkpoint.EXPORT, experiment.specification, theta)
        files.write(directory / outcome.SUMMARY, b"concluded")
        return str(path)

    monkeypatch.setattr(outcome, "conclude", conclude)


def at_step(monkeypatch, step, action):
    """Something happens to the machine in the group of meta-steps that ends at `step`."""
    summary = train._summary

    def happens(metrics, state, *rest):
        if int(state.step) == step:
            action()
        return summary(metrics, state, *rest)

    monkeypatch.setattr(train, "_summary", happens)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Bytes of the export of an uninterrupted run, made once."""
    made = {}

    def of(tiny):
        if not made:
            directory = tmp_path_factory.mktemp("whole") / "run"
            assert train.run(build.experiment(tiny), directory) == train.DONE
            made[0] = (directory / checkpoint.EXPORT).read_bytes()
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
    assert train.run(build.experiment(tiny), directory) == train.DONE
    assert (directory / checkpoint.EXPORT).read_bytes() == expected(tiny)


def befalls(tiny, directory, monkeypatch, action, step=6):
    """Something happens in a run when its first checkpoint is on the disk: the sentence it ends
    with."""

    def happens():
        deadline = time.monotonic() + 60
        while not (directory / "checkpoints" / "3").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        action()

    with monkeypatch.context() as patch:
        at_step(patch, step, happens)
        with pytest.raises(OSError) as error:
            train.run(build.experiment(tiny), directory)
    return files.sentence(error.value)


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
    low = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200, limit[1]))  # noqa: E731
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
    goes_on(tiny, directory, expected)


def test_a_directory_that_turns_read_only(tiny, tmp_path, monkeypatch, expected, read_only):
    directory = tmp_path / "run"
    folder = directory / "checkpoints"
    said = befalls(tiny, directory, monkeypatch, lambda: read_only(folder, True))
    assert str(folder) in said and "ake it " in said and "writable" in said
    with pytest.raises(OSError) as error:
        train.run(build.experiment(tiny), directory)
    assert "writable" in files.sentence(error.value)
    read_only(folder, False)
    assert saved(directory) == [3]
    goes_on(tiny, directory, expected)
