"""The one exception that the toolkit raises on purpose, and the sentence that suggests a near name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BinarizeError(ValueError):
    """Something a user passed cannot be done; the message says what, what was given, what is allowed and the fix.

    The command line prints the message alone, without a traceback, and exits with status 1.
    """


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the option nearest to ``name``, or an empty string.

    Args:
        name: What was given.
        options: What is allowed.
    """
    near = difflib.get_close_matches(name.lower(), {o.lower(): o for o in options}, n=1, cutoff=0.6)
    if not near:
        return ""
    exact = next(o for o in options if o.lower() == near[0])
    return f" Did you mean {exact!r}?"


def one_line(error: BaseException, limit: int = 400) -> str:
    """Return an exception's message as one line of at most `limit` characters; its class if it has no message."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
