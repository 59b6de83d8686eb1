"""The toolkit's exception, and helpers for its messages."""

import difflib
from collections.abc import Iterable, Sequence

MAX_LINES, MAX_WIDTH = 10, 200


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


def clip(text: str, limit: int = MAX_WIDTH) -> str:
    """Return a text of at most `limit` characters; a longer one ends with an ellipsis."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def listing(opening: str, lines: Sequence[str], closing: str = "") -> str:
    """Return an opening, indented lines and a closing of at most ten lines in all; what is left out is counted."""
    most = MAX_LINES - 1 - bool(closing)
    shown = list(lines) if len(lines) <= most else [*lines[: most - 1], f"and {len(lines) - most + 1} more"]
    indented = [f"  {' '.join(line.split())}" for line in shown]
    return "\n".join(clip(line) for line in (opening, *indented, *([closing] if closing else [])))
