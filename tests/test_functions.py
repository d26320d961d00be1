"""Functions one can read: at most 60 lines of body and eight parameters."""

import ast
import inspect
from pathlib import Path

import pytest

import l2l
from l2l.estimators.registry import ESTIMATORS
from l2l.optimizers.registry import OPTIMIZERS
from l2l.tasks.registry import AUGMENTATIONS, TASKS

LINES, PARAMETERS = 60, 8
# Longer, or with more parameters, and why.
EXCEPTIONS = {
    "l2l.evaluation.comparison.measure": "what is measured and how often, each by its own name",
    "l2l.evaluation.curves.compile_evaluation": "what a program of inner runs depends on",
    "l2l.optimizers.guard.guard": "the settings of a transformation, as optax has them",
    "l2l.optimizers.per_tensor.per_tensor": "its halves share a dozen settings and little else",
    "l2l.optimizers.soap.soap": "the settings of a transformation, as optax has them",
    "l2l.tasks.supervised.family": "what the families of three modules pass on",
}
# The settings of a section of a configuration, which may be as many as it takes.
SECTIONS = {
    f"{f.__module__}.{f.__name__}"
    for table in (TASKS, AUGMENTATIONS, ESTIMATORS, OPTIMIZERS)
    for f in map(inspect.unwrap, table.values())
}


def found() -> dict[str, tuple[int, int]]:
    """{function: (lines of its body, parameters)} of all of l2l, those inside others too."""
    root, out = Path(l2l.__file__).parent, {}

    def visit(node, name):
        for child in ast.iter_child_nodes(node):
            inner = f"{name}.{child.name}" if hasattr(child, "name") else name
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                out[inner] = (lines(child), parameters(child.args))
            visit(child, inner)

    for path in root.rglob("*.py"):
        parts = path.relative_to(root.parent).with_suffix("").parts
        visit(ast.parse(path.read_text()), ".".join(parts))
    return out


def lines(function) -> int:
    """Of the body without its docstring."""
    documented = ast.get_docstring(function) is not None
    body = function.body[documented:]
    return function.end_lineno - body[0].lineno + 1 if body else 0


def parameters(arguments: ast.arguments) -> int:
    own = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return len([a for a in own if a.arg != "self"])


@pytest.fixture(scope="module")
def functions() -> dict[str, tuple[int, int]]:
    return found()


def test_the_count_is_of_the_body_and_of_what_is_passed():
    source = """
def f(self, a, /, b, *c, d=1, **e):
    '''One.

    Two.'''
    x = (
        1
    )
    return x
"""
    (function,) = ast.parse(source).body
    assert (lines(function), parameters(function.args)) == (4, 3)


def test_no_function_is_too_long_or_takes_too_much(functions):
    long = {name for name, (length, _) in functions.items() if length > LINES}
    wide = {name for name, (_, width) in functions.items() if width > PARAMETERS}
    assert not long - EXCEPTIONS.keys()
    assert not wide - EXCEPTIONS.keys() - SECTIONS


def test_every_exception_is_one(functions):
    for name in EXCEPTIONS:
        length, width = functions[name]
        assert length > LINES or width > PARAMETERS, f"{name} needs no exception any more"
