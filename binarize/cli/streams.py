"""Printing that cannot end a command: unusable, full and closed streams, and names with control characters."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class SafeStream:
    """A text stream whose `write` and `flush` never raise; `failure` is the first error, or None.

    Characters that the encoding lacks are written as escapes. After a failure, output is dropped.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: Exception | None = None

    def write(self, text: str) -> int:
        """Write text, or drop it."""
        try:
            self._stream.write(text)
        except UnicodeEncodeError as error:
            self.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        except (OSError, ValueError) as error:  # a ValueError says that the stream is closed
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        """Flush the stream, or drop what it holds."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._drop(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _drop(self, error: Exception) -> None:
        if self.failure is None:
            self.failure = error
            with contextlib.suppress(OSError, ValueError):  # Python flushes again when it exits
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)


@contextlib.contextmanager
def safe_streams() -> Iterator[SafeStream]:
    """Replace stdout and stderr by streams that never raise, and return the one for stdout."""
    for number in (0, 1, 2):  # otherwise, the next file that is opened would take a closed stream's number
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as null:
        streams = [SafeStream(null if stream is None else stream) for stream in before]
        sys.stdout, sys.stderr = streams
        try:
            yield streams[0]
        finally:
            for stream in streams:
                stream.flush()
            sys.stdout, sys.stderr = before


def printable(text: str) -> str:
    """Return text with characters that a terminal would obey, or cannot show, as escapes; line ends stay."""
    return "".join(
        each if each.isprintable() or each in "\n\t" else each.encode("unicode_escape", "surrogatepass").decode("ascii")
        for each in text
    )


def echo(text: object = "", *, err: bool = False, end: str = "\n") -> None:
    """Print a line, or text with another `end`, at once."""
    print(printable(str(text)), file=sys.stderr if err else sys.stdout, end=end, flush=True)


class EchoHandler(logging.Handler):
    """Prints log records on stderr by `echo`."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        echo(self.format(record), err=True)
