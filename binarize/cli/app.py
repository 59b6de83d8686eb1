"""The `binarize` command. Each command has a module of its own, in this folder."""

from __future__ import annotations

from typing import Annotated

import typer

import binarize
from binarize.cli import ablate, demo, doctor, evaluate, import_official, pack, recipes, summary, train, upscale
from binarize.cli.errors import OneLineErrors

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
        typer.echo(f"binarize {binarize.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    plugin: Annotated[
        list[str] | None,
        typer.Option(help="Module or .py file to import first, which registers methods of yours. Can be repeated."),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Make diffusion models 1-bit, and enlarge pictures with them.

    Exit status: 0 done, 1 something cannot be done (one line on stderr says what), 2 the command line is wrong,
    130 and 143 stopped by Ctrl-C and SIGTERM.
    """
    if plugin:
        from binarize.recipes import import_plugins

        import_plugins(plugin)


app.command("upscale")(upscale.upscale)
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("summary")(summary.summary)
app.command("methods")(summary.methods)
app.command("import-official")(import_official.import_official)
app.command("pack")(pack.pack)
app.command("doctor")(doctor.doctor)
ablate.register(app)
app.command("demo")(demo.demo)
app.add_typer(recipes.app, name="recipes")


def main() -> None:
    """Run the command line and exit with its status."""
    app(prog_name="binarize")
