"""The tutorial's own words: its files, commands and programs run as written, with small budgets."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from quick import xla_flags

import l2l

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs" / "tutorial").glob("*.md"))
BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]*)\")?\n(.*?)^```", re.DOTALL | re.MULTILINE)
TRAINING = (
    *("--config.meta.steps=2", "--config.evaluation.horizons=(20,)"),
    *("--config.evaluation.num_problems=1", "--config.evaluation.every=0"),
)
# For other commands and for programs: what a page says, and what is run.
SMALLER = {
    "--horizons=100 ": "--horizons=20 ",
    "--seeds=4 ": "--seeds=1 ",
    "steps=200, num_problems=4, group=20": "steps=2, num_problems=1, group=1",
    "horizons=(100,), num_problems=2": "horizons=(20,), num_problems=1",
}


class Reader:
    """Someone who works through the pages in one folder, one after the other."""

    def __init__(self, folder: Path):
        self.folder, self.done, self.said = folder, 0, {}
        (folder / "configs").symlink_to(ROOT / "configs")
        self.environment = os.environ | {
            "PYTHONPATH": str(Path(l2l.__file__).parent.parent),
            "XLA_FLAGS": xla_flags(1),
        }

    def read(self, page: Path) -> str:
        """Does all that the pages up to this one say; returns what this one's program printed."""
        while self.done <= PAGES.index(page):
            self.said[PAGES[self.done]] = self._follow(PAGES[self.done].read_text())
            self.done += 1
        return self.said[page]

    def _follow(self, page: str) -> str:
        program = ""
        for language, title, text in BLOCK.findall(page):
            if language == "python" and title:
                (self.folder / title).write_text(text)
            elif language == "python":
                program += text
            elif not title:  # The others say in their title what they need.
                for line in text.replace("\\\n", " ").splitlines():
                    self._command(line)
        return self._run([sys.executable, "-c", smaller(program)])

    def _command(self, line: str) -> None:
        start, _, rest = line.partition(" -m ")
        assert start == "python", line
        if not rest.startswith("pip "):
            small = TRAINING if re.match(r"l2l\.(launch|sweep)", rest) else ()
            self._run([sys.executable, "-m", *shlex.split(smaller(rest)), *small])

    def _run(self, command: list[str]) -> str:
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout


def smaller(text: str) -> str:
    for said, done in SMALLER.items():
        text = text.replace(said, done)
    return text


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Reader:
    return Reader(tmp_path_factory.mktemp("tutorial"))


def test_there_are_five_parts():
    assert [page.name[:2] for page in PAGES] == ["1-", "2-", "3-", "4-", "5-"]


@pytest.mark.parametrize("said", SMALLER)
def test_what_is_made_smaller_is_said(said):
    assert any(said in page.read_text() for page in PAGES)


def test_train_one(reader):
    assert "loss after 100 steps:" in reader.read(PAGES[0])


def test_read_its_run(reader):
    said = reader.read(PAGES[1])
    assert "lstm after 2 meta-steps, seed 0" in said and "trained on: quadratic-10" in said
    # The files of its table are those of the run.
    rows = re.findall(r"^\| (`.*) \| .* \|$", PAGES[1].read_text(), re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`([^`]*)`", row)]
    assert len(names) >= 7
    for name in names:
        assert list((reader.folder / "runs/first").glob(name.replace("…", "*"))), name


def test_your_own_task(reader):
    reader.read(PAGES[2])
    assert "rosenbrock" in (reader.folder / "runs/rosenbrock/table.md").read_text()


def test_your_own_network(reader):
    assert "two_layers" in reader.read(PAGES[3])


def test_a_cluster(reader):
    reader.read(PAGES[4])
    assert (reader.folder / "runs/seeds/sweep.md").is_file()
