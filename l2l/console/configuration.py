"""Command lines: flags, a configuration from a user's file, and the settings typed over it."""

import ast
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from l2l.console import modules, schema
from l2l.console.errors import UserError, printable

# (path of a section, configuration) -> {key: default} of it, or None where any key may be.
Known = Callable[[tuple[str, ...], Any], Mapping[str, Any] | None]
OVERRIDE = re.compile(r"--?(no)?config\.([^=]+)(?:=(.*))?", re.DOTALL)


class Typed(NamedTuple):
    """values: of the flags. config: a ConfigDict, with what was typed over it, or None without
    --config; name: of its file, without folder and ending."""

    values: flags.FlagValues
    config: Any
    name: str


def parse(
    argv: Sequence[str], values: flags.FlagValues, known: Callable[[], Known], about: str | None
) -> Typed:
    """Reads a command line.

    What may be left out of a configuration may be typed over it: its default is filled in first.
    `--help` in any spelling prints the flags and ends the program.

    Args:
      argv: with the name of the program before it.
      values: the flags of the command, defined but for --config.
      known: () -> what may stand in which section; asked only where something is left out.
      about: the command's docstring, which `--help` begins with.

    Raises:
      UserError: a flag, a key or a value is wrong, or the file is no configuration.
    """
    if set(argv[1:]) & {"--help", "-help", "-h", "--helpfull", "--helpshort", "-?"}:
        _print_help(values, about or "")
        raise SystemExit(0)
    try:
        place, rest = _config_of(values.read_flags_from_files(list(argv), force_gnu=False))
        config = None if place is None else read(place)
        if config is not None:
            _fill(config, rest, known)
            _define(config, rest, values)
        elif typed := [text for text in rest if OVERRIDE.fullmatch(text)]:
            raise UserError(f"{typed[0]} has no configuration to change: add --config=file.py.")
        left = values(rest)[1:]
    except flags.UnrecognizedFlagError as error:
        near = difflib.get_close_matches(error.flagname, [*values, "config"], 1)
        hint = f"Did you mean --{near[0]}?" if near else "--help lists those there are."
        raise UserError(f"Unknown flag --{error.flagname}. {hint}") from error
    except flags.Error as error:
        raise UserError(str(error)) from error
    if left:
        raise UserError(f"unexpected arguments: {' '.join(left)}; write flags as --name=value")
    return Typed(values, config, Path((place or "").partition(":")[0]).stem)


def read(place: str) -> ConfigDict:
    """What `get_config()` of a file returns; "file.py:text" calls `get_config("text")`.

    Raises:
      UserError: there is no such file, or it is no configuration. What its code raises is passed
        on as it is.
    """
    path, colon, text = place.partition(":")
    module = modules.load(path, "--config")
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise UserError(
            f"--config={path} has no function get_config: a configuration file must have one "
            "that returns a ConfigDict of ml_collections."
        )
    config = get_config(text) if colon else get_config()
    if not isinstance(config, ConfigDict | Mapping):
        raise UserError(
            f"get_config() of --config={path} returned {config!r}: it must return a ConfigDict of "
            "ml_collections, or a dict."
        )
    config = config if isinstance(config, ConfigDict) else ConfigDict(dict(config))
    config.unlock()
    return config


def split(text: str) -> list[str]:
    """The parts between commas that are in no brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _config_of(argv: list[str]) -> tuple[str | None, list[str]]:
    """(what --config is given, the command line without it)."""
    place, rest, texts = None, [], iter(argv)
    for text in texts:
        found = re.fullmatch(r"--?config(?:=(.*))?", text)
        if text == "--":
            return place, [*rest, text, *texts]
        if not found:
            rest.append(text)
            continue
        place = next(texts, "") if found[1] is None else found[1]
        if not place:
            raise UserError("--config has no value: name a file, like --config=configs/mlp.py.")
    return place, rest


def _define(config: ConfigDict, argv: list[str], values: flags.FlagValues) -> None:
    """A flag for each field that is typed over; ml_collections reads their values."""
    try:
        config_flags.DEFINE_config_dict(
            "config",
            config,
            flag_values=values,
            lock_config=False,
            accept_new_attributes=True,
            sys_argv=argv,
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        typed = ", ".join(text for text in argv if OVERRIDE.fullmatch(text))
        reason = printable(str(error)).strip("'\"")
        raise UserError(f"{typed}: no such key in this configuration ({reason}).") from error


def _fill(config: ConfigDict, argv: list[str], known: Callable[[], Known]) -> None:
    """Puts into a configuration the defaults of what is typed over and left out.

    Where none has a type to read the value by, the key stays out: it is read as Python writes it,
    and checked when things are built from it.
    """
    typed: dict[str, str | None] = {}
    for text, after in zip(argv, [*argv[1:], None], strict=True):
        if found := OVERRIDE.fullmatch(text):
            # "--config.a=1", "--config.a 1", "--noconfig.a".
            typed[found[2]] = found[3] if found[3] is not None or found[1] else after
    # The name of a section decides what may stand in it.
    for path in sorted(typed, key=lambda path: (not path.endswith("name"), path.count("."))):
        if "[" in path:
            continue  # "task[0].weight", of a tuple: ml_collections' own matter.
        *sections, key = path.split(".")
        holder: Any = config
        for i, section in enumerate(sections):
            if isinstance(holder, ConfigDict) and section not in holder:
                default = _default(known()(tuple(sections[:i]), config), sections[: i + 1])
                if not isinstance(default, Mapping):
                    raise UserError(
                        f"--config.{path}: {'.'.join(sections[: i + 1])} is {default!r} by default "
                        "and has no keys."
                    )
                holder[section] = ConfigDict(schema.plain(default))
            holder = holder[section] if isinstance(holder, ConfigDict) else None
        if not isinstance(holder, ConfigDict):
            continue  # A number has no keys, as will be said.
        if key not in holder:
            default = _default(known()(tuple(sections), config), [*sections, key])
            if isinstance(default, bool | int | float | str) or (
                isinstance(default, tuple | list) and default
            ):
                holder[key] = schema.plain(default)
        elif holder[key] is None or (
            isinstance(holder[key], ConfigDict) and not _is_dict(typed[path])
        ):
            del holder[key]  # None has no type, and a schedule may become a number.
        if key == "name" and typed[path] is not None:
            holder[key] = typed[path]


def _default(known: Mapping[str, Any] | None, path: list[str]):
    """The default of a key; None where it has none."""
    *sections, key = path
    if known is None:
        return None
    if key not in known:
        near = difflib.get_close_matches(key, known, 1, 0.5)
        hint = f"Did you mean --config.{'.'.join([*sections, near[0]])}? " if near else ""
        raise UserError(
            f"--config.{'.'.join(path)}: there is no such key in this configuration. {hint}"
            f"The keys there are {', '.join(sorted(known))}."
        )
    return known[key]


def _is_dict(text: str | None) -> bool:
    try:
        return isinstance(ast.literal_eval(text or ""), dict)
    except (ValueError, SyntaxError):
        return False


def _print_help(values: flags.FlagValues, about: str) -> None:
    print(about.strip(), "\n\nflags:\n")
    print("  --config: A file of configs/, or one of your own.")
    print("  --config.section.key=value: Changes it; docs/choosing.md lists the sections.")
    for name in sorted(values):
        flag = values[name]
        default = "" if flag.default in (None, []) else f" Default: {flag.default_as_str}."
        names = f"--{name}, --no{name}" if flag.boolean and flag.default else f"--{name}"
        print(f"  {names}: {flag.help}{default}")
