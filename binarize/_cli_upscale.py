"""`binarize upscale`: a picture, or a folder of them, enlarged by a trained model."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from binarize._cli_options import (
    Device,
    DeviceOption,
    ForceOption,
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
    from binarize.imaging import Picture


@dataclass(frozen=True)
class Job:
    """A picture file and where its enlargement goes."""

    source: Path
    target: Path


def upscale(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A picture, or a folder of pictures.")],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="The new picture, or a folder for it; PNG files go into a folder.")
    ],
    model: Annotated[
        Path,
        typer.Option("--model", "-m", help="A trained model: a folder, a run's folder, a packed or a released file."),
    ],
    scale: ScaleOption = None,
    steps: StepsOption = 50,
    tile: TileOption = None,
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
    gives the same picture. Results are written whole or not at all.

    ```
    binarize upscale small.png large.png --model runs/bidiffsr_x4/model
    binarize upscale photos/ enlarged/ --model runs/bidiffsr_x4/model --steps 20
    binarize upscale small.png large.png --model BI-DiffSR_x2.pth --scale 2
    binarize upscale panorama.jpg large.png --model my-model --tile 512 --scheduler dpm++
    ```
    """
    from tqdm import tqdm

    from binarize._cli_load import load_pipeline, prepare, sample
    from binarize.imaging import read_picture, save_picture

    jobs = plan_jobs(source, target, force=force)
    modes = _decode(jobs)
    pipeline = prepare(load_pipeline(model, scale=scale), device, precision, scheduler, packing)
    for job, pixel in modes.values():
        _check_target(job, pixel)
    with tqdm(total=len(jobs) * steps, unit="step", disable=not shows_progress()) as bar:
        for job in jobs:
            bar.set_description(job.source.name)
            began = time.perf_counter()
            large = sample(
                pipeline,
                read_picture(job.source),
                steps=steps,
                seed=seed,
                tile=tile,
                overlap=overlap,
                advance=bar.update,
            )
            save_picture(large, job.target, force=force)
            with bar.external_write_mode():
                typer.echo(f"{job.target}: {large.width}x{large.height}, {time.perf_counter() - began:.1f} s")


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
    from binarize.imaging import list_pictures

    if source.is_dir():
        if target.exists() and not target.is_dir():
            raise BinarizeError(f"{target}: is a file; the pictures of a folder go into a folder.")
        jobs = [Job(path, target / f"{path.stem}.png") for path in list_pictures(source)]
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


def _decode(jobs: list[Job]) -> dict[str, tuple[Job, Picture]]:
    """Decode every source once, so that a broken one is found before hours of work; return a pixel of each mode."""
    import torch

    from binarize.imaging import read_picture
    from binarize.imaging.pairs import raise_all

    modes: dict[str, tuple[Job, Picture]] = {}
    problems = []
    for job in jobs:
        try:
            picture = read_picture(job.source)
        except BinarizeError as error:
            problems.append(str(error))
            continue
        alpha = None if picture.alpha is None else torch.zeros(1, 1, 1)
        pixel = picture.with_pixels(torch.zeros(3, 1, 1), alpha)
        modes.setdefault(pixel.to_pil().mode, (job, pixel))
    raise_all(jobs[0].source.parent, problems)
    return modes


def _check_target(job: Job, pixel: Picture) -> None:
    """Write one pixel beside the target: that the folder, the format and the mode go together shows in it."""
    from binarize.imaging import save_picture

    job.target.parent.mkdir(parents=True, exist_ok=True)
    probe = job.target.with_name(f".probe-{job.target.name}")
    try:
        save_picture(pixel, probe, force=True)
    except BinarizeError as error:
        raise BinarizeError(str(error).replace(str(probe), str(job.target))) from error
    finally:
        probe.unlink(missing_ok=True)
