"""The toolkit's exception, and helpers for its messages."""

import difflib
from collections.abc import Iterable


class BinarizeError(ValueError):
    """An argument, a file or a model is not valid; the message names it, what is allowed, and the fix.

    The command line prints the message without a traceback and exits with status 1.
    """


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the option nearest to ``name``, or an empty string if none is similar."""
    exact = {option.lower(): option for option in options}
    near = difflib.get_close_matches(name.lower(), exact, n=1)
    return f" Did you mean {exact[near[0]]!r}?" if near else ""


def one_line(error: BaseException, limit: int = 400) -> str:
    """Return an exception's message as one line of at most `limit` characters; its class if it has no message."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
