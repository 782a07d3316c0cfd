"""What a user did wrong, told in one line."""

from __future__ import annotations


class UsageError(Exception):
    """Wrong usage or unreadable input: subject, what is wrong, how to mend it, in one line.

    The command line prints the line and exits 2, and so does the pytest plugin. A failure of
    the implementation on trial is never a `UsageError`: that is a `harness.failure.Failure`.
    """


def first_line(error: BaseException) -> str:
    """The first line of what another library said, for a message of one line."""
    return str(error).strip().split("\n", maxsplit=1)[0] or type(error).__name__
