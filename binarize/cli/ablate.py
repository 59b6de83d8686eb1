"""`binarize ablate`: run a study."""

from __future__ import annotations

from typing import Annotated

import typer

from binarize.cli.options import OverridesArgument


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("ablate")(ablate)


def ablate(
    study: Annotated[str | None, typer.Argument(help="An installed study's name, or a YAML file.")] = None,
    overrides: OverridesArgument = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="CELL", help="Run this cell alone; a glob, and may be given again.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the cells, what they cost, and how far they are.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Repeat runs that are there with other recipes, removing these.")
    ] = False,
    listing: Annotated[bool, typer.Option("--list", help="List the installed studies and exit.")] = False,
) -> None:
    """Train and measure every cell of a study, and write one table.

    A study names the recipes to compare, by cells or as a grid. What is done is not repeated: after an interruption,
    give the same command again. A key of the study (`seeds`, `output_dir`, `evaluation.*`) changes the study, any other
    key the recipe of every cell. Exit status 1 if a run failed; the others are run all the same.

    ```
    binarize ablate --list
    binarize ablate small_methods train_data_dir=photos evaluation.data_dir=held-out
    binarize ablate small_groups train_data_dir=photos evaluation.data_dir=held-out 'seeds=[0,1,2]'
    binarize ablate table2_x2 --dry-run
    binarize ablate breakdown train_data_dir=DF2K/HR evaluation.data_dir=Manga109/HR --only baseline
    ```
    """
    from rich.console import Console

    from binarize.recipes import list_studies
    from binarize.studies.ablation import ablate as run
    from binarize.training import TrainingInterrupted

    if listing:
        studies = list_studies()
        width = max(map(len, studies))
        for name, description in studies.items():
            typer.echo(f"{name:<{width}}  {description}")
        return
    if study is None:
        raise typer.BadParameter("name one, such as small_methods; --list shows those installed.", param_hint="STUDY")
    try:
        result = run(study, overrides if overrides is not None else (), only=only, force=force, dry_run=dry_run)
    except TrainingInterrupted as stop:
        typer.echo(f"stopped by a signal; saved {stop.checkpoint}. The same command goes on from there.", err=True)
        raise typer.Exit(stop.exit_code) from None
    console = Console()
    if console.is_terminal:
        console.print(result)
    else:
        typer.echo(result.to_markdown(), nl=False)
    if dry_run:
        return
    table = result.output_dir / "table.md"
    others = [kind for kind in (".csv", ".json", ".png") if table.with_suffix(kind).exists()]
    typer.echo(f"table: {table}, and the same as {', '.join(others)}")
    if result.failed:
        typer.echo(
            f"{len(result.failed)} of {len(result.trials)} runs failed; see error.txt in their folders", err=True
        )
        raise typer.Exit(1)
