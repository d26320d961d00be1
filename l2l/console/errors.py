"""What a user can fix is a `UserError`. Everything else is a bug, theirs or ours, and is shown as
Python shows it."""

import contextlib
import errno
import os
import sys

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


class UserError(ValueError):
    """A mistake in what l2l was given: a setting, a name, a file, a task.

    Its text is one sentence or two: the fact, the cause, the remedy. The commands print that alone
    and exit with 2. Raised by l2l only, so that an error inside a user's own code never passes for
    one.
    """


def fail(error: Exception) -> int:
    """Says, in one line, what a user can mend, and nothing else: the exit code for that."""
    print("l2l:", " ".join(printable(str(error)).split()), file=sys.stderr, flush=True)
    return 2


def printable(text: str) -> str:
    """Text from a file or a library, with nothing in it that moves a terminal's cursor."""
    return "".join(c if c.isprintable() else " " for c in text)


@contextlib.contextmanager
def naming(path):
    """Errors of the system inside become a `UserError` about `path`, which a user has named: what
    is wrong with it, and what to do."""
    try:
        yield
    except OSError as error:
        raise about(path, error) from error


def about(path, error: OSError) -> UserError:
    """An error of the system as a sentence about the path, which a user has named."""
    reason = os.strerror(error.errno) if error.errno else str(error) or type(error).__name__
    remedy = REMEDIES.get(error.errno or 0, "Choose another path.")
    return UserError(f"{path}: {printable(reason)}. {remedy}")
