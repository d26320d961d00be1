"""What every command does around its own work."""

import functools
import io
import sys
from collections.abc import Callable, Sequence

from l2l.console.errors import UserError, fail


def command(main: Callable[..., int]) -> Callable[..., int]:
    """Makes the main function of a command, (argv, ...) -> exit code, of one that may fail.

    A `UserError` becomes a sentence and 2, Ctrl-C becomes 130. Anything else is a bug, a user's or
    ours: Python shows its traceback and ends with 1. A terminal that is not UTF-8 is shown question
    marks for what it cannot show.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str], *rest) -> int:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # Not in every test and notebook.
                stream.reconfigure(errors="replace")
        try:
            return main(argv, *rest)
        except UserError as error:
            return fail(error)
        except KeyboardInterrupt:
            return 130

    return run
