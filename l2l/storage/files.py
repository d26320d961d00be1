"""Files are written whole or not at all, and what goes wrong with them is one sentence."""

import contextlib
import errno
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

AGAIN = "give the same command again: it goes on from the last checkpoint"
REMEDIES = {
    errno.EACCES: "Make it readable and writable for you, or choose another path.",
    errno.EDQUOT: f"Make room in your quota, then {AGAIN}.",
    errno.EFBIG: f"Raise the limit on the size of files (ulimit -f), then {AGAIN}.",
    errno.EIO: f"The disk may be failing: save what is on it, then {AGAIN}.",
    errno.ENOSPC: f"Make room, then {AGAIN}.",
    errno.EPERM: "Make it readable and writable for you, or choose another path.",
    errno.EROFS: f"Make it writable and {AGAIN}; or choose another path.",
    errno.ESTALE: f"Mount its file system again, then {AGAIN}.",
}
# What etils needs to read each kind of remote path.
PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs", "hf": "huggingface_hub"}


def write(path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    path = Path(path)
    with naming(path):
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):  # Its directory may be what is gone.
                os.unlink(temporary)
            raise


@contextlib.contextmanager
def naming(path):
    """Errors of the system inside are about `path`: those of an open file name none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename, error.filename2 = str(path), None
        raise


def sentence(error: BaseException) -> str:
    """An error as one line: the fact, the file, and for errors of the system what to do."""
    if isinstance(error, OSError) and error.errno in REMEDIES:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{os.strerror(error.errno)}. {REMEDIES[error.errno]}"
    text = " ".join(printable(str(error).replace("\\n", " ")).split())
    if isinstance(error, AttributeError):  # ml_collections' word for a key that is not there.
        return "no such key in this configuration: " + text.strip("'\"\\")
    return text


def fail(error: BaseException) -> int:
    """Says, in one line, what a user can mend, and nothing else: the exit code for that."""
    print("l2l:", sentence(error), file=sys.stderr)
    return 2


def printable(text: str) -> str:
    """Text from a file or a library, with nothing in it that moves a terminal's cursor."""
    return "".join(c if c.isprintable() else " " for c in text)


def scheme(path) -> str | None:
    """The gs of gs://bucket/run, or of the gs:/bucket/run that a `Path` makes of it; None of local
    paths."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", str(path))
    return found and found[1].lower()


def local(path, what: str = "--workdir") -> Path:
    """A directory to write to as a Path. ValueError for a remote one, before anything is made."""
    if scheme(path):
        raise ValueError(
            f"{what}={path} is remote, and what is written there needs locks, appending and "
            "renaming: mount the bucket (gcsfuse, mount-s3) and name the mounted path, or write to "
            "a local one and copy it afterwards. l2l.load reads remote paths as they are."
        )
    return Path(path)


def readable(path):
    """What a path to read from is: a Path, or for remote ones etils' like of it.

    Raises:
      ValueError: a kind of remote path that etils does not offer.
    """
    kind = scheme(path)
    if kind is None:
        return Path(path)
    if kind not in PACKAGES:
        raise ValueError(
            f"{path} cannot be read: of remote paths there is "
            f"{', '.join(f'{k}://' for k in PACKAGES)}. Download it and name the file."
        )
    from etils import epath  # Of Orbax's own needs; local paths do without.

    return epath.Path(re.sub(r"^[^:]+:/+", f"{kind}://", str(path)))


@contextlib.contextmanager
def reached(path):
    """Errors inside, of whatever reads a remote path, become a ValueError or an OSError."""
    try:
        yield
    except ImportError as error:
        kind = scheme(path)
        raise ValueError(
            f"{path} is remote and reading it needs a package that is not installed ({error}): "
            f"pip install {PACKAGES.get(kind, kind)}, or download the file and name it."
        ) from error
    except (OSError, ValueError):
        raise
    except Exception as error:  # Each cloud's library has its own.
        if scheme(path) is None:
            raise
        raise OSError(f"{path} could not be read ({printable(str(error))[:300]}).") from error


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
