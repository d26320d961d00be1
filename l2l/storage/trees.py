"""Pytrees of parameters in an export: their leaves as tensors, and the path of each in the header.

What is read back is made of dicts and lists: an attribute of a node of another kind becomes a key.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from l2l.storage import export_header

HELD = "holds"  # The key of the header that has {name of a tree: its paths}.
DEEPEST = 32


def paths(tree) -> list[list]:
    """The path of each leaf: keys of dicts and names of attributes as text, places as numbers."""
    return [[_step(key) for key in path] for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def tensors(name: str, tree) -> dict[str, np.ndarray]:
    """{tensor: leaf}, in the order of `paths`."""
    return {f"@{name}/{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(tree))}


def names(name: str, paths: Sequence) -> list[str]:
    """What the tensors of a tree with those paths are called."""
    return [f"@{name}/{i}" for i in range(len(paths))]


def declared(metadata: Mapping, known: Sequence[str]) -> dict[str, list[list]]:
    """{name: paths} of the trees that an export says it holds; ValueError where they cannot be."""
    check, held = export_header.check, metadata.get(HELD, {})
    check(isinstance(held, dict) and set(held) <= set(known), "what it holds is not known")
    for of_tree in held.values():
        check(isinstance(of_tree, list) and bool(of_tree), "its trees are not lists of paths")
        for path in of_tree:
            fine = isinstance(path, list) and 0 < len(path) <= DEEPEST
            check(fine, "a path in it is no path")
            check(all(type(key) in (str, int) for key in path), "a path in it has odd keys")
    return held


def tree(name: str, paths: Sequence, arrays: Mapping[str, Any]):
    """The tree with those paths, of the arrays that `tensors` gave names to."""
    check, whole = export_header.check, {}
    for tensor, path in zip(names(name, paths), paths, strict=True):
        node = whole
        for key in path[:-1]:
            node = node.setdefault(key, {})
            check(isinstance(node, dict), "a path in it goes on from a leaf")
        check(path[-1] not in node, "two paths in it are one")
        node[path[-1]] = arrays[tensor]
    return _lists(whole)


def _lists(node):
    """Dicts with the keys 0 … n − 1 as lists."""
    if not isinstance(node, dict):
        return node
    children = {key: _lists(child) for key, child in node.items()}
    if set(children) == set(range(len(children))):
        return [children[i] for i in range(len(children))]
    export_header.check(len({*map(type, children)}) == 1, "a list in it has gaps")
    export_header.check(all(type(key) is str for key in children), "a list in it has gaps")
    return children


def _step(key) -> str | int:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            value = getattr(key, attribute)
            return value if type(value) is int else str(value)
    return str(key)
