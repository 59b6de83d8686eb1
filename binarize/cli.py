"""The `binarize` command. Each command has a module of its own, ``binarize/_cli_*.py``; adding one is one line here."""

from __future__ import annotations

from typing import Annotated

import typer

import binarize
from binarize import (
    _cli_ablate,
    _cli_convert,
    _cli_demo,
    _cli_doctor,
    _cli_evaluate,
    _cli_models,
    _cli_pack,
    _cli_recipes,
    _cli_train,
    _cli_upscale,
)
from binarize._cli_errors import OneLineErrors

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


app.command("upscale")(_cli_upscale.upscale)
app.command("train")(_cli_train.train)
app.command("evaluate")(_cli_evaluate.evaluate)
app.command("summary")(_cli_models.summary)
app.command("methods")(_cli_models.methods)
app.command("import-official")(_cli_convert.import_official)
app.command("pack")(_cli_pack.pack)
app.command("doctor")(_cli_doctor.doctor)
_cli_ablate.register(app)
app.command("demo")(_cli_demo.demo)
app.add_typer(_cli_recipes.app, name="recipes")


def main() -> None:
    """Run the command line and exit with its status."""
    app(prog_name="binarize")


if __name__ == "__main__":
    main()
