"""The `binarize` command. Each of its commands is a module in this folder."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

import binarize
from binarize.cli import recipes
from binarize.cli.ablate import ablate
from binarize.cli.demo import demo
from binarize.cli.doctor import doctor
from binarize.cli.errors import OneLineErrors
from binarize.cli.evaluate import evaluate
from binarize.cli.export import export
from binarize.cli.generate import generate
from binarize.cli.import_official import import_official
from binarize.cli.methods import methods
from binarize.cli.pack import pack
from binarize.cli.streams import EchoHandler, echo
from binarize.cli.summary import summary
from binarize.cli.train import train
from binarize.cli.upscale import upscale
from binarize.cli.web import web

app = typer.Typer(
    name="binarize",
    cls=OneLineErrors,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        echo(f"binarize {binarize.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    plugin: Annotated[
        list[str] | None, typer.Option(help="Module or .py file with your own methods to import. Can be repeated.")
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Make diffusion models 1-bit, and upscale or generate images with them.

    Exit status: 0 success, 1 an error (one line on stderr), 2 a wrong command line, 130 and 143 stopped by Ctrl-C and
    SIGTERM.
    """
    log = logging.getLogger("binarize")
    if not log.handlers:  # called once by a program, more often by tests
        log.addHandler(EchoHandler())
        log.setLevel(logging.INFO)
    if plugin:
        from binarize.recipes import import_plugins

        import_plugins(plugin)


COMMANDS = (
    upscale, generate, web, train, evaluate, summary, methods, import_official, pack, export, doctor, ablate, demo,
)  # fmt: skip
for command in COMMANDS:
    app.command()(command)
app.add_typer(recipes.app, name="recipes")


def main() -> None:
    """Run the command line and exit with its status."""
    app(prog_name="binarize")
