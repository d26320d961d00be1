"""Configurations are checked against the signatures of what they call: a misspelt key or a value of
the wrong type stops before anything is computed, with the nearest that would do."""

import difflib
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from l2l.console.errors import UserError

# JAX takes the last 32 bits of a seed: larger ones, and negative ones, would be others in disguise.
SEEDS = 2**32


def fill(section: str, record: type, settings: Mapping):
    """A NamedTuple from a section of the configuration."""
    return record(**check(section, record, settings))


def check(where: str, factory: Callable, settings: Mapping, hidden=()) -> dict:
    """The settings, if each is a parameter of `factory`, of its annotated type, and no count that
    is less than 1.

    Lists become tuples and, where a float is wanted, ints become floats.
    """
    if not isinstance(settings, Mapping):
        raise UserError(f"{where} is {settings!r}, where settings are expected: dict(key=value).")
    parameters = inspect.signature(factory).parameters
    hints = _hints(factory)
    valid = [
        key
        for key, parameter in parameters.items()
        if key not in hidden and parameter.kind is not parameter.VAR_KEYWORD
    ]
    out = {}
    for key, value in settings.items():
        if key not in valid:
            raise UserError(unknown("setting", key, valid, where))
        out[key] = fits(where, key, value, hints.get(key, Any))
        least = _least(factory, parameters[key], hints.get(key))
        if least is not None and min(_tuple(out[key]), default=least) < least:
            raise UserError(f"{key}={value!r} in {where} is too small: {least} or more is needed.")
    return out


def make(kind: str, table: Mapping[str, Callable], settings: Mapping, given: Mapping = {}):
    """table[settings["name"]] called with the other settings and with those of what is `given` by
    the program that it takes."""
    factory, rest = factory_of(kind, table, settings)
    name, known = settings["name"], inspect.signature(factory).parameters
    own = {key: value for key, value in given.items() if key in known}
    arguments = {**own, **check(f"{kind} {name!r}", factory, rest, given)}
    lacking = [
        key
        for key, parameter in known.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and key not in arguments
    ]
    if lacking:
        raise UserError(f"The {kind} {name!r} needs {', '.join(lacking)}: add it to its section.")
    return factory(**arguments)


def settings_of(factory: Callable, hidden: Sequence[str] = ()) -> dict[str, Any]:
    """{parameter: its default, or None where it has none}, but for those that are hidden."""
    return {
        key: None if parameter.default is parameter.empty else parameter.default
        for key, parameter in inspect.signature(factory).parameters.items()
        if key not in hidden and parameter.kind is not parameter.VAR_KEYWORD
    }


def complete(kind: str, table: Mapping[str, Callable], section: Mapping) -> dict:
    """A section, checked as `make` checks it, and with the defaults of what it leaves out."""
    factory, rest = factory_of(kind, table, section)
    parameters = inspect.signature(factory).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return {
        "name": section["name"],
        **defaults,
        **check(f"{kind} {section['name']!r}", factory, rest),
    }


def factory_of(kind: str, table: Mapping[str, Callable], settings: Mapping):
    """(table[settings["name"]], the other settings)."""
    settings = named(kind, table, settings)
    name = settings.pop("name")
    if name not in table:
        raise UserError(unknown(kind, name, table))
    return table[name], settings


def named(kind: str, table: Mapping[str, Callable], settings) -> dict:
    """A section that has a name, as a dict."""
    if not isinstance(settings, Mapping) or not isinstance(settings.get("name"), str):
        raise UserError(
            f"The {kind} {settings!r} has no name: write dict(name=…, …) with one of "
            f"{', '.join(sorted(table))}."
        )
    return dict(settings)


def several(sections) -> tuple:
    """One section, or a sequence of them, as a tuple of sections. What is neither, like a name that
    was written in place of a section, counts as one, so that the sentence about it names all of
    it."""
    return tuple(sections) if isinstance(sections, list | tuple) else (sections,)


def _least(factory, parameter, hint) -> int | None:
    """What a whole number, or each of several, must be at least: those of l2l that are positive by
    default count something. `every` may be 0, for never; a stranger's number may be anything."""
    several = typing.get_args(hint) == (int,)
    if factory.__module__.partition(".")[0] != "l2l" or not (hint is int or several):
        return None
    default = (1,) if parameter.default is parameter.empty else parameter.default
    if not all(x >= 1 for x in _tuple(default)):
        return None
    return 0 if parameter.name == "every" else 1


def _tuple(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def fits(where: str, key: str, value, hint) -> Any:
    """The value in the type of `hint`; UserError where it is of another."""
    if _is(value, hint):
        return tuple(value) if isinstance(value, list) else value
    if isinstance(value, int) and not isinstance(value, bool) and _is(float(value), hint):
        return float(value)
    wanted = getattr(hint, "__name__", None) if isinstance(hint, type) else None
    found = type(value).__name__
    if isinstance(value, list | tuple) and value:
        found += f" of {', '.join(sorted({type(x).__name__ for x in value}))}"
    raise UserError(
        f"{key}={value!r} in {where} is a {found}: "
        f"{wanted or str(hint).replace('typing.', '').replace('collections.abc.', '')} is needed."
    )


def seed(where: str, value) -> int:
    """The value as a seed of random numbers; UserError where it is none."""
    value = fits(where, "seed", value, int)
    if not 0 <= value < SEEDS:
        raise UserError(f"seed={value} in {where} is no seed: use 0 to {SEEDS - 1}.")
    return value


def unknown(kind: str, name, valid, where: str = "") -> str:
    """The sentence about a name that is not known: the nearest that is, and all of them."""
    valid = sorted(map(str, valid))
    near = difflib.get_close_matches(str(name), valid, 1, 0.5)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    place = f" in {where}" if where else ""
    return f"Unknown {kind} {name!r}{place}. {hint}There is {', '.join(valid) or 'none'}."


def plain(config) -> Any:
    """A configuration as dicts, tuples, strings and numbers alone."""
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if isinstance(config, Mapping):
        return {str(key): plain(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return tuple(plain(value) for value in config)
    if config is None or isinstance(config, bool | int | float | str):
        return config
    raise UserError(f"{config!r} in a configuration is not text, a number, a tuple or a dict.")


def _hints(factory) -> dict:
    try:
        return typing.get_type_hints(factory)
    except (NameError, TypeError):  # Annotations of other libraries need not resolve.
        return {}


def _is(value, hint) -> bool:
    """Whether a plain value fits an annotation; annotations beyond plain data fit everything."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_is(value, one) for one in arguments)
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        return (
            isinstance(value, list | tuple)
            and len(value) == len(arguments)
            and all(map(_is_close, value, arguments))
        )
    if origin in (tuple, list, Sequence):
        return isinstance(value, list | tuple) and all(_is_close(x, arguments[0]) for x in value)
    if Callable in (hint, origin):
        return callable(value)
    if hint is bool:
        return isinstance(value, bool)
    if hint in (int, float):
        return isinstance(value, hint) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    if hint in (None, type(None)):
        return value is None
    return True


def _is_close(value, hint) -> bool:
    return _is(value, hint) or (type(value) is int and _is(float(value), hint))
