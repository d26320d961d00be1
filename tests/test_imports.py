"""Imports point one way, and `import l2l` is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import l2l

ROOT = Path(l2l.__file__).parent
# Each layer imports from those before it (and from itself). `tuning` is what evaluation compares
# with, `command` what `python -m l2l.evaluate` runs.
LAYERS = [
    ("console",),
    ("base", "files", "host", "cluster"),
    ("joining",),
    ("datasets", "layouts", "tabular", "features", "checks", "strangers", "tasks"),
    ("optimizers",),
    ("unroll",),
    ("estimators",),
    ("meta", "evaluate", "curriculum"),
    ("report", "cache", "speed", "tuning", "build", "diagnose"),
    ("exports", "directory", "progress", "scorecard"),
    ("checkpoint", "suite", "scoring", "command"),
    ("preflight",),
    ("outcome",),
    ("train",),
    ("launch", "fleet_summary"),
    ("fleet",),
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}


def imports_of(path):
    """The modules of l2l that a file imports when it is itself imported."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module == "l2l":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("l2l."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("l2l."))


def test_imports_point_one_way():
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        module = path.relative_to(ROOT).with_suffix("").parts[0]
        if module == "__init__":
            continue
        assert module in LEVEL, f"l2l.{module} has no layer: say in this test which it is."
        for imported in imports_of(path):
            if LEVEL[imported] > LEVEL[module]:
                wrong.append(f"{module} imports {imported}")
    assert not wrong


def test_the_package_is_light_and_lists_its_contents():
    program = (
        "import sys, l2l; heavy = {'jax', 'sklearn', 'matplotlib', 'orbax', 'haiku'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "[getattr(l2l, name) for name in l2l.__all__];"
        "heavy = {'sklearn', 'matplotlib', 'orbax', 'tensorboardX', 'tqdm'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "assert set(l2l.__all__) <= set(dir(l2l))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    with pytest.raises(AttributeError, match="it offers"):
        _ = l2l.nothing
