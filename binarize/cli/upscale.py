"""`binarize upscale`: upscale an image, or a folder of images."""

from __future__ import annotations

import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from binarize.cli import options as opt
from binarize.cli.streams import echo, printable
from binarize.errors import BinarizeError
from binarize.locks import start_ticks

if TYPE_CHECKING:
    from binarize.models import SuperResolutionPipeline

DEFAULT_SCALE = 2
ALWAYS_UPSCALED = 2**23  # pixels of a result: 1 GB while it is sampled
Size = tuple[int, int]

_OUT = "The new image, or a folder for it; a folder gets PNG files. By default beside IN, such as photo_x2.png."
_MODEL = f"{opt.MODEL} By default the one that comes with binarize."
_MAX_PIXELS = "Largest result in pixels; by default 100 per byte of the file, but at least 8 million."
_SKIP = "Leave existing results as they are: goes on after an interruption."
_SCALE = "2 or 4, by default 2. With --model, the scale of models that do not store it: .pth files and bare networks."


class Job(NamedTuple):
    """An image file and the file of its result."""

    source: Path
    target: Path


def upscale(
    source: Annotated[Path, typer.Argument(metavar="IN", help="An image, or a folder of images.")],
    target: Annotated[Path | None, typer.Argument(metavar="OUT", show_default=False, help=_OUT)] = None,
    model: Annotated[Path | None, typer.Option("--model", "-m", show_default=False, help=_MODEL)] = None,
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
    """Upscale an image, or a folder of images.

    Greyscale stays greyscale, 16-bit greyscale stays 16-bit (other 16-bit images become 8-bit), and transparency is
    upscaled too. The same seed gives the same bytes with the same model, settings, number of threads, processor and
    versions; otherwise single pixels may differ by a few levels of 255. A result is written completely or not at all,
    and replaces nothing without `--force`. Images of a folder that cannot be read do not stop the others; the exit
    status is then 1.

    ```
    binarize upscale photo.jpg    # writes photo_x2.png beside it
    binarize upscale photo.jpg large.png --scale 4
    binarize upscale photos/ upscaled/ --model runs/bidiffsr_x4/model --steps 20
    binarize upscale panorama.jpg large.png --model my-model --tile 256 --scheduler dpm++
    binarize upscale small.png large.png --model user/repository
    ```
    """
    started = process_start()
    from binarize.imaging import read_image, save_image
    from binarize.imaging.pairs import raise_all
    from binarize.models import default_model
    from binarize.models.checks import NotFiniteError
    from binarize.models.loading import load_pipeline, prepare, sample, scale_of
    from binarize.models.memory import check_sampling_memory
    from binarize.models.tiling import tile_grid
    from binarize.progress import ProgressBar

    if force and skip_existing:
        raise typer.BadParameter("--force replaces existing results, --skip-existing leaves them; give one.")
    if not source.exists():  # before anything is downloaded
        raise BinarizeError(f"{source}: no such file or folder; give an image, or a folder of images.")
    if model is None:
        scale = DEFAULT_SCALE if scale is None else scale
        model = default_model(scale)
    factor = scale_of(model, scale)
    named = target is not None
    jobs = _plan(source, target or _default_target(source, factor), force=force, skip_existing=skip_existing)
    if not jobs:
        echo("nothing to do: every result exists")
        return
    several, failures = source.is_dir(), list[str]()
    sizes = _inspect(jobs, factor, max_pixels, failures, named=named)  # finds bad sources before hours of work
    if not sizes or (failures and not several):
        raise_all(source, failures)
    if failures:
        echo(f"{len(failures)} of {len(jobs)} images cannot be used; upscaling the others", err=True)
    pipeline = prepare(load_pipeline(model, scale=scale), device, dtype, scheduler, pack=packing)
    steps = pipeline.num_inference_steps if steps is None else steps
    tiles = {path: tile_for(size, factor, tile) for path, size in sizes.items()}
    grid = partial(tile_grid, overlap=overlap, multiple=pipeline.size_multiple)
    grids = {path: grid(*(side * factor for side in size), tile=tiles[path]) for path, size in sizes.items()}
    if pipeline.device.type == "cpu":
        for each in grids.values():
            check_sampling_memory(pipeline.unet, each)
    jobs[0].target.parent.mkdir(parents=True, exist_ok=True)
    _warm_up(pipeline)
    start_up, sampling = time.time() - started, 0.0
    with ProgressBar(total=steps * sum(map(len, grids.values())), unit="pass") as bar:
        upscale_one = partial(sample, pipeline, steps=steps, seed=seed, overlap=overlap, on_pass=bar.update)
        for path, result in (job for job in jobs if job.source in sizes):
            bar.set_description(printable(path.name))
            before = time.perf_counter()
            try:
                image = read_image(path, max_pixels=max_pixels)
                before = time.perf_counter()
                large = upscale_one(image, tile=tiles[path])
            except NotFiniteError:
                raise  # every image would end like this
            except BinarizeError as error:
                if not several:
                    raise
                failures.append(str(error))
                continue
            seconds = time.perf_counter() - before
            sampling += seconds
            save_image(large, result, force=force)
            with bar.external_write_mode():
                echo(f"{result}: {large.width}x{large.height}, {seconds:.1f} s")
    each_steps = f"{steps} step{'s' if steps > 1 else ''} per image"
    echo(f"start-up {start_up:.1f} s, sampling {sampling:.1f} s ({each_steps}, on {pipeline.device.type})")
    raise_all(source, failures)


def process_start() -> float:
    """Return when the program started, in seconds since the epoch; the present off Linux and in other programs."""
    program = Path(sys.argv[0])
    if program.stem != "binarize" and program.parts[-2:] not in (("binarize", "__main__.py"), ("cli", "__main__.py")):
        return time.time()
    ticks = start_ticks(os.getpid())
    if ticks is None:
        return time.time()
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


def _default_target(source: Path, scale: int) -> Path:
    source = source.resolve() if source.name in ("", "..") else source
    return source.with_name(f"{source.name}_x{scale}" if source.is_dir() else f"{source.stem}_x{scale}.png")


def tile_for(size: Size, scale: int, tile: int | None) -> int | None:
    """Return the tile in output pixels, or None, for an image of low-resolution height and width and for --tile."""
    if tile is None:
        return opt.TILE if max(size) * scale > opt.UNTILED else None
    return tile if tile > 0 else None


def _plan(source: Path, target: Path, *, force: bool, skip_existing: bool) -> list[Job]:
    """Return a job for each image to upscale, after checking the names. Nothing is read or written."""
    from binarize.imaging import list_images

    if source.is_dir() and target.exists() and not target.is_dir():
        raise BinarizeError(f"{target}: is a file; the images of a folder need a folder.")
    if not source.is_dir() and not target.is_dir() and not target.parent.is_dir():
        raise BinarizeError(f"{target}: the folder {target.parent} does not exist; create it first.")
    in_folder = source.is_dir() or target.is_dir()
    sources = list_images(source) if source.is_dir() else [source]
    jobs = [Job(path, target / f"{path.stem}.png" if in_folder else target) for path in sources]
    inputs = {_identity(path) for path in sources}
    source_of: dict[Path, Path] = {}
    for job in jobs:
        other = source_of.setdefault(job.target, job.source)
        if other != job.source:
            raise BinarizeError(f"{other} and {job.source} would both become {job.target}; rename one of them.")
        if _identity(job.target) in inputs:
            raise BinarizeError(f"{job.target}: is one of the source images; choose another place.")
        if job.target.exists() and not force and not skip_existing:
            fix = "give another name, --force to overwrite it, or --skip-existing to leave it."
            raise BinarizeError(f"{job.target}: already exists; {fix}")
    return [job for job in jobs if not (skip_existing and job.target.exists())]


def _identity(path: Path) -> tuple[int, int] | str:
    """Return what all names of a file have in common, be they links or differ in case."""
    try:
        status = path.stat()
    except OSError:
        return os.path.realpath(path)
    return status.st_dev, status.st_ino


def _inspect(
    jobs: list[Job], scale: int, max_pixels: int | None, failures: list[str], *, named: bool
) -> dict[Path, Size]:
    """Return the height and width of every source whose result can be made, and add what is wrong to `failures`.

    `named` says that the user named the targets.
    """
    from binarize.imaging import check_writable, image_size, read_image
    from binarize.imaging.limits import check_pixels

    sizes: dict[Path, Size] = {}
    for source, target in jobs:
        try:
            height, width = image_size(source)
            size, pixels = (height * scale, width * scale), height * width * scale**2
            what = f"a result of {size[1]}x{size[0]}"
            fix = f"add --max-pixels {pixels} to allow it."
            check_pixels(source, what, pixels, max_pixels, ALWAYS_UPSCALED, fix)
            image = read_image(source, max_pixels=max_pixels)
            check_writable(image.saved_mode, target, size=size, icc_profile=image.icc_profile)
            if named:
                _check_replaceable(target, size)
            sizes[source] = height, width
        except BinarizeError as error:
            failures.append(str(error))
    return sizes


def _check_replaceable(target: Path, size: Size) -> None:
    """Check that a file to be replaced is an earlier result, which has the size of the new one, and not an input."""
    from binarize.imaging import image_size

    if not target.is_file():
        return
    try:
        found = image_size(target)
    except BinarizeError:  # not an image
        return
    if found != size:
        what = f"is an image of {found[1]}x{found[0]} pixels, not an earlier result, which has {size[1]}x{size[0]}"
        raise BinarizeError(f"{target}: {what}; remove it, or give another name.")


def _warm_up(pipeline: SuperResolutionPipeline) -> None:
    """Run a packed network once on a tiny input, so that compiling its kernels counts as start-up."""
    import torch

    from binarize.conversion.packing import is_packed

    if is_packed(pipeline.unet):
        side = pipeline.size_multiple
        empty = torch.zeros(1, 3, side, side, dtype=pipeline.unet.dtype, device=pipeline.device)
        with torch.inference_mode():
            pipeline.unet(empty, 0, empty)
