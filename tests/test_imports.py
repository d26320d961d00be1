"""Imports point one way, and `import l2l` is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import l2l

ROOT = Path(l2l.__file__).parent
# Each layer imports from those before it (and from itself).
LAYERS = [
    ("core", "storage.files", "cluster", "data", "console", "storage.export_header"),
    ("tasks", "optimizers"),
    ("estimators",),
    ("training.meta_step", "training.curriculum", "evaluate"),
    ("evaluation.report", "evaluation.cache", "evaluation.timing", "evaluation.tuning"),
    ("training.experiment", "training.diagnose"),
    ("storage.exports", "training.run_directory", "training.run_log", "evaluation.comparison"),
    ("storage.checkpoint", "evaluation"),
    ("training",),
    ("launch",),
    ("fleet",),
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}


def level(module: str) -> int:
    """Of a module, or else of its package."""
    known = LEVEL.get(module, LEVEL.get(module.split(".")[0]))
    assert known is not None, f"l2l.{module} has no layer: say in this test which it is."
    return known


def imports_of(path):
    """The modules of l2l that a file imports when it is itself imported."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "l2l":
            room = node.module[4:]
            for alias in node.names:
                inside = f"{room}.{alias.name}" if room else alias.name
                path = ROOT.joinpath(*inside.split("."))
                yield inside if path.is_dir() or path.with_suffix(".py").exists() else room
        elif isinstance(node, ast.Import):
            yield from (a.name[4:] for a in node.names if a.name.startswith("l2l."))


def test_imports_point_one_way():
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if module == "__init__":
            continue
        for imported in imports_of(path):
            if level(imported) > level(module):
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
