"""`binarize ablate`: run a study."""

from __future__ import annotations

from typing import Annotated

import typer

from binarize.cli.errors import print_report
from binarize.cli.options import OverridesArgument
from binarize.cli.streams import echo
from binarize.cli.trust import TrustOption, code_of
from binarize.tables import Table


def ablate(
    study: Annotated[str | None, typer.Argument(help="Name of an installed study, or a YAML file.")] = None,
    overrides: OverridesArgument = None,
    only: Annotated[list[str] | None, typer.Option(metavar="CELL", help="Run only these; a glob, repeatable.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the cells, cost and progress.")] = False,
    trust: TrustOption = False,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace existing runs of other recipes.")] = False,
    listing: Annotated[bool, typer.Option("--list", help="List the installed studies and exit.")] = False,
) -> None:
    """Train and measure every cell of a study, and write one table.

    A study names the recipes to compare, as cells or as a grid. Finished runs are not repeated: after an interruption,
    repeat the command. A key of the study (`seeds`, `output_dir`, `evaluation.*`) changes the study; any other key
    changes the recipe of every cell. If a run fails, the others still run, and the exit status is 1.

    ```
    binarize ablate --list
    binarize ablate small_groups train_data_dir=photos evaluation.data_dir=held-out 'seeds=[0,1,2]'
    binarize ablate breakdown train_data_dir=DF2K/HR evaluation.data_dir=Manga109/HR --only baseline
    ```
    """
    from binarize.studies import list_studies, load_study
    from binarize.training.errors import TrainingInterrupted

    if listing:
        echo(Table(["study", "description"], [*list_studies().items()]).to_text(header=False))
        return
    if study is None:
        raise typer.BadParameter("give one, such as small_methods; --list shows those installed.", param_hint="STUDY")
    try:
        with code_of(study, trust, inspecting=dry_run):
            load_study(study, overrides or ())

            from binarize.studies.ablation import ablate as run

            result = run(study, overrides or (), only=only, force=force, dry_run=dry_run)
    except TrainingInterrupted as stop:
        echo(f"stopped by a signal; saved {stop.checkpoint}. The same command goes on from there.", err=True)
        raise typer.Exit(stop.exit_code) from None
    print_report(result)
    if dry_run:
        return
    table = result.output_dir / "table.md"
    others = [kind for kind in (".csv", ".json", ".png") if table.with_suffix(kind).exists()]
    echo(f"table: {table}, and as {', '.join(others)}")
    if result.failed:
        echo(f"{len(result.failed)} of {len(result.runs)} runs failed; see error.txt in their folders", err=True)
        raise typer.Exit(1)
