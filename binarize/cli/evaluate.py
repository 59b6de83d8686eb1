"""`binarize evaluate`: measure a trained model on a folder of pictures."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from binarize.cli.options import (
    Device,
    DeviceOption,
    ForceOption,
    LimitOption,
    ModelArgument,
    OutputOption,
    OverlapOption,
    PackOption,
    Precision,
    PrecisionOption,
    ScaleOption,
    SchedulerOption,
    SeedOption,
    StepsOption,
    TileOption,
    shows_progress,
)
from binarize.errors import BinarizeError

if TYPE_CHECKING:
    from PIL import Image


class Backbone(str, Enum):
    """The network in whose features LPIPS measures; figures of different ones cannot be compared."""

    alex = "alex"
    squeeze = "squeeze"
    vgg = "vgg"
    none = "none"


def evaluate(
    model: ModelArgument,
    data: Annotated[Path, typer.Option("--data", "-d", help="Folder of high-resolution pictures.")],
    lr: Annotated[
        Path | None, typer.Option(help="Folder of their low-resolution twins; by default these are made from --data.")
    ] = None,
    scale: ScaleOption = None,
    lpips: Annotated[Backbone, typer.Option(help="Backbone of LPIPS; papers report alex.")] = Backbone.alex,
    lpips_backbone: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The backbone's weights, so that nothing is downloaded.")
    ] = None,
    steps: StepsOption = None,
    tile: TileOption = None,
    overlap: OverlapOption = None,
    seed: SeedOption = 0,
    scheduler: SchedulerOption = None,
    limit: LimitOption = None,
    output: OutputOption = None,
    force: ForceOption = False,
    device: DeviceOption = Device.auto,
    precision: PrecisionOption = Precision.float32,
    packing: PackOption = True,
) -> None:
    """Measure PSNR, SSIM and LPIPS of a model.

    For each picture and on average, beside bicubic enlargement; PSNR and SSIM on Y with the border shaved, as the
    papers do. Prints a table on a terminal and Markdown elsewhere; `--output` writes evaluation.json, .csv and .md too.

    ```
    binarize evaluate runs/bidiffsr_x2/model --data Set5/HR
    binarize evaluate runs/bidiffsr_x2/model --data Set5/HR --lr Set5/LR_bicubic --output results
    binarize evaluate BI-DiffSR_x4.pth --scale 4 --data Urban100/HR --limit 10 --lpips none
    binarize evaluate my-model --data Set5/HR --lpips squeeze --lpips-backbone squeezenet1_1.pth
    ```
    """
    from rich.console import Console

    from binarize.evaluation import evaluate as measure
    from binarize.models.loading import load_pipeline, prepare, sample

    if output is not None:
        check_output(output, force=force)
    pipeline = prepare(load_pipeline(model, scale=scale), device, precision, scheduler, packing)

    chosen = pipeline.num_inference_steps if steps is None else steps

    def enlarge(picture: Image.Image) -> Image.Image:
        return sample(pipeline, picture, steps=chosen, seed=seed, tile=tile, overlap=overlap)

    report = measure(
        enlarge,
        data if lr is None else (data, lr),
        scale=pipeline.scale,
        lpips=None if lpips is Backbone.none else lpips.value,
        lpips_backbone=lpips_backbone,
        limit=limit,
        progress=shows_progress(),
        name=str(model),
        device=pipeline.device,
    )
    console = Console()
    if console.is_terminal:
        console.print(report)
    else:
        typer.echo(report.to_markdown(), nl=False)
    if output is not None:
        for path in report.save(output, force=force):
            typer.echo(f"wrote {path}", err=True)


def check_output(folder: Path, *, force: bool) -> None:
    """Refuse a folder that holds an evaluation before one is run, as `EvaluationReport.save` would after it.

    Raises:
        BinarizeError: If ``folder`` is a file, or holds an evaluation and ``force`` is not given.
    """
    if folder.exists() and not folder.is_dir():
        raise BinarizeError(f"{folder}: is a file; --output takes a folder.")
    there = [path for suffix in ("json", "csv", "md") if (path := folder / f"evaluation.{suffix}").exists()]
    if there and not force:
        raise BinarizeError(f"{there[0]}: already exists; give another folder, or --force to overwrite it.")
