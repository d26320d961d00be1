"""The API reference has every public name, each with a docstring, and the commands of all pages are
those that l2l takes. That pages build and links lead somewhere, `mkdocs build --strict` says."""

import inspect
import pkgutil
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

import l2l
from l2l import launch, sweep
from l2l.console import configuration
from l2l.estimators.registry import ESTIMATORS
from l2l.optimizers.registry import OPTIMIZERS
from l2l.tasks.registry import AUGMENTATIONS, TASKS
from l2l.training import experiment, sections

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "launch" / "README.md", *sorted(DOCS.rglob("*.md"))]
REFERENCE = [
    name
    for page in sorted((DOCS / "api").glob("*.md"))
    for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
]


def find(name: str):
    """What a dotted name of the reference stands for: a module before its namesake, as there."""
    return pkgutil.resolve_name(name)


def documented(thing) -> bool:
    """Whether it has a docstring that somebody wrote: tuples and dataclasses come with one."""
    text = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    return bool(text) and not text.startswith(f"{getattr(thing, '__name__', '')}(")


def test_the_check_sees_what_is_missing():
    class Bare(NamedTuple):
        field: int

    class Derived(ValueError):
        pass

    assert not documented(Bare) and not documented(Derived) and not documented(lambda: 0)
    assert documented(l2l.TaskFamily) and documented(l2l.UserError)


@pytest.mark.parametrize("name", sorted({*(f"l2l.{n}" for n in l2l.__all__), *REFERENCE}))
def test_a_public_name_has_a_docstring(name):
    thing = find(name)
    assert documented(thing), f"{name} has no docstring"
    if inspect.isclass(thing):
        for method, function in inspect.getmembers(thing, inspect.isfunction):
            inherited = any(hasattr(base, method) for base in thing.__mro__[1:])
            assert method.startswith("_") or inherited or function.__doc__, f"{name}.{method}"


def test_every_public_name_is_in_the_reference():
    known = {id(find(name)) for name in REFERENCE}
    for name in l2l.__all__:
        thing = getattr(l2l, name)
        if inspect.ismodule(thing):
            assert (DOCS / "api" / f"{name}.md").is_file(), name
        else:
            assert id(thing) in known, name
    for table in (TASKS, AUGMENTATIONS, ESTIMATORS, OPTIMIZERS):
        for name, thing in table.items():
            # `by_parameter` of a configuration takes sections where the function takes optimizers.
            if name != "by_parameter":
                assert id(thing) in known, name


def test_a_page_names_every_choice():
    """Of optimizers, estimators, sections, configs and released optimizers."""
    page = (DOCS / "choosing.md").read_text()
    choices = {*OPTIMIZERS, *ESTIMATORS, *sections.SECTIONS, *sections.HORIZONS, *AUGMENTATIONS}
    choices |= {path.name for path in (ROOT / "configs").glob("*.py")} | {*l2l.released()}
    said = set(re.findall(r"[`\"]([\w.]+)[`\"]", page))
    missing = choices - said - {"adam"}
    assert not missing


def commands(module: str) -> list[str]:
    """The arguments of `python -m module` wherever a page gives them in full."""
    text = "\n".join(page.read_text() for page in PAGES).replace("\\\n", " ")
    found = re.findall(rf"python -m {re.escape(module)} ([^`\n#]*)", text)
    return sorted({line.strip() for line in found if "--config=configs/" in line})


def test_commands_that_train_are_taken(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("L2L_DATA_DIR", raising=False)
    tried = 0
    for line in commands("l2l.launch"):
        if "NAME" in line:
            continue
        argv = ["launch", *shlex.split(line, comments=True)]
        typed = configuration.parse(argv, launch._flags(), launch._known, launch.__doc__)
        experiment.build_experiment(typed.config)
        tried += 1
    for line in commands("l2l.sweep"):
        assert sweep.plan(["sweep", *shlex.split(line, comments=True)])[2], line
        tried += 1
    assert tried >= 6
