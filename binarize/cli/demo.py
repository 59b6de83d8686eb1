"""`binarize demo`: train a small network and compare it with bicubic upscaling, in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from binarize.cli.options import ForceOption, OverridesArgument
from binarize.cli.streams import echo


def demo(
    overrides: OverridesArgument = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything.")] = Path("demo-output"),
    force: ForceOption = False,
) -> None:
    """Train a small 1-bit network in minutes.

    The images come with scikit-image, so nothing is downloaded. The network is compared with bicubic upscaling on a
    held-out image, and the images and a report are written. Takes less than five minutes on one CPU core.

    ```
    binarize demo --output longer max_train_steps=5000
    ```
    """
    from binarize.demo.folder import check_folder
    from binarize.recipes import load_recipe

    check_folder(output, force=force)
    load_recipe("demo", overrides or ())

    from binarize.demo import run_demo
    from binarize.demo.report import verdict

    result = run_demo(output, overrides=overrides or (), force=force, say=echo)
    echo(f"\n{verdict(result.scores.mean, result.steps).replace('**', '')}\n")
    for name, path in (("images:", result.comparison), ("report:", result.report), ("model:", result.model)):
        echo(f"{name:<9}{path}")
