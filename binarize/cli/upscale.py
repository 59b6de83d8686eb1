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

if TYPE_CHECKING:
    from binarize.models import SuperResolutionPipeline

DEFAULT_SCALE = 2
Size = tuple[int, int]

_OUT = "The new image, or a folder for it; a folder gets PNG files. By default beside IN, such as photo_x2.png."
_MODEL = f"{opt.MODEL} By default the one that comes with binarize."
_SCALE = "2 or 4, by default 2. With --model, the scale of models that do not store it: .pth files and bare networks."


class Job(NamedTuple):
    """An image file and the file of its result."""

    source: Path
    target: Path


def upscale(
    source: Annotated[Path, typer.Argument(metavar="IN", help="An image, or a folder of images.")],
    target: Annotated[Path | None, typer.Argument(metavar="OUT", show_default=False, help=_OUT)] = None,
    model: Annotated[Path | None, typer.Option("--model", "-m", show_default=False, help=_MODEL)] = None,
    scale: Annotated[int | None, typer.Option(min=1, show_default=False, help=_SCALE)] = None,
    steps: opt.StepsOption = None,
    tile: opt.AutoTileOption = None,
    overlap: opt.OverlapOption = None,
    seed: opt.SeedOption = 0,
    scheduler: opt.SchedulerOption = None,
    device: opt.DeviceOption = "auto",
    dtype: opt.DtypeOption = "float32",
    packing: opt.PackOption = True,
    force: opt.ForceOption = False,
) -> None:
    """Upscale an image, or a folder of images.

    Any size and mode: greyscale stays greyscale, 16-bit stays 16-bit, and transparency is upscaled too. The same seed
    gives the same image. A result is written completely or not at all, and replaces nothing without `--force`.

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
    from binarize.models import default_model
    from binarize.models.loading import load_pipeline, prepare, sample, scale_of
    from binarize.models.tiling import tile_grid
    from binarize.progress import ProgressBar

    if not source.exists():  # before anything is downloaded
        raise BinarizeError(f"{source}: no such file or folder; give an image, or a folder of images.")
    if model is None:
        scale = DEFAULT_SCALE if scale is None else scale
        model = default_model(scale)
    if target is None:
        target = _default_target(source, scale_of(model, scale))
    jobs = _plan(source, target, force=force)
    sizes = _decode(jobs)  # finds broken sources before hours of work
    pipeline = prepare(load_pipeline(model, scale=scale), device, dtype, scheduler, pack=packing)
    jobs[0].target.parent.mkdir(parents=True, exist_ok=True)
    steps = pipeline.num_inference_steps if steps is None else steps
    tiles = {path: tile_for(size, pipeline.scale, tile) for path, size in sizes.items()}
    grid = partial(tile_grid, overlap=overlap, multiple=pipeline.size_multiple)
    sides = {path: [side * pipeline.scale for side in size] for path, size in sizes.items()}
    passes = steps * sum(len(grid(*sides[path], tile=side)) for path, side in tiles.items())
    _warm_up(pipeline)
    start_up, sampling = time.time() - started, 0.0
    with ProgressBar(total=passes, unit="pass") as bar:
        upscale_one = partial(sample, pipeline, steps=steps, seed=seed, overlap=overlap, on_pass=bar.update)
        for path, result in jobs:
            bar.set_description(printable(path.name))
            image = read_image(path)
            before = time.perf_counter()
            large = upscale_one(image, tile=tiles[path])
            seconds = time.perf_counter() - before
            sampling += seconds
            save_image(large, result, force=force)
            with bar.external_write_mode():
                echo(f"{result}: {large.width}x{large.height}, {seconds:.1f} s")
    each = f"{steps} step{'s' if steps > 1 else ''} per image"
    echo(f"start-up {start_up:.1f} s, sampling {sampling:.1f} s ({each}, on {pipeline.device.type})")


def process_start() -> float:
    """Return when the program started, in seconds since the epoch; the present off Linux and in other programs."""
    program = Path(sys.argv[0])
    if program.stem != "binarize" and program.parts[-2:] not in (("binarize", "__main__.py"), ("cli", "__main__.py")):
        return time.time()
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return time.time()
    return time.time() - age


def _default_target(source: Path, scale: int) -> Path:
    source = source.resolve() if source.name in ("", "..") else source
    return source.with_name(f"{source.name}_x{scale}" if source.is_dir() else f"{source.stem}_x{scale}.png")


def tile_for(size: Size, scale: int, tile: int | None) -> int | None:
    """Return the tile in output pixels, or None, for an image of low-resolution height and width and for --tile."""
    if tile is None:
        return opt.TILE if max(size) * scale > opt.UNTILED else None
    return tile if tile > 0 else None


def _plan(source: Path, target: Path, *, force: bool) -> list[Job]:
    """Return a job for each image, after checking the names. Nothing is read or written."""
    from binarize.imaging import list_images

    if source.is_dir() and target.exists() and not target.is_dir():
        raise BinarizeError(f"{target}: is a file; the images of a folder need a folder.")
    if not source.is_dir() and not target.is_dir() and not target.parent.is_dir():
        raise BinarizeError(f"{target}: the folder {target.parent} does not exist; create it first.")
    in_folder = source.is_dir() or target.is_dir()
    sources = list_images(source) if source.is_dir() else [source]
    jobs = [Job(path, target / f"{path.stem}.png" if in_folder else target) for path in sources]
    resolved = {path.resolve() for path in sources}
    source_of: dict[Path, Path] = {}
    for job in jobs:
        other = source_of.setdefault(job.target, job.source)
        if other != job.source:
            raise BinarizeError(f"{other} and {job.source} would both become {job.target}; rename one of them.")
        if job.target.resolve() in resolved:
            raise BinarizeError(f"{job.target}: is one of the source images; choose another place.")
        if job.target.exists() and not force:
            raise BinarizeError(f"{job.target}: already exists; give another name, or --force to overwrite it.")
    return jobs


def _decode(jobs: list[Job]) -> dict[Path, Size]:
    """Return the height and width of every source, and check that each target can hold its source's mode."""
    from binarize.imaging import check_writable, read_image
    from binarize.imaging.pairs import raise_all

    sizes: dict[Path, Size] = {}
    problems = []
    for source, target in jobs:
        try:
            image = read_image(source)
            check_writable(image.saved_mode, target)
            sizes[source] = image.rgb.shape[-2], image.rgb.shape[-1]
        except BinarizeError as error:
            problems.append(str(error))
    raise_all(jobs[0].source.parent, problems)
    return sizes


def _warm_up(pipeline: SuperResolutionPipeline) -> None:
    """Run a packed network once on a tiny input, so that compiling its kernels counts as start-up."""
    import torch

    from binarize.conversion.packing import is_packed

    if is_packed(pipeline.unet):
        side = pipeline.size_multiple
        empty = torch.zeros(1, 3, side, side, dtype=pipeline.unet.dtype, device=pipeline.device)
        with torch.inference_mode():
            pipeline.unet(empty, 0, empty)
