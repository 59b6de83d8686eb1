"""`binarize demo`: a trained network, a comparison and a report in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from binarize.cli.options import ForceOption, OverridesArgument


def demo(
    overrides: OverridesArgument = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything.")] = Path("demo-output"),
    force: ForceOption = False,
) -> None:
    """Train a small 1-bit network in minutes.

    On photographs that scikit-image ships: nothing is downloaded. Then compares it with bicubic enlargement on one that
    it never saw, and writes the pictures and a report. Takes less than five minutes of one CPU core.

    ```
    binarize demo
    binarize demo --output longer max_train_steps=5000
    ```
    """
    from binarize.demo import run_demo
    from binarize.demo.report import verdict

    result = run_demo(output, overrides=overrides or (), force=force, say=typer.echo)
    typer.echo(f"\n{verdict(result.scores.mean, result.steps).replace('**', '')}\n")
    for what, path in (("pictures", result.comparison), ("report", result.report), ("model", result.model)):
        typer.echo(f"{what + ':':<10}{path}")
