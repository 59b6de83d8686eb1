"""`binarize upscale`: a picture, or a folder of them, enlarged by a trained model."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from binarize.cli.options import (
    MODEL,
    TILE,
    UNTILED,
    AutoTileOption,
    Device,
    DeviceOption,
    ForceOption,
    OverlapOption,
    PackOption,
    Precision,
    PrecisionOption,
    SchedulerOption,
    SeedOption,
    StepsOption,
    shows_progress,
)
from binarize.errors import BinarizeError

if TYPE_CHECKING:
    from binarize.imaging import DecodedImage
    from binarize.models import SuperResolutionPipeline

DEFAULT_SCALE = 2


@dataclass(frozen=True)
class Job:
    """A picture file and where its enlargement goes."""

    source: Path
    target: Path


@dataclass(frozen=True)
class Decoded:
    """What decoding every source once has told: each one's (height, width), and a job and a pixel of each mode."""

    sizes: dict[Path, tuple[int, int]]
    modes: dict[str, tuple[Job, DecodedImage]]


def upscale(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A picture, or a folder of pictures.")],
    target: Annotated[
        Path | None,
        typer.Argument(
            metavar="OUT",
            show_default=False,
            help="The new picture, or a folder for it; PNG files go into a folder. By default beside IN, such as "
            "photo_x2.png.",
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            "-m",
            show_default=False,
            help=f"{MODEL} By default the one that comes with binarize.",
        ),
    ] = None,
    scale: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default=False,
            help="How many times larger: 2 or 4, by default 2. With --model, for models that do not say it: .pth files "
            "and bare networks.",
        ),
    ] = None,
    steps: StepsOption = None,
    tile: AutoTileOption = None,
    overlap: OverlapOption = None,
    seed: SeedOption = 0,
    scheduler: SchedulerOption = None,
    device: DeviceOption = Device.auto,
    precision: PrecisionOption = Precision.float32,
    packing: PackOption = True,
    force: ForceOption = False,
) -> None:
    """Enlarge a picture, or a folder of pictures.

    Any size, any mode: greyscale stays greyscale, 16-bit stays 16-bit, transparency is enlarged along. The same seed
    gives the same picture. Results are written whole or not at all, and replace nothing without `--force`.

    ```
    binarize upscale photo.jpg    # writes photo_x2.png beside it
    binarize upscale photo.jpg large.png --scale 4
    binarize upscale small.png large.png --model runs/bidiffsr_x4/model
    binarize upscale photos/ enlarged/ --model runs/bidiffsr_x4/model --steps 20
    binarize upscale small.png large.png --model BI-DiffSR_x2.pth --scale 2
    binarize upscale panorama.jpg large.png --model my-model --tile 256 --scheduler dpm++
    binarize upscale small.png large.png --model user/repository
    ```
    """
    began = process_start()
    from tqdm import tqdm

    from binarize.imaging import read_image, save_image
    from binarize.models.loading import load_pipeline, prepare, sample, scale_of

    if not source.exists():  # before anything is downloaded
        raise BinarizeError(f"{source}: no such file or folder; give a picture, or a folder of pictures.")
    if model is None:
        from binarize.models import default_model

        scale = DEFAULT_SCALE if scale is None else scale
        model = default_model(scale)
    if target is None:
        target = default_target(source, scale_of(model, scale))
    jobs = plan_jobs(source, target, force=force)
    decoded = _decode(jobs)
    pipeline = prepare(load_pipeline(model, scale=scale), device, precision, scheduler, packing)
    for job, pixel in decoded.modes.values():
        _check_target(job, pixel)
    steps = pipeline.num_inference_steps if steps is None else steps
    tiles = {job.source: tile_for(decoded.sizes[job.source], pipeline.scale, tile) for job in jobs}
    passes = sum(steps * _tiles_of(pipeline, decoded.sizes[path], side, overlap) for path, side in tiles.items())
    _warm_up(pipeline)
    started, sampling = time.time() - began, 0.0
    with tqdm(total=passes, unit="pass", disable=not shows_progress()) as bar:
        for job in jobs:
            bar.set_description(job.source.name)
            picture = read_image(job.source)
            before = time.perf_counter()
            side = tiles[job.source]
            large = sample(pipeline, picture, steps=steps, seed=seed, tile=side, overlap=overlap, advance=bar.update)
            seconds = time.perf_counter() - before
            sampling += seconds
            save_image(large, job.target, force=force)
            with bar.external_write_mode():
                typer.echo(f"{job.target}: {large.width}x{large.height}, {seconds:.1f} s")
    each = f"{steps} step{'s' if steps > 1 else ''} a picture"
    typer.echo(f"start-up {started:.1f} s, sampling {sampling:.1f} s ({each}, on {pipeline.device.type})")


