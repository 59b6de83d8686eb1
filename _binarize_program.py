"""The `binarize` command, which stops at once while libraries are imported."""

import os
import signal
from typing import Any


def main() -> None:
    """Run the command line. Ctrl-C while libraries are imported ends the program with status 130 and no traceback."""
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:
        signal.signal(signal.SIGINT, _stop)
    from binarize.cli import main as run

    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


def _stop(*_: Any) -> None:
    # Libraries may catch an exception while they are imported, or turn it into another. Nothing needs cleaning up yet.
    os.write(2, b"error: interrupted\n")
    os._exit(130)
