"""A stranger's export is checked before anything is built from it or memory is allocated for it."""

import json

# No export of ours comes near: what is larger is not one, and is not read.
LARGEST_HEADER = 1 << 20
LARGEST_NUMBER = 4096
LONGEST_LIST = 64
DEEPEST = 6


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
        check(len(found) == len(pairs), "a key stands in it twice")
        return found

    found = json.loads(text, object_pairs_hook=once)
    check(isinstance(found, dict), "its metadata are not a table")
    return found


def plausible(settings, num_tensors: int) -> None:
    """ValueError where settings hold a number that takes long to build."""

    def visit(value, depth):
        check(depth < DEEPEST, "its settings are too deep")
        if isinstance(value, int | float):
            check(abs(value) <= LARGEST_NUMBER, f"{value} is too large a setting")
        if isinstance(value, dict):
            # Each layer and each part has tensors of its own.
            layers = value.get("layers", 1)
            small = not isinstance(layers, int) or layers <= num_tensors
            check(small, f"layers={layers} is too many")
        if isinstance(value, dict | list):
            most = max(LONGEST_LIST, num_tensors) if isinstance(value, dict) else LONGEST_LIST
            check(len(value) <= most, f"{len(value)} values are too many for a setting")
            for child in value.values() if isinstance(value, dict) else value:
                visit(child, depth + 1)

    visit(settings, 0)
