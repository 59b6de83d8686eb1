"""What commands print: reports, and errors as one line and an exit status."""

from __future__ import annotations

import traceback
from typing import Any

import typer
from typer.core import TyperGroup

from binarize.errors import BinarizeError

_INTERRUPTED = 130


class OneLineErrors(TyperGroup):
    """A group of commands that prints expected errors as one line; ``--debug`` adds the traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command and turn an expected error into a message on stderr and an exit status."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # the reader of the output has gone; typer ends quietly
        except (BinarizeError, OSError, KeyboardInterrupt) as error:
            if ctx.params.get("debug"):
                typer.echo("".join(traceback.format_exception(error)), err=True, nl=False)
            typer.echo(f"{typer.style('error:', fg='red', bold=True)} {_message(error)}", err=True)
            raise typer.Exit(_INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1) from None


def print_report(report: Any) -> None:
    """Print a table on a terminal, and Markdown elsewhere."""
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        console.print(report)
    else:
        typer.echo(report.to_markdown(), nl=False)


def _message(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)
