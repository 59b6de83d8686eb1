"""What `binarize upscale` will read and write, planned and checked before any work is done."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from binarize.errors import BinarizeError

ALWAYS_UPSCALED = 2**23  # pixels of a result: 1 GB while it is sampled
SUFFIXES = {
    "png": (".png",), "jpeg": (".jpg", ".jpeg", ".jfif"), "webp": (".webp",), "avif": (".avif",),
    "tiff": (".tif", ".tiff"), "bmp": (".bmp",),
}  # fmt: skip
"""The formats of results, and the suffixes of each; the first is that of files without a given name."""
Size = tuple[int, int]


class Job(NamedTuple):
    """An image file and the file of its result."""

    source: Path
    target: Path


class Request(NamedTuple):
    """What the user asked for: images and folders, and where and how results are written."""

    sources: Sequence[Path]
    output: Path | None
    scale: int
    form: str | None = None
    recursive: bool = False

    @property
    def several(self) -> bool:
        """Whether one bad image does not stop the others."""
        return len(self.sources) > 1 or self.sources[0].is_dir()

    @property
    def suffix(self) -> str:
        """The suffix of results whose names the user did not give."""
        return SUFFIXES["png" if self.form is None else self.form][0]

    @property
    def name(self) -> str:
        """What error messages call the sources."""
        return str(self.sources[0]) if len(self.sources) == 1 else f"{len(self.sources)} inputs"


def split_positional(paths: Sequence[Path], scale: int) -> tuple[list[Path], Path | None]:
    """Return IN... and OUT of arguments without `--output`: a second of two is OUT unless it is an image file.

    An image of the size of the first one's result could be either, so it must be named by `--output`.
    """
    if len(paths) != 2 or not _is_image(paths[1]) or paths[0].is_dir():
        return (list(paths), None) if len(paths) != 2 else ([paths[0]], paths[1])
    height, width = _size(paths[0]) or (0, 0)
    if _identity(paths[0]) == _identity(paths[1]):
        raise BinarizeError(f"{paths[1]}: is one of the source images; choose another place.")
    if _size(paths[1]) == (height * scale, width * scale):
        fix = f"add --output {paths[1]} to replace it, or --output FOLDER to upscale both"
        raise BinarizeError(f"{paths[1]}: already exists, and may be a result or another image; {fix}.")
    return list(paths), None


def plan(request: Request, *, force: bool, skip_existing: bool) -> list[Job]:
    """Return a job for each image to upscale, after checking the names. Nothing is written."""
    output = request.output
    if request.several and output is not None and not output.is_dir():
        what = "the images of a folder" if len(request.sources) == 1 else "several images"
        if output.exists():
            raise BinarizeError(f"{output}: is a file; {what} need a folder.")
        if len(request.sources) > 1 and any(output.suffix.lower() in suffixes for suffixes in SUFFIXES.values()):
            raise BinarizeError(f"{output}: is the name of one image; {what} need a folder.")
    jobs = list(dict.fromkeys(job for source in request.sources for job in _jobs(source, request)))
    inputs = {_identity(job.source) for job in jobs}
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


class Inspection(NamedTuple):
    """The height and width of each usable source, what is wrong with the others, and what their results lack."""

    sizes: dict[Path, Size]
    failures: list[str]
    notes: list[str]


def inspect(jobs: Sequence[Job], request: Request, max_pixels: int | None, quality: int | None) -> Inspection:
    """Read each image once, and return the sizes of those that can be upscaled and what is wrong with the others."""
    found = Inspection({}, [], [])
    for job in jobs:
        try:
            found.sizes[job.source] = _checked(job, request, max_pixels, quality, found.notes)
        except BinarizeError as error:
            found.failures.append(str(error))
    return found


def make_folder(folder: Path) -> None:
    """Create the folder of a result, and those around it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BinarizeError(f"{folder}: cannot create the folder: {error.strerror}") from error


def _jobs(source: Path, request: Request) -> list[Job]:
    output, alone = request.output, len(request.sources) == 1
    if source.is_dir():
        return _folder_jobs(source, request)
    if output is None:
        return [Job(source, source.with_name(f"{source.stem}_x{request.scale}{request.suffix}"))]
    if not alone or output.is_dir():
        return [Job(source, output / f"{source.stem}{request.suffix}")]
    if not output.parent.is_dir():
        raise BinarizeError(f"{output}: the folder {output.parent} does not exist; create it first.")
    if request.form is not None and output.suffix.lower() not in SUFFIXES[request.form]:
        raise BinarizeError(f"{output}: is not the name of a {request.form} file; omit --format, or give another name.")
    return [Job(source, output)]


def _folder_jobs(source: Path, request: Request) -> list[Job]:
    from binarize.imaging import list_images

    named = source.resolve() if source.name in ("", "..") else source
    folder = named.with_name(f"{named.name}_x{request.scale}")
    if request.output is not None:
        folder = request.output if len(request.sources) == 1 else request.output / named.name
    images = list_images(source, recursive=request.recursive)
    inside = folder.resolve()
    if inside != source.resolve() and inside.is_relative_to(source.resolve()):  # the results of an earlier run
        images = [path for path in images if not path.resolve().is_relative_to(inside)]
    return [Job(path, folder / path.relative_to(source).with_suffix(request.suffix)) for path in images]


def _checked(job: Job, request: Request, max_pixels: int | None, quality: int | None, notes: list[str]) -> Size:
    """Return height and width of a source whose result can be made and written."""
    from binarize.imaging import check_writable, image_size, read_image
    from binarize.imaging.limits import check_pixels

    source, target = job
    height, width = image_size(source)
    size, pixels = (height * request.scale, width * request.scale), height * width * request.scale**2
    what, fix = f"a result of {size[1]}x{size[0]}", f"add --max-pixels {pixels} to allow it."
    check_pixels(source, what, pixels, max_pixels, ALWAYS_UPSCALED, fix)
    image = read_image(source, max_pixels=max_pixels)
    if image.animated:
        fix = "extract its frames, such as with ffmpeg -i IN frames/%04d.png, and upscale their folder"
        raise BinarizeError(f"{source}: is an animation, and only still images are upscaled; {fix}.")
    check_writable(image.saved_mode, target, size=size, icc_profile=image.icc_profile, quality=quality)
    _check_replaceable(target, size)
    notes.extend(f"{source}: {note}" for note in image.notes)
    return height, width


def _check_replaceable(target: Path, size: Size) -> None:
    """Check that a file to be replaced is an earlier result, which has the size of the new one, or no image."""
    found = _size(target) if target.is_file() else None
    if found is not None and found != size:
        what = f"is an image of {found[1]}x{found[0]} pixels, not an earlier result, which has {size[1]}x{size[0]}"
        raise BinarizeError(f"{target}: {what}; remove it, or give another name.")


def _size(path: Path) -> Size | None:
    """Return height and width of an image file, or None for another file."""
    from binarize.imaging import image_size

    try:
        return image_size(path)
    except BinarizeError:
        return None


def _is_image(path: Path) -> bool:
    return path.is_file() and _size(path) is not None


def _identity(path: Path) -> tuple[int, int] | str:
    """Return what all names of a file have in common, be they links or differ in case."""
    try:
        status = path.stat()
    except OSError:
        return os.path.realpath(path)
    return status.st_dev, status.st_ino
