"""`binarize evaluate`: measure a model against a folder of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from binarize.cli import options as opt
from binarize.cli.errors import print_report
from binarize.cli.streams import echo
from binarize.cli.targets import check_evaluation_folder
from binarize.errors import BinarizeError

_DEGRADATION = "How low resolution is made of --data: bicubic, photo, or a recipe's list of steps."


def evaluate(
    model: opt.ModelArgument,
    data: Annotated[Path, typer.Option("--data", "-d", help="Folder of high-resolution or real images.")],
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
    features: Annotated[
        str | None, typer.Option(help="For generation: pixels, inception, a SqueezeNet .pth file, or module:function.")
    ] = None,
    count: Annotated[
        int | None,
        typer.Option("--number", "-n", min=1, help="For generation: images to draw; by default as in --data."),
    ] = None,
    output: opt.OutputOption = None,
    force: opt.ForceOption = False,
    device: opt.DeviceOption = "auto",
    dtype: opt.DtypeOption = "float32",
    packing: opt.PackOption = True,
) -> None:
    """Measure PSNR, SSIM and LPIPS of a model, or of one that generates images FID, KID, precision and recall.

    Super-resolution: for each image and on average, beside bicubic upscaling. PSNR and SSIM are computed on Y with the
    border shaved, as in the papers. Prints a table on a terminal and Markdown elsewhere; `--output` also writes
    evaluation.json, .csv and .md.

    Generation: the distances are in the features of a network, by default plain pixels. `--output` also writes
    nearest.png, which shows some images above the nearest ones of the folder.

    ```
    binarize evaluate runs/bidiffsr_x2/model --data Set5/HR --lr Set5/LR_bicubic --output results
    binarize evaluate BI-DiffSR_x4.pth --scale 4 --data Urban100/HR --limit 10 --lpips none
    binarize evaluate my-model --data photos --degradation '[{reduce: box}, {jpeg: 75}]'
    binarize evaluate runs/digits --data digits -n 2000 --steps 20
    binarize evaluate my-model --data Set5/HR --lpips squeeze --lpips-backbone squeezenet1_1.pth
    ```
    """
    from binarize.imaging import list_images
    from binarize.models.location import at_revision, generates, generator_of, scale_of
    from binarize.recipes import load_degradation

    made_by = load_degradation(degradation)
    if made_by.root and lr is not None:
        raise typer.BadParameter("--lr gives the low-resolution images that --degradation would make; give one.")
    if output is not None:
        check_evaluation_folder(output, force=force)
    model = at_revision(model, revision)
    if generates(model):
        wrong: dict[str, object] = {
            "--lr": lr,
            "--scale": scale,
            "--tile": tile,
            "--overlap": overlap,
            "--limit": limit,
        }
        wrong |= {
            "--lpips-backbone": lpips_backbone,
            "--degradation": None if degradation == "bicubic" else degradation,
        }
        if given := [name for name, value in wrong.items() if value is not None]:
            raise BinarizeError(f"{given[0]}: {model} generates images; leave it out.")
        generator_of(model)
        if not data.is_dir():
            list_images(data)  # says so

        from binarize.evaluation.feature_names import PIXELS
        from binarize.evaluation.generation import evaluate_generator
        from binarize.models.loading import load_generator, prepare

        generator = prepare(load_generator(model), device, dtype, scheduler, pack=packing)
        options: dict[str, Any] = {} if steps is None else {"num_inference_steps": steps}
        options |= {"features": PIXELS if features is None else features, "count": count, "seed": seed}
        found = evaluate_generator(generator, data, name=str(model), **options)
        print_report(found)
        for path in found.save(output, force=force) if output is not None else ():
            echo(f"wrote {path}", err=True)
        return
    for name, value in (("--features", features), ("--number", count)):
        if value is not None:
            raise BinarizeError(f"{name}: {model} upscales images; leave it out.")
    scale_of(model, scale)
    list_images(data)

    from binarize.evaluation import evaluate as measure
    from binarize.models.loading import load_pipeline, prepare, sample

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
