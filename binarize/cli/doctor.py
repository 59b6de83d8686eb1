"""`binarize doctor`: find out why a model enlarges worse than bicubic does."""

from __future__ import annotations

from typing import Annotated

import typer

from binarize.cli.options import (
    Device,
    DeviceOption,
    ModelArgument,
    ScaleOption,
    SeedOption,
    StepsOption,
    shows_progress,
    torch_device,
)


def doctor(
    model: ModelArgument,
    scale: ScaleOption = None,
    steps: StepsOption = None,
    try_all: Annotated[
        bool, typer.Option("--all", help="Try the changes even if the model is better than bicubic.")
    ] = False,
    seed: SeedOption = 0,
    device: DeviceOption = Device.auto,
) -> None:
    """Find out why a model gives noise or blur.

    Enlarges a photograph that comes with binarize, compares with bicubic enlargement, and where the model is worse,
    changes one thing at a time (prediction type, noise schedule, value range, ...) to see which makes it better. Names
    that as the likely cause, with the fix. Exit status: 0 the model is healthy, 1 it is not.

    ```
    binarize doctor runs/bidiffsr_x2
    binarize doctor BI-DiffSR_x2.pth --scale 2
    binarize doctor my-model --steps 20 --all
    ```
    """
    from tqdm import tqdm

    from binarize.diagnosis import doctor as examine

    with tqdm(bar_format="{elapsed}  {desc}", disable=not shows_progress(), leave=False) as bar:
        report = examine(
            model,
            scale=scale,
            steps=steps,
            seed=seed,
            device=torch_device(device),
            try_all=try_all,
            advance=bar.set_description_str,
        )
    typer.echo(report.to_text())
    if not report.healthy:
        raise typer.Exit(1)
