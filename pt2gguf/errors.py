"""The one exception that means "the user can fix this"."""

from __future__ import annotations


class Pt2Error(Exception):
    """A problem the user can act on.

    Its message is one sentence that names what is wrong (file, tensor, number) and the
    remedy. The command line catches it once, prints it and exits with code 2; library
    callers catch it as they like. Everything else that is raised is a bug.
    """


def first_line(error: Exception) -> str:
    """Of another library's message, to be quoted in a sentence."""
    return str(error).strip().partition("\n")[0]
