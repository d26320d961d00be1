"""Imports point one way, `import l2l` is light, and `load` stands on the optimizers alone."""

import ast
import configparser
import subprocess
import sys
from pathlib import Path

import pytest

import l2l

ROOT = Path(l2l.__file__).parent
GROUND = {"version", "console", "core", "cluster"}
# What each room may import from, besides itself. Every import counts, those inside functions too.
BELOW = {
    "version": set(),
    "console": set(),
    "core": {"console"},
    "cluster": {"console", "core"},
    "data": GROUND,
    "tasks": GROUND | {"data"},
    "optimizers": GROUND,
    "estimators": GROUND | {"optimizers"},
    "storage": GROUND | {"optimizers"},
    "evaluation": GROUND | {"data", "tasks", "optimizers", "storage"},
    "training": GROUND | {"data", "tasks", "optimizers", "estimators", "storage", "evaluation"},
}
DOORS = {"launch", "evaluate", "sweep"}  # Nothing imports from them.


def modules() -> dict[str, Path]:
    """Every file of the package, by the name it is imported under; installed, it has a folder more,
    of the released files."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found.pop("l2l.checkpoints", None)
    return found


def imports_of(name: str, known: dict[str, Path]):
    """The modules of l2l that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(known[name].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} imports relatively: spell the module out."
            if (node.module or "").split(".")[0] != "l2l":
                continue
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                yield inside if inside in known else node.module
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "l2l")


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    found = {name: set(imports_of(name, known)) for name in known}
    # The table of contents names everything, to import it when it is asked for.
    found.pop("l2l")
    return found


def test_every_room_imports_from_those_below_it_alone(graph):
    wrong = []
    for name, imported in graph.items():
        room = name.split(".")[1]
        assert room in BELOW or room in DOORS, f"l2l.{room} is no room: say in this test which."
        for other in imported:
            assert other != "l2l", f"{name} imports from the table of contents: name the module."
            below = other.split(".")[1]
            fine = (room in DOORS and below in BELOW) or below in {room, *BELOW.get(room, ())}
            wrong += [] if fine else [f"{name} imports {other}"]
    assert not wrong


def test_no_circle(graph):
    """Depth first: a file that is met again while what it imports is being visited is in one."""
    finished, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in finished:
            return
        path.append(name)
        for other in sorted(graph.get(name, ())):
            visit(other)
        finished.add(path.pop())

    for name in graph:
        visit(name)


def test_load_needs_neither_tasks_nor_training():
    program = (
        "import sys, l2l; l2l.load('lstm');"
        "rooms = {m.split('.')[1] for m in sys.modules if m.startswith('l2l.')};"
        "print(*sorted(rooms))"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert set(done.stdout.decode().split()) <= {*GROUND, "optimizers", "storage", "checkpoints"}


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


def test_type_checkers_see_the_same_contents():
    """The imports below TYPE_CHECKING are the table that `__getattr__` reads."""
    tree = ast.parse((ROOT / "__init__.py").read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If))
    typed = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            package = node.module == "l2l"
            home = (f"l2l.{alias.name}", None) if package else (node.module, alias.name)
            typed[alias.asname or alias.name] = home
    assert typed == l2l._CONTENTS
    assert sorted(typed) == sorted(l2l.__all__)


def test_the_wheel_holds_every_package():
    """setup.cfg lists packages by name: one that is missing there would be missing in the wheel."""
    setup = configparser.ConfigParser()
    assert setup.read(Path(__file__).parents[1] / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    own = {".".join(p.parent.relative_to(ROOT.parent).parts) for p in ROOT.rglob("__init__.py")}
    assert listed == own | {"l2l.checkpoints"}
