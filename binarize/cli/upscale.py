"""`binarize upscale`: upscale images and folders of images."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from binarize.cli import options as opt
from binarize.cli.jobs import Request, Size, inspect, make_folder, plan, split_positional
from binarize.cli.streams import echo, printable
from binarize.errors import BinarizeError
from binarize.importing import absent
from binarize.locks import start_ticks

if TYPE_CHECKING:
    from binarize.models.upscaler import Upscaler

DEFAULT_SCALE = 2
Format = Literal["png", "jpeg", "webp", "avif", "tiff", "bmp"]

_IN = "Images, and folders of images. After one IN, a name that is no image is OUT."
_OUT = "The new image, or a folder for the results. By default they are beside IN: photo_x2.png, photos_x2/."
_RECURSIVE = "Include the folders in folders."
_FORMAT = "Format of results whose name is not given; by default png."
_QUALITY = "Of JPEG (default 95), AVIF (90) and lossy WebP (by default, WebP is lossless)."
_MODEL = f"{opt.MODEL} Or photo, the default, or clean, which come with binarize."
_MAX_PIXELS = "Largest result in pixels; by default 100 per byte of the file, but at least 8 million."
_SKIP = "Leave existing results as they are: goes on after an interruption."
_SCALE = "2 or 4, by default 2. With --model, the scale of models that do not store it: .pth files and bare networks."


def upscale(
    paths: Annotated[list[Path], typer.Argument(metavar="IN...", help=_IN)],
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="OUT", show_default=False, help=_OUT)] = None,
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help=_RECURSIVE)] = False,
    form: Annotated[Format | None, typer.Option("--format", show_default=False, help=_FORMAT)] = None,
    quality: Annotated[int | None, typer.Option(min=1, max=100, show_default=False, help=_QUALITY)] = None,
    model: Annotated[Path | None, typer.Option("--model", "-m", show_default=False, help=_MODEL)] = None,
    revision: opt.RevisionOption = None,
    scale: Annotated[int | None, typer.Option(min=1, max=opt.MAX_SCALE, show_default=False, help=_SCALE)] = None,
    steps: opt.StepsOption = None,
    tile: opt.AutoTileOption = None,
    overlap: opt.OverlapOption = None,
    seed: opt.SeedOption = 0,
    scheduler: opt.SchedulerOption = None,
    device: opt.DeviceOption = "auto",
    dtype: opt.DtypeOption = "float32",
    packing: opt.PackOption = True,
    max_pixels: Annotated[int | None, typer.Option(min=1, max=2**40, show_default=False, help=_MAX_PIXELS)] = None,
    skip_existing: Annotated[bool, typer.Option("--skip-existing", help=_SKIP)] = False,
    force: opt.ForceOption = False,
) -> None:
    """Upscale images, and folders of images.

    Greyscale stays greyscale, 16-bit greyscale stays 16-bit (other 16-bit images become 8-bit), transparency is
    upscaled too, and EXIF data and colour profiles are kept. Animations are refused. The same seed gives the same bytes
    with the same model, settings, number of threads, processor and versions; otherwise single pixels may differ by a
    few levels of 255. A result is written completely or not at all. Existing files are replaced only with `--force`,
    inputs never. Images that cannot be used do not stop the others; the exit status is then 1.

    ```
    binarize upscale photo.jpg    # writes photo_x2.png beside it
    binarize upscale photo.jpg -o large.png --scale 4
    binarize upscale *.jpg -o upscaled/ --format jpeg --quality 90
    binarize upscale photos/ -o upscaled/ --recursive --skip-existing
    binarize upscale panorama.jpg -o large.png --model my-model --tile 256 --scheduler dpm++
    binarize upscale small.png -o large.png --model user/repository
    ```
    """
    started = process_start()
    if force and skip_existing:
        raise typer.BadParameter("--force replaces existing results, --skip-existing leaves them; give one.")
    for path in paths[:1] if output is None and len(paths) == 2 else paths:  # before anything is downloaded
        if not path.exists():
            raise BinarizeError(f"{path}: no such file or folder; give images, or folders of images.")
    from binarize.imaging import read_image, save_image
    from binarize.imaging.pairs import raise_all
    from binarize.models.default import KINDS, default_model
    from binarize.models.location import at_revision, scale_of

    if model is None or (str(model) in KINDS and not model.exists()):
        scale = DEFAULT_SCALE if scale is None else scale
        model = default_model(scale, None if model is None else str(model))
    model = at_revision(model, revision)
    factor = scale_of(model, scale)
    sources = paths
    if output is None:
        sources, output = split_positional(paths, factor)
    request = Request(sources, output, factor, form, recursive)
    jobs = plan(request, force=force, skip_existing=skip_existing)
    if not jobs:
        echo("nothing to do: every result exists")
        return
    sizes, failures, notes = inspect(jobs, request, max_pixels, quality)  # finds bad sources before hours of work
    if not sizes or (failures and not request.several):
        raise_all(request.name, failures)
    if failures:
        echo(f"{len(failures)} of {len(jobs)} images cannot be used; upscaling the others", err=True)
    for note in notes:
        echo(f"note: {note}", err=True)

    with suppress(ImportError), absent("torch._dynamo"):  # diffusers needs it for torch.compile alone
        import diffusers  # noqa: F401
    from binarize.models.checks import NotFiniteError
    from binarize.models.loading import load_upscaler, prepare, sample
    from binarize.models.memory import check_sampling_memory
    from binarize.models.tiling import tile_grid
    from binarize.progress import ProgressBar

    pipeline = prepare(load_upscaler(model, scale=scale), device, dtype, scheduler, pack=packing)
    steps = pipeline.num_inference_steps if steps is None else steps
    tiles = {path: tile_for(size, factor, tile) for path, size in sizes.items()}
    grid = partial(tile_grid, overlap=overlap, multiple=pipeline.size_multiple)
    grids = {path: grid(*(side * factor for side in size), tile=tiles[path]) for path, size in sizes.items()}
    for path, each in list(grids.items()) if pipeline.device.type == "cpu" else ():
        try:
            check_sampling_memory(pipeline.unet, each)
        except BinarizeError as error:
            failures.append(f"{path}: {error}")
            del grids[path]
    if not grids or (failures and not request.several):
        raise_all(request.name, failures)
    _warm_up(pipeline)
    start_up, sampling = time.time() - started, 0.0
    with ProgressBar(total=steps * sum(map(len, grids.values())), unit="pass") as bar:
        upscale_one = partial(sample, pipeline, steps=steps, seed=seed, overlap=overlap, on_pass=bar.update)
        for path, result in (job for job in jobs if job.source in grids):
            bar.set_description(printable(path.name))
            before = time.perf_counter()
            try:
                image = read_image(path, max_pixels=max_pixels)
                before = time.perf_counter()
                large = upscale_one(image, tile=tiles[path])
            except NotFiniteError:
                raise  # every image would end like this
            except BinarizeError as error:
                if not request.several:
                    raise
                failures.append(str(error))
                continue
            seconds = time.perf_counter() - before
            sampling += seconds
            make_folder(result.parent)
            save_image(large, result, force=force, quality=quality)
            with bar.external_write_mode():
                echo(f"{result}: {large.width}x{large.height}, {seconds:.1f} s")
    each_steps = f"{steps} step{'s' if steps > 1 else ''} per image"
    echo(f"start-up {start_up:.1f} s, sampling {sampling:.1f} s ({each_steps}, on {pipeline.device.type})")
    raise_all(request.name, failures)


def process_start() -> float:
    """Return when the program started, in seconds since the epoch; the present off Linux and in other programs."""
    program = Path(sys.argv[0])
    if program.stem != "binarize" and program.parts[-2:] not in (("binarize", "__main__.py"), ("cli", "__main__.py")):
        return time.time()
    ticks = start_ticks(os.getpid())
    if ticks is None:
        return time.time()
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


def tile_for(size: Size, scale: int, tile: int | None) -> int | None:
    """Return the tile in output pixels, or None, for an image of low-resolution height and width and for --tile."""
    if tile is None:
        return opt.TILE if max(size) * scale > opt.UNTILED else None
    return tile if tile > 0 else None


def _warm_up(pipeline: Upscaler) -> None:
    """Run a packed network once on a tiny input, so that compiling its kernels counts as start-up."""
    import torch

    from binarize.conversion.packing import is_packed

    if is_packed(pipeline.unet):
        side = pipeline.size_multiple
        empty = torch.zeros(1, 3, side, side, dtype=pipeline.unet.dtype, device=pipeline.device)
        with torch.inference_mode():
            pipeline.unet(empty, 0, empty)
