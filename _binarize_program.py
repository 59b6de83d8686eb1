"""Entry point of the `binarize` command: the imports, Ctrl-C and the end of the process."""

import atexit
import gc
import os
import signal
import sys
from types import FrameType
from typing import Any

_OBJECTS = 200_000  # how many new objects start a garbage collection until PyTorch is imported


def main() -> None:
    """Run the command line and exit with its status; Ctrl-C ends it with one line and status 130.

    The process ends without freeing its modules, once the `atexit` functions that were registered after this call have
    run. Functions that were registered before it do not run.
    """
    handled = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if handled:
        signal.signal(signal.SIGINT, _interrupt)
    status: list[int] = []
    atexit.register(_leave, status)  # the first function that is registered runs last
    try:
        _run(status)
    except KeyboardInterrupt:  # just before the command line handles it, or just after
        _end()
    finally:
        if handled:
            signal.signal(signal.SIGINT, _end)


def _run(status: list[int]) -> None:
    from binarize.importing import after_import

    # Imports create many objects and little garbage. With the default threshold, collections take a sixth of the start
    # of `binarize upscale`.
    usual = gc.get_threshold()
    gc.set_threshold(_OBJECTS, *usual[1:])
    after_import("torch", lambda: _collect_garbage(usual))
    after_import("diffusers", gc.freeze)
    from binarize.cli import main as run

    try:
        run()
    except SystemExit as end:
        if isinstance(end.code, int):
            status.append(end.code)
        raise


def _collect_garbage(thresholds: tuple[int, int, int]) -> None:
    """Restore the thresholds of garbage collection, and exempt the objects that exist already."""
    gc.freeze()
    gc.set_threshold(*thresholds)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, but end the program during an import: libraries catch or change exceptions there."""
    outer = frame
    while outer is not None:
        if outer.f_code.co_filename.startswith("<frozen importlib"):
            _end()
        outer = outer.f_back
    signal.default_int_handler(number, frame)


def _end(*_: Any) -> None:
    try:
        os.write(2, b"error: interrupted\n")
    finally:
        os._exit(130)


def _leave(status: list[int]) -> None:
    """End the process here: Python would free the imported modules one by one, for longer than a second."""
    if status:
        try:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
        except (OSError, ValueError):
            return  # Python tries again, and reports it
        os._exit(status[0])
