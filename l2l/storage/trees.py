"""Pytrees of parameters in an export: their leaves as tensors, and the path of each in the header.

What is read back is made of dicts and lists: an attribute of a node of another kind becomes a key,
and a list in which places are empty is a dict by place.
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
            fine = isinstance(path, list) and len(path) <= DEEPEST
            check(fine, f"the path of a tensor is not a list of at most {DEEPEST} keys")
            fine = all(type(key) in (str, int) for key in path)
            check(fine, "the path of a tensor has keys that are neither text nor integers")
    return held


def tree(name: str, paths: Sequence, arrays: Mapping[str, Any]):
    """The tree with those paths, of the arrays that `tensors` gave names to."""
    check, whole = export_header.check, {}
    for tensor, path in zip(names(name, paths), paths, strict=True):
        # Below a key of its own, since the path of a tree that is a single array is empty.
        *above, last = (name, *path)
        node = whole
        for key in above:
            node = node.setdefault(key, {})
            check(isinstance(node, dict), "the path of one tensor begins with that of another")
        check(last not in node, "two tensors have the same path")
        node[last] = arrays[tensor]
    return _lists(whole[name])


def _lists(node):
    """Dicts with the keys 0 … n − 1 as lists; with gaps they stay dicts, so that each array keeps
    its path."""
    if not isinstance(node, dict):
        return node
    children = {key: _lists(child) for key, child in node.items()}
    if set(children) == set(range(len(children))):
        return [children[i] for i in range(len(children))]
    # JAX has no order for such keys.
    export_header.check(
        len({*map(type, children)}) == 1, "a node has both text and numbers as keys"
    )
    return children


def _step(key) -> str | int:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            value = getattr(key, attribute)
            return value if type(value) is int else str(value)
    return str(key)
