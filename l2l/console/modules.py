"""A user's own file, a task's or a configuration's, as the ordinary module that it is."""

import difflib
import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from l2l.console.errors import UserError

# Those of the files loaded so far, in which their neighbours are found.
_FOLDERS: list[Path] = []


def load(place: str, what: str) -> ModuleType:
    """The module in a file, executed once for each of its contents.

    It is in `sys.modules`, as dataclasses and pickles want it, under a name that no other file has;
    what lies beside it can be imported, by its functions too when they are called later on (of two
    files in different folders, one name beside both should then be imported at the top).

    Args:
      place: its path; what is not below the working directory is looked for beside the files that
        were loaded before.
      what: what names it, for the sentence of a `UserError`: "--config".

    Raises:
      UserError: there is no such file. What the file itself raises is passed on as it is.
    """
    path = _find(place, what)
    try:
        source = path.read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"{what}={place} cannot be read ({reason}): name a Python file.") from error
    digest = hashlib.sha256(source).hexdigest()
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    known = sys.modules.get(name)
    if known is not None and known.__dict__.get("__l2l_digest__") == digest:
        return known
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{what}={place} is not a Python file: its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    folder = path.parent
    _let_go_of_namesakes(folder)
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        # At the end from now on, where it hides nothing from anybody else.
        sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
        if folder not in _FOLDERS:
            _FOLDERS.append(folder)
    module.__dict__["__l2l_digest__"] = digest
    return module


def attribute(place: str, name: str, what: str) -> Any:
    """`name` of the module at a path that ends in .py, or of "package.module".

    Raises:
      UserError: there is no such file, module or name.
    """
    if place.endswith(".py"):
        module = load(place, what)
    else:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{place}.".startswith(f"{error.name}."):
                raise  # Of an import in it.
            raise UserError(
                f"The {what} {place}:{name} could not be imported ({error}): write "
                "path/to/file.py:function or package.module:function."
            ) from error
    if not hasattr(module, name):
        near = difflib.get_close_matches(name, [x for x in vars(module) if x[0] != "_"], 1)
        hint = f": did you mean {near[0]}?" if near else "."
        raise UserError(f"The {what} {place}:{name} could not be imported: no {name} there{hint}")
    return getattr(module, name)


def _find(place: str, what: str) -> Path:
    for folder in (Path(), *_FOLDERS):
        path = folder / Path(place).expanduser()
        if path.is_file():
            return path.resolve()
    raise UserError(f"{what}={place} could not be imported: no such file.{nearest_path(place)}")


def nearest_path(text: str) -> str:
    """ " Did you mean …?" of the path that is there and nearest to one that is not; or nothing."""
    path = Path(text)
    while not path.parent.is_dir():  # The first part of it that is wrong.
        path = path.parent
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, 1)
    return f" Did you mean {path.parent / near[0]}?" if near else ""


def _let_go_of_namesakes(folder: Path) -> None:
    """Forgets modules that another file of the user's has imported from beside itself and that
    have the name of one in this folder."""
    for entry in folder.iterdir():
        known = sys.modules.get(entry.stem)
        file = getattr(known, "__file__", None)
        if file is None or (entry.suffix != ".py" and not entry.is_dir()):
            continue
        home = Path(file).parent if entry.suffix == ".py" else Path(file).parent.parent
        if home != folder and home in _FOLDERS:
            del sys.modules[entry.stem]
