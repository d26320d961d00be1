"""Files are written whole or not at all, and what goes wrong with them is one sentence."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from l2l.console.errors import UserError, about, naming, printable

# What etils needs to read each kind of remote path.
PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs", "hf": "huggingface_hub"}


def write(path, content: bytes, trial: Callable[[Path], Any] = lambda written: None) -> None:
    """Writes a file whole or not at all.

    Args:
      trial: called with the new file before it replaces the old one; if it raises, the old one
        stays.
    """
    path = Path(path)
    with naming(path):
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            trial(Path(temporary))
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):  # Its directory may be what is gone.
                os.unlink(temporary)
            raise


def folder(path, what: str = "--workdir") -> Path:
    """Makes a directory to write to, and those above it.

    Raises:
      UserError: it is remote (`local`), or a file is in its place, or may not be made.
    """
    path = local(path, what)
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise UserError(
                f"{what}={path} cannot be a directory: {place} is a file. Choose another."
            )
    with naming(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def scheme(path) -> str | None:
    """The gs of gs://bucket/run, or of the gs:/bucket/run that a `Path` makes of it; None of local
    paths."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", str(path))
    return found and found[1].lower()


def _at_home(path) -> Path:
    """A Path, with ~ written out: shells leave it in --workdir=~/run as it is."""
    with contextlib.suppress(RuntimeError):  # Nobody of that name has a home: it is a file's.
        return Path(path).expanduser()
    return Path(path)


def local(path, what: str = "--workdir") -> Path:
    """A directory to write to as a Path (~ is the home directory); UserError for a remote one."""
    if scheme(path):
        raise UserError(
            f"{what}={path} is remote, but what is written there needs locks, appending and "
            "renaming: mount the bucket (gcsfuse, mount-s3) and name the mounted path, or write to "
            "a local one and copy it afterwards. l2l.load reads remote paths as they are."
        )
    return _at_home(path)


def readable(path):
    """A path to read from: a Path (~ is the home directory), or for a remote one its counterpart of
    etils.epath.

    Raises:
      UserError: a kind of remote path that etils does not offer.
    """
    kind = scheme(path)
    if kind is None:
        return _at_home(path)
    if kind not in PACKAGES:
        raise UserError(
            f"{path} cannot be read: remote paths begin with "
            f"{', '.join(f'{k}://' for k in PACKAGES)}. Download it and name the file."
        )
    from etils import epath  # Orbax depends on it; local paths need no import.

    return epath.Path(re.sub(r"^[^:]+:/+", f"{kind}://", str(path)))


@contextlib.contextmanager
def reached(path):
    """Errors inside, of whatever reads a path that a user named, become a `UserError`."""
    try:
        yield
    except ImportError as error:
        kind = scheme(path) or ""
        raise UserError(
            f"{path} is remote and reading it needs a package that is not installed ({error}): "
            f"pip install {PACKAGES.get(kind, kind)}, or download the file and name it."
        ) from error
    except UserError:
        raise
    except OSError as error:
        raise about(path, error) from error
    except Exception as error:  # Each cloud's library has its own.
        if scheme(path) is None:
            raise
        raise UserError(
            f"{path} could not be read ({printable(str(error))[:300]}): check its name and your "
            "access to it, or download the file and name that."
        ) from error


@contextlib.contextmanager
def copied(path):
    """A local file with what is in `path`, which `readable` returned: itself, if it is local."""
    if scheme(path) is None:
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="l2l-") as folder:
        copy = Path(folder) / "copy"
        with reached(path), path.open("rb") as remote, open(copy, "wb") as file:
            shutil.copyfileobj(remote, file)
        yield copy
