"""A stranger's export is checked before anything is built from it or memory is allocated for it."""

import json
import math

# No export of ours comes near: what is larger is not one, and is not read.
LARGEST_HEADER = 1 << 20
# A matrix with a side this long takes 1 GiB to precondition, in float32. Other sizes become shapes
# of theta, which the tensors in the file must have.
LARGEST_INTEGER = 1 << 14
MOST_NUMBERS = 64
MOST_KEYS = 64
DEEPEST = 10


def check(fine: bool, reason: str) -> None:
    """ValueError with the reason unless `fine`."""
    if not fine:
        raise ValueError(reason)


def header(file) -> dict:
    """The header of an open safetensors file, which holds that of l2l as text.

    Raises:
      ValueError, RecursionError: it is too long, no JSON, or has a key twice.
    """
    length = int.from_bytes(file.read(8), "little")
    check(length <= LARGEST_HEADER, f"it declares a header of {length} bytes")
    return table(file.read(length).decode())


def table(text) -> dict:
    """A JSON object. What has a key twice is refused: two readers could take it for two things."""
    check(isinstance(text, str), "its metadata are not text")

    def once(pairs):
        found = dict(pairs)
        check(len(found) == len(pairs), "its header has the same key twice")
        return found

    found = json.loads(text, object_pairs_hook=once)
    check(isinstance(found, dict), "its metadata are not a table")
    return found


def plausible(settings, num_tensors: int) -> None:
    """ValueError where settings ask for an optimizer that would take long to build, or much memory
    for every parameter that it is then given."""

    def visit(value, depth) -> int:
        """The number of layers in it."""
        check(depth < DEEPEST, f"its settings are nested more than {DEEPEST} deep")
        if isinstance(value, int):
            check(abs(value) <= LARGEST_INTEGER, f"{value} is more than {LARGEST_INTEGER}")
        if isinstance(value, float):
            check(math.isfinite(value), f"{value} is not finite")
        if not isinstance(value, dict | list):
            return 0
        if isinstance(value, dict):
            most = max(MOST_KEYS, num_tensors)  # Most parts have tensors of their own.
            check(len(value) <= most, f"{len(value)} keys in a setting are more than {most}")
            layers, children = value.get("layers", 0), [*value.values()]
        else:
            # Of decays, say, each of which is a moment more; names cost nothing.
            numbers = sum(isinstance(x, int | float) for x in value)
            check(
                numbers <= MOST_NUMBERS,
                f"{numbers} numbers in a setting are more than {MOST_NUMBERS}",
            )
            layers, children = 0, value
        own = max(layers, 0) if isinstance(layers, int) else 0
        return own + sum(visit(child, depth + 1) for child in children)

    # Each layer has tensors of its own.
    layers = visit(settings, 0)
    check(layers <= num_tensors, f"{layers} layers are too many for {num_tensors} tensors")
