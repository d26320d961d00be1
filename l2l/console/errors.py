"""What a user can mend is a `UserError`. Everything else is a bug, theirs or ours, and is shown as
Python shows it."""

import sys


class UserError(ValueError):
    """A mistake in what l2l was given: a setting, a name, a file, a task.

    Its text is one sentence or two: the fact, the cause, the remedy. The commands print that alone
    and exit with 2. Raised by l2l only, so that an error inside a user's own code never passes for
    one.
    """


def fail(error: Exception) -> int:
    """Says, in one line, what a user can mend, and nothing else: the exit code for that."""
    text = " ".join(printable(str(error)).split())
    if isinstance(error, AttributeError):  # ml_collections' word for a key that is not there.
        text = "no such key in this configuration: " + text.strip("'\"\\")
    print("l2l:", text, file=sys.stderr, flush=True)
    return 2


def printable(text: str) -> str:
    """Text from a file or a library, with nothing in it that moves a terminal's cursor."""
    return "".join(c if c.isprintable() else " " for c in text)
