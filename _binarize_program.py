"""The `binarize` command. Ctrl-C ends it at once while libraries are imported."""

import os
import signal
from typing import Any


def main() -> None:
    """Run the command line. Ctrl-C while libraries are imported ends the program with status 130 and no traceback."""
    end_on_interrupt()
    from binarize.cli import main as run

    try:
        if signal.getsignal(signal.SIGINT) is _end:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        run()
    except KeyboardInterrupt:  # just before the command line handles it, or just after
        _end()
    finally:  # while Python ends
        end_on_interrupt()


def end_on_interrupt() -> None:
    """Let Ctrl-C end the program at once; libraries may catch an exception while they are imported, or change it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _end(*_: Any) -> None:
    try:
        os.write(2, b"error: interrupted\n")
    finally:
        os._exit(130)
