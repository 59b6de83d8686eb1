"""`binarize doctor`: find out why a model is worse than bicubic upscaling."""

from __future__ import annotations

from typing import Annotated

import typer

from binarize.cli.options import DeviceOption, ModelArgument, RevisionOption, ScaleOption, SeedOption, StepsOption
from binarize.cli.streams import echo


def doctor(
    model: ModelArgument,
    revision: RevisionOption = None,
    scale: ScaleOption = None,
    steps: StepsOption = None,
    try_all: Annotated[bool, typer.Option("--all", help="Try the changes even if the model is healthy.")] = False,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
) -> None:
    """Find out why a model gives noise or blur.

    Upscales an image that comes with binarize and compares with bicubic upscaling. If the model is worse, changes one
    setting at a time (prediction type, noise schedule, value range, ...) and names the one that helps as the likely
    cause, with the fix. Exit status: 0 the model is healthy, 1 it is not.

    ```
    binarize doctor runs/bidiffsr_x2
    binarize doctor my-model --steps 20 --all
    ```
    """
    from binarize.models.location import at_revision, scale_of

    model = at_revision(model, revision)
    scale_of(model, scale)

    from binarize.diagnosis import doctor as examine
    from binarize.models.loading import find_device
    from binarize.progress import ProgressBar

    with ProgressBar(bar_format="{elapsed}  {desc}", leave=False) as bar:
        where, show = find_device(device), bar.set_description_str
        report = examine(
            model,
            scale=scale,
            steps=steps,
            seed=seed,
            device=where,
            try_all=try_all,
            advance=show,
        )
    echo(report.to_text())
    if not report.healthy:
        raise typer.Exit(1)
