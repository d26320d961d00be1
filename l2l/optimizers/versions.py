"""What an export must record so that a later l2l treats it as this one does, or says why not.

A theta means something only together with its rule. So an export holds every setting, those left
at their defaults too, and the version of each rule it uses; a constant in a rule's module counts as
part of the rule. `tests/test_golden.py` holds the released optimizers to recorded updates, and so
notices a change of either:

- Give a new setting of a factory its line in `EARLIER`: the value with which the rule acts as it
  did before there was such a setting.
- After a change to what a rule does raise its number in `VERSIONS`, and write a `Change` that says
  what changed and which settings it concerns. Older exports with those settings are then refused
  with that sentence, and the others still load.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from l2l.console import schema
from l2l.console.errors import UserError
from l2l.optimizers.registry import OPTIMIZERS

VERSIONS = {
    "adam": 1,
    "by_parameter": 1,
    "dm": 1,
    "learned_adam": 1,
    "learned_adamw": 1,
    "lstm": 2,
    "per_tensor": 2,
    "rnnprop": 1,
    "sgd": 1,
}

# What a setting is where a file does not hold it: exports of format 1 held only those that their
# configuration named. These are the defaults of that time, whatever today's are, as JSON has them.
EARLIER: dict[str, dict[str, Any]] = {
    "adam": {
        "learning_rate": 1e-3,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "eps_root": 1e-8,
        "learned": False,
    },
    "by_parameter": {},
    "dm": {"hidden_size": 20, "layers": 2, "p": 5.0, "scale": 0.01},
    "learned_adam": {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.999, "eps_root": 1e-8},
    "learned_adamw": {
        "learning_rate": 1e-3,
        "weight_decay": 1e-2,
        "b1": 0.9,
        "b2": 0.999,
        "eps_root": 1e-8,
        "knots": 0,
    },
    "lstm": {
        "hidden_size": 8,
        "layers": 1,
        "learning_rate": 1e-3,
        "decays": [0.9, 0.99, 0.999],
        "second_decay": 0.999,
        "eps_root": 1e-8,
        "weight_decay": 0.0,
        "inputs": ["momentum", "gradient"],
        "output": "mixture",
        "tensor_size": 0,
        "matrix_size": 0,
        "anneal": 0.0,
    },
    "per_tensor": {
        "hidden_size": 16,
        "learning_rate": 0.01,
        "vector_rate": 1.0,
        "decays": [0.9],
        "second_decay": 0.999,
        "second_power": 0.0,
        "eps_root": 1e-12,
        "faded": 0.0,
        "mixture": False,
        "weight_decay": 0.0,
        "decay_anneal": 0.0,
        "decay_power": 0.0,
        "decay_fall": 0.0,
        "decay_noise": 0.0,
        "fitted_decay": 0.0,
        "fall_power": 0.0,
        "quiet": 0.0,
        "agreement": 0.0,
        "overshoot": 0.0,
        "warm_up": 0.0,
        "anneal": 1.0,
        "reach": 1.4,
        "bound": 0.0,
        "smallest": 0.03,
        "block_size": 256,
        "average_every": 5,
        "basis_every": 20,
        "size_power": 0.0,
        "depth_power": 0.0,
        "horizon_power": 0.0,
        "assumed_power": 0.0,
        "learn": "all",
    },
    "rnnprop": {
        "hidden_size": 20,
        "layers": 2,
        "decay": 0.95,
        "second_decay": 0.95,
        "scale": 0.1,
        "eps_root": 1e-8,
    },
    "sgd": {"learning_rate": 0.01, "momentum": 0.0, "learned": False, "tensors": []},
}


class OtherRule(UserError):
    """An export was made for a rule that acted otherwise; its text is the end of a sentence."""


class Change(NamedTuple):
    """What became of a rule.

    kind, version: which rule, and its number since then.
    what:          the change, as the end of a sentence: "…, since then {what}".
    concerns:      (settings) -> whether a rule with those settings acts otherwise.
    """

    kind: str
    version: int
    what: str
    concerns: Callable[[Mapping], bool] = lambda settings: True


CHANGES: tuple[Change, ...] = (
    Change(
        "lstm",
        2,
        "the basis of SOAP's directions follows with damping",
        lambda settings: settings["matrix_size"] > 0,
    ),
    Change(
        "per_tensor",
        2,
        "its network reads how far the gradients have fallen as well",
        lambda settings: settings["hidden_size"] > 0,
    ),
)


def complete(section: Mapping) -> dict:
    """A section `optimizer` with every setting of its factory, the defaults included, and so each
    of its parts."""
    return _with_parts(schema.complete("optimizer", OPTIMIZERS, section), complete)


def earlier(section: Mapping) -> dict:
    """A section as an export holds it, and from `EARLIER` what it lacks."""
    known = EARLIER.get(section["name"], {})
    return _with_parts({**known, **section}, earlier)


def rules_of(section: Mapping) -> dict[str, int]:
    """{kind: version} of the rules that a section uses; 1 for one that a user has registered."""
    return {part["name"]: VERSIONS.get(part["name"], 1) for part in walk(section)}


def check_rules(section: Mapping, rules: Mapping[str, int]) -> None:
    """Raises OtherRule where a rule of those versions did other than it does now."""
    for part in walk(section):
        kind, now = part["name"], VERSIONS.get(part["name"])
        then = rules.get(kind)
        if now is None or then == now:
            continue  # What it is that nobody knows is said where it is built.
        if type(then) is not int or then < 1:
            raise ValueError(f"it does not say which version of {kind!r} it was made for")
        if then > now:
            raise OtherRule(
                f"it was made for version {then} of {kind!r}, and this l2l has {now}: install "
                "the newer l2l that wrote it"
            )
        for change in CHANGES:
            if change.kind == kind and then < change.version and change.concerns(part):
                raise OtherRule(
                    f"it was made for version {then} of {kind!r}, and since version "
                    f"{change.version} {change.what}. Install the l2l that wrote it, train again, "
                    "or read it with other_rules=True and export its theta anew"
                )


def _with_parts(section: dict, change: Callable[[Mapping], dict]) -> dict:
    if section["name"] != "by_parameter":
        return section
    return {**section, "parts": {key: change(part) for key, part in section["parts"].items()}}


def walk(section: Mapping) -> Iterator[Mapping]:
    """The section, and those of its parts."""
    yield section
    if section["name"] == "by_parameter":
        for part in section["parts"].values():
            yield from walk(part)