def process_start() -> float:
    """Return when this program was started, in seconds since the epoch, so that its imports count as start-up.

    That is known on Linux, and where `binarize` is the program; elsewhere the answer is now.
    """
    is_ours = Path(sys.argv[0]).stem in ("binarize", "cli")
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return time.time()
    return time.time() - age if is_ours else time.time()


def default_target(source: Path, scale: int) -> Path:
    """Return where the enlargement of a picture or of a folder goes if nothing is said: beside it."""
    source = source.resolve() if source.name in ("", "..") else source
    return source.with_name(f"{source.name}_x{scale}" if source.is_dir() else f"{source.stem}_x{scale}.png")


def tile_for(size: tuple[int, int], scale: int, tile: int | None) -> int | None:
    """Return the tile of a picture in output pixels, or None for the whole at once.

    Args:
        size: Height and width of the small picture.
        scale: How many times it is enlarged.
        tile: What was asked for; None decides by the size, and 0 wants no tiles.
    """
    if tile is None:
        return TILE if max(size) * scale > UNTILED else None
    return tile if tile > 0 else None


def _tiles_of(pipeline: SuperResolutionPipeline, size: tuple[int, int], tile: int | None, overlap: int | None) -> int:
    """Return how many tiles a picture is seen in."""
    from binarize.models.tiling import tile_grid

    height, width = (side * pipeline.scale for side in size)
    return len(tile_grid(height, width, tile=tile, overlap=overlap, multiple=pipeline.size_multiple))


def _warm_up(pipeline: SuperResolutionPipeline) -> None:
    """Run the network once on next to nothing: its kernels are compiled or loaded then, which is no sampling."""
    import torch

    from binarize.conversion.packing import is_packed

    if is_packed(pipeline.unet):
        side = pipeline.size_multiple
        empty = torch.zeros(1, 3, side, side, dtype=pipeline.unet.dtype, device=pipeline.device)
        with torch.inference_mode():
            pipeline.unet(empty, 0, empty)


def plan_jobs(source: Path, target: Path, *, force: bool) -> list[Job]:
    """Return what is to be done, after checking the names; nothing is read or written.

    Args:
        source: A file or a folder.
        target: A file, or a folder; the target of a folder need not exist.
        force: Results may replace files, but never the sources.

    Raises:
        BinarizeError: If the source is missing, a target exists or is a source, two sources share a target, or a
            target's folder is missing.
    """
    from binarize.imaging import list_images

    if source.is_dir():
        if target.exists() and not target.is_dir():
            raise BinarizeError(f"{target}: is a file; the pictures of a folder go into a folder.")
        jobs = [Job(path, target / f"{path.stem}.png") for path in list_images(source)]
    elif target.is_dir():
        jobs = [Job(source, target / f"{source.stem}.png")]
    else:
        if not target.parent.is_dir():
            raise BinarizeError(f"{target}: the folder {target.parent} does not exist; create it first.")
        jobs = [Job(source, target)]
    sources = {job.source.resolve() for job in jobs}
    taken: dict[Path, Path] = {}
    for job in jobs:
        if job.target in taken:
            raise BinarizeError(
                f"{taken[job.target]} and {job.source} would both become {job.target}; rename one of them."
            )
        taken[job.target] = job.source
        if job.target.resolve() in sources:
            raise BinarizeError(f"{job.target}: is one of the pictures to be enlarged; choose another place.")
        if job.target.exists() and not force:
            raise BinarizeError(f"{job.target}: already exists; give another name, or --force to overwrite it.")
    return jobs


def _decode(jobs: list[Job]) -> Decoded:
    """Decode every source once, so that a broken one is found before hours of work."""
    import torch

    from binarize.imaging import read_image
    from binarize.imaging.pairs import raise_all

    sizes: dict[Path, tuple[int, int]] = {}
    modes: dict[str, tuple[Job, DecodedImage]] = {}
    problems = []
    for job in jobs:
        try:
            picture = read_image(job.source)
        except BinarizeError as error:
            problems.append(str(error))
            continue
        sizes[job.source] = (picture.rgb.shape[-2], picture.rgb.shape[-1])
        alpha = None if picture.alpha is None else torch.zeros(1, 1, 1)
        pixel = picture.with_pixels(torch.zeros(3, 1, 1), alpha)
        modes.setdefault(pixel.to_pil().mode, (job, pixel))
    raise_all(jobs[0].source.parent, problems)
    return Decoded(sizes, modes)


def _check_target(job: Job, pixel: DecodedImage) -> None:
    """Write one pixel beside the target: that the folder, the format and the mode go together shows in it."""
    from binarize.imaging import save_image

    job.target.parent.mkdir(parents=True, exist_ok=True)
    probe = job.target.with_name(f".probe-{job.target.name}")
    try:
        save_image(pixel, probe, force=True)
    except BinarizeError as error:
        raise BinarizeError(str(error).replace(str(probe), str(job.target))) from error
    finally:
        probe.unlink(missing_ok=True)
