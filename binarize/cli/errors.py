"""What goes wrong in a command, as one line and an exit status."""

from __future__ import annotations

import traceback
from typing import Any

import typer
from typer.core import TyperGroup

from binarize.errors import BinarizeError

_INTERRUPTED = 130


class OneLineErrors(TyperGroup):
    """A group of commands whose foreseen errors print their message alone; ``--debug`` adds the traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; a failure becomes a message on stderr and an exit status."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # whoever read our output has left, which typer ends quietly
        except (BinarizeError, OSError) as error:
            raise _ended(ctx, error, _message(error), 1) from None
        except KeyboardInterrupt as error:
            raise _ended(ctx, error, "interrupted", _INTERRUPTED) from None


def _ended(ctx: Any, error: BaseException, message: str, exit_code: int) -> typer.Exit:
    if ctx.params.get("debug"):
        typer.echo("".join(traceback.format_exception(error)), err=True, nl=False)
    typer.echo(f"{typer.style('error:', fg='red', bold=True)} {message}", err=True)
    return typer.Exit(exit_code)


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)
