"""`binarize generate`: draw images with a trained model."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated

import typer

from binarize.cli import options as opt
from binarize.cli.jobs import make_folder
from binarize.cli.streams import echo
from binarize.errors import BinarizeError

MAX_IMAGES = 1_000_000
_OUT = "An image file for a grid of the images, or a folder for a PNG file of each."
_MODEL = (
    "A trained model: a run's folder, a pipeline's, or user/repository[@revision] on the hub; by default the "
    "pretrained generator of emoji."
)
_COLUMNS = "Columns of the grid; by default the square root of the number of images, rounded up."


def generate(
    target: Annotated[Path, typer.Argument(metavar="OUT", help=_OUT)],
    model: Annotated[Path | None, typer.Option("--model", "-m", show_default=False, help=_MODEL)] = None,
    revision: opt.RevisionOption = None,
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", "-c", help="A class to draw, or several; by default all."),
    ] = None,
    count: Annotated[int, typer.Option("--number", "-n", min=1, max=MAX_IMAGES, help="Number of images.")] = 16,
    steps: opt.StepsOption = None,
    guidance: Annotated[
        float | None,
        typer.Option(min=0, max=1000, help="Weight of classifier-free guidance; by default the model's, 1: none."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=opt.MAX_SEED, help="Seed of the first image.")] = 0,
    columns: Annotated[int | None, typer.Option(min=1, help=_COLUMNS)] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=4096, help="Images per pass of the network.")] = 16,
    scheduler: opt.SchedulerOption = None,
    device: opt.DeviceOption = "auto",
    dtype: opt.DtypeOption = "float32",
    packing: opt.PackOption = True,
    force: opt.ForceOption = False,
) -> None:
    """Draw images with a trained model.

    The same seed gives the same images with the same model, settings, processor and versions, whatever the batch size;
    otherwise single pixels may differ by a few levels of 255.

    ```
    binarize generate out.png --class flags
    binarize generate out.png --model runs/digits
    binarize generate out.png --model runs/emoji_bidiffsr --class animals-nature -n 16 --steps 20 --seed 7
    binarize generate samples/ --model runs/digits -n 1000
    ```
    """
    from binarize.imaging import IMAGE_SUFFIXES, check_writable, save_image
    from binarize.models.default import default_generator
    from binarize.models.location import at_revision, generator_of

    in_folder = target.is_dir() or target.suffix.lower() not in IMAGE_SUFFIXES
    if in_folder and target.suffix and not target.is_dir():
        check_writable("RGB", target)  # an unknown suffix
    if in_folder and columns is not None:
        raise BinarizeError(f"--columns is for a grid; {target} is a folder for single images.")
    width = len(str(count - 1))
    files = [target / f"{number:0{width}}.png" for number in range(count)] if in_folder else [target]
    for file in files:
        if file.exists() and not force:
            raise BinarizeError(f"{file}: already exists; give another name, or --force to overwrite it.")
    if target.exists() and not target.is_dir() and in_folder:
        raise BinarizeError(f"{target}: is a file; give a folder, or an image file such as out.png.")
    model = generator_of(at_revision(default_generator() if model is None else model, revision))

    from binarize.models.generation import generate_images
    from binarize.models.graphs import counting
    from binarize.models.grid import image_grid
    from binarize.models.loading import load_generator, prepare
    from binarize.progress import ProgressBar

    pipeline = prepare(load_generator(model), device, dtype, scheduler, pack=packing)
    check_writable("L" if pipeline.image_shape[0] == 1 else "RGB", files[0])
    steps = pipeline.num_inference_steps if steps is None else steps
    options = {"num_inference_steps": steps, "guidance_scale": guidance}
    started, images = time.perf_counter(), []
    with ProgressBar(total=steps * math.ceil(count / batch_size), unit="pass") as bar, counting(bar.update):
        found = generate_images(pipeline, count, class_labels=classes, seed=seed, batch_size=batch_size, **options)
        for number, image in enumerate(found):
            if in_folder:
                make_folder(target)
                save_image(image, files[number], force=force)
            else:
                images.append(image)
    if images:
        save_image(image_grid(images, columns), target, force=force)
    seconds = time.perf_counter() - started
    echo(
        f"{target}: {count} image{'s' if count > 1 else ''}, {seconds:.1f} s, {steps} steps, on {pipeline.device.type}"
    )
