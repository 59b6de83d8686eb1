"""The boundary of the program: every error becomes one message on stderr and an exit status."""

from __future__ import annotations

import errno
import sys
import traceback
from pathlib import PurePath
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from binarize.cli.streams import echo, safe_streams
from binarize.errors import BinarizeError, one_line

_FAILED, _WRONG_USAGE, _INTERRUPTED = 1, 2, 130
_LINES, _LINE = 10, 2000  # of a message
_NO_MEMORY = ("allocate memory", "out of memory", "bad_alloc")
_NEXT_STEP = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "free some of your quota, or write to another disk",
    errno.EACCES: "check the permissions",
    errno.EROFS: "write to another disk",
    errno.EMFILE: "raise the limit with `ulimit -n`",
}


class OneLineErrors(TyperGroup):
    """A group of commands that ends with a message and an exit status, whatever happens and wherever output goes."""

    def main(self, args: Any = None, prog_name: str | None = None, *_: Any, **options: Any) -> NoReturn:
        """Run a command line and exit: 0 success, 1 an error, 2 wrong usage, 130 interrupted."""
        with safe_streams() as stdout:
            status = self._run(list(sys.argv[1:] if args is None else args), prog_name)
            stdout.flush()
            if stdout.failure is not None and not isinstance(stdout.failure, BrokenPipeError):
                _print_error(f"the output could not be printed: {one_line(stdout.failure)}")
                status = status or _FAILED
        sys.exit(status)

    def _run(self, args: list[str], prog_name: str | None) -> int:
        debug = False
        try:
            if "" in args:
                raise typer.BadParameter("an argument is empty. Is a variable in the command line unset?")
            with self.make_context(prog_name or "binarize", args) as context:
                debug = bool(context.params.get("debug"))
                self.invoke(context)
        except typer.Exit as done:
            return done.exit_code
        except BaseException as error:
            if debug and not hasattr(error, "format_message"):  # which says that the command line is wrong
                echo("".join(traceback.format_exception(error)), err=True, end="")
            return _report(error, args)
        return 0


def print_report(report: Any) -> None:
    """Print a table on a terminal, and Markdown elsewhere."""
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        console.print(report)
    else:
        echo(report.to_markdown(), end="")


def _report(error: BaseException, args: list[str]) -> int:
    """Print an error and return the exit status."""
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        _print_error("interrupted")
        return _INTERRUPTED
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else _FAILED
    usage = getattr(error, "format_message", None)  # of the exceptions of typer's parser
    if usage is None:
        _print_error(_without_line_ends(_message(error), args))
        return _FAILED
    context = getattr(error, "ctx", None)
    if usage() and type(error).__name__ != "NoArgsIsHelpError":  # whose message, the help, has been printed
        what = " ".join(usage().split())
        where = "binarize" if context is None else context.command_path
        _print_error(f"{what[:_LINE]}{'' if what.endswith(('.', '?')) else '.'} See `{where} --help`.")
    return _WRONG_USAGE


def _without_line_ends(message: str, args: list[str]) -> str:
    """Return a message in which what the arguments have in it, such as a file's name, ends no line."""
    for part in sorted({part for arg in args for part in (arg, PurePath(arg).stem) if "\n" in part}, key=len):
        message = message.replace(part, part.replace("\n", "\\n"))
    return message


def _print_error(message: str) -> None:
    lines = message.rstrip().split("\n")
    shown = [line if len(line) <= _LINE else f"{line[: _LINE // 2]} ... {line[-_LINE // 2 :]}" for line in lines]
    if len(shown) > _LINES:
        shown[_LINES - 1 :] = [f"... and {len(shown) - _LINES + 1} more lines"]
    if sys.stderr.isatty():
        print("\033[1;31merror:\033[0m ", file=sys.stderr, end="")
        echo("\n".join(shown), err=True)
    else:
        echo("error: " + "\n".join(shown), err=True)


def _message(error: BaseException) -> str:
    if isinstance(error, BinarizeError):
        return str(error)
    if isinstance(error, OSError):
        what = f"{error.filename}: {error.strerror}" if error.filename is not None else one_line(error)
        step = _NEXT_STEP.get(error.errno or 0)
        return what if step is None else f"{what}; {step}."
    if isinstance(error, MemoryError) or any(words in str(error).lower() for words in _NO_MEMORY):
        return f"not enough memory ({one_line(error, 200)}); use a smaller image, --tile or batch."
    where = f"{type(error).__name__}: {one_line(error)}"
    return f"unexpected {where} (a bug in binarize: please report it with what `binarize --debug ...` prints)"
