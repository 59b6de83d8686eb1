"""`binarize evaluate`: measure a model on a folder of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from binarize.cli import options as opt
from binarize.cli.errors import print_report
from binarize.cli.streams import echo
from binarize.cli.targets import check_evaluation_folder

_DEGRADATION = "How low resolution is made of --data: bicubic, photo, or a recipe's list of steps."


def evaluate(
    model: opt.ModelArgument,
    data: Annotated[Path, typer.Option("--data", "-d", help="Folder of high-resolution images.")],
    lr: Annotated[
        Path | None, typer.Option(help="Folder of low-resolution images; by default made from --data.")
    ] = None,
    degradation: Annotated[str, typer.Option(help=_DEGRADATION)] = "bicubic",
    revision: opt.RevisionOption = None,
    scale: opt.ScaleOption = None,
    lpips: Annotated[
        Literal["alex", "squeeze", "vgg", "none"], typer.Option(help="Backbone of LPIPS; papers report alex.")
    ] = "alex",
    lpips_backbone: Annotated[Path | None, typer.Option(metavar="FILE", help="Its weights; else downloaded.")] = None,
    steps: opt.StepsOption = None,
    tile: opt.TileOption = None,
    overlap: opt.OverlapOption = None,
    seed: opt.SeedOption = 0,
    scheduler: opt.SchedulerOption = None,
    limit: opt.LimitOption = None,
    output: opt.OutputOption = None,
    force: opt.ForceOption = False,
    device: opt.DeviceOption = "auto",
    dtype: opt.DtypeOption = "float32",
    packing: opt.PackOption = True,
) -> None:
    """Measure PSNR, SSIM and LPIPS of a model.

    For each image and on average, beside bicubic upscaling. PSNR and SSIM are computed on Y with the border shaved, as
    in the papers. Prints a table on a terminal and Markdown elsewhere; `--output` also writes evaluation.json, .csv and
    .md.

    ```
    binarize evaluate runs/bidiffsr_x2/model --data Set5/HR --lr Set5/LR_bicubic --output results
    binarize evaluate BI-DiffSR_x4.pth --scale 4 --data Urban100/HR --limit 10 --lpips none
    binarize evaluate my-model --data photos --degradation '[{reduce: box}, {jpeg: 75}]'
    binarize evaluate my-model --data Set5/HR --lpips squeeze --lpips-backbone squeezenet1_1.pth
    ```
    """
    from binarize.evaluation import evaluate as measure
    from binarize.models.loading import at_revision, load_pipeline, prepare, sample
    from binarize.recipes import load_degradation

    made_by = load_degradation(degradation)
    if made_by.root and lr is not None:
        raise typer.BadParameter("--lr gives the low-resolution images that --degradation would make; give one.")
    if output is not None:
        check_evaluation_folder(output, force=force)
    model = at_revision(model, revision)
    pipeline = prepare(load_pipeline(model, scale=scale), device, dtype, scheduler, pack=packing)
    report = measure(
        lambda image: sample(pipeline, image, steps=steps, seed=seed, tile=tile, overlap=overlap),
        data if lr is None else (data, lr),
        scale=pipeline.scale,
        degradation=made_by,
        lpips=None if lpips == "none" else lpips,
        lpips_backbone=lpips_backbone,
        limit=limit,
        name=str(model),
        device=pipeline.device,
    )
    print_report(report)
    if output is not None:
        for path in report.save(output, force=force):
            echo(f"wrote {path}", err=True)
