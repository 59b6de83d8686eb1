"""Where a model is, and what its files say of it. Nothing here imports PyTorch or diffusers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from binarize.errors import BinarizeError, clip
from binarize.json_files import read_json

PIPELINE, NETWORK, RUN = "model_index.json", "config.json", "model"
_WEIGHTS = "diffusion_pytorch_model"
_NETWORK_FOLDERS = ("unet", "transformer")
CHECKPOINT_SUFFIXES, PACKED_SUFFIX = (".pth", ".pt"), ".safetensors"
_ALLOWED = (
    "a folder that `binarize train`, `binarize import-official` or `binarize pack` wrote, a run's folder, an SRUNet's "
    "folder, a packed network's .safetensors file, a released .pth file, or a name on the Hugging Face hub "
    "(user/repository or user/repository/folder, with @revision if need be)"
)
UPSCALES = "SuperResolutionPipeline"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)+(@[\w.-]+(/[\w.-]+)*)?")


def at_revision(path: Path, revision: str | None) -> Path:
    """Return a name on the Hugging Face hub with the revision that ``--revision`` gives, or `path` if it is None."""
    if revision is None:
        return path
    named = Path(f"{path}@{revision}")
    if path.exists():
        problem = f"{path} is on this machine; leave the revision out."
    elif "@" in str(path):
        problem = f"{path} has a revision; give one of them."
    elif len(revision) > 200 or not may_be_on_the_hub(named):
        problem = "needs a model on the Hugging Face hub, user/repository, and its branch, tag or commit, such as main."
    else:
        return named
    raise BinarizeError(f"--revision {clip(revision, 80)}: {problem}")


def locate(path: Path) -> Path:
    """Return the folder or the file of a model.

    `path` is a pipeline's folder, a run's output folder, an SRUNet's folder, a packed network's ``.safetensors`` file,
    or a released ``.pth`` file. If there is no such file or folder, it is ``user/repository`` or
    ``user/repository/folder`` on the Hugging Face hub, with ``@revision`` if need be, which is downloaded once.
    """
    if path.is_file():
        if path.suffix.lower() not in (*CHECKPOINT_SUFFIXES, PACKED_SUFFIX):
            raise BinarizeError(f"{path}: is not a model; give {_ALLOWED}.")
        return path
    if not path.is_dir():
        if not may_be_on_the_hub(path):
            raise BinarizeError(f"{path}: no such file or folder; give {_ALLOWED}.")
        from binarize.models.hub import download

        path = download(path.as_posix(), _ALLOWED)
    if (path / PIPELINE).is_file() or (path / NETWORK).is_file():
        return path
    if (path / RUN / PIPELINE).is_file():
        return path / RUN
    if (path / "state.pt").is_file():
        where = f"the model is in {path.parent / RUN} after the first validation"
        raise BinarizeError(f"{path}: is a training checkpoint, for `binarize train --resume`; {where}.")
    raise BinarizeError(f"{path}: holds no model (no {PIPELINE} or {NETWORK}); give {_ALLOWED}.")


def network_folder(path: Path) -> Path:
    """Return the folder of the network of a diffusers pipeline or network."""
    if (path / NETWORK).is_file():
        return path
    found = [path / name for name in _NETWORK_FOLDERS if (path / name / NETWORK).is_file()]
    if not found:
        raise BinarizeError(f"{path}: holds no network; looked for {NETWORK} in {', '.join(_NETWORK_FOLDERS)}.")
    return found[0]


def network_of(path: Path) -> Path:
    """Return the folder or the file of a model's SRUNet, after checking that it is one and has weights."""
    path = locate(path)
    if path.is_file():
        return path
    path = path / "unet" if (path / PIPELINE).is_file() else path
    config = _read_part(path / NETWORK)
    kind, host = config.get("_class_name"), config.get("host")
    if kind != "SRUNet":
        kind = host.get("class") if isinstance(host, dict) else kind
        what = "but the command line runs SRUNet; use `binarize.load` in Python"
        raise BinarizeError(f"{path}: holds a {kind!s:.80}, {what}.")
    if not any(path.glob(f"{_WEIGHTS}*")):
        missing = path / f"{_WEIGHTS}.safetensors"
        raise BinarizeError(f"{missing}: is missing; the model is incomplete. Copy or save it again.")
    return path


def scale_of(path: Path, scale: int | None = None) -> int:
    """Return the scale of a model, after checking that its files are there; see `load_pipeline`."""
    path = pipeline_around(locate(path))
    if not (path / PIPELINE).is_file():
        network_of(path)
        if scale is None:
            raise BinarizeError(f"{path}: does not store its scale; add --scale, such as --scale 4.")
        return scale
    index = _read_part(path / PIPELINE)
    if index.get("_class_name") != UPSCALES:
        kind = index.get("_class_name")
        fix = "`binarize generate` runs pipelines that generate images"
        raise BinarizeError(f"{path}: is a {kind!s:.80}, not a SuperResolutionPipeline; {fix}.")
    known = index.get("scale")
    if scale is not None and scale != known:
        raise BinarizeError(f"--scale {scale}: {path} upscales by {known}; omit --scale.")
    if not isinstance(known, int):
        raise BinarizeError(f"{path / PIPELINE}: scale is {known!r}; it must be the integer of the training.")
    network_of(path)
    return known


def generates(path: Path) -> bool:
    """Whether a model is the folder of a pipeline for another task than super-resolution."""
    path = locate(path)
    if not path.is_dir() or not (path / PIPELINE).is_file():
        return False
    return _read_part(path / PIPELINE).get("_class_name") != UPSCALES


def draws_images(path: Path, scale: int | None) -> bool:
    """Whether a model generates images, after checking that it has a network and is given no scale."""
    if not generates(path):
        return False
    if scale is not None:
        raise BinarizeError(f"--scale {scale}: {path} generates images; leave it out.")
    generator_of(path)
    return True


def generator_of(path: Path) -> Path:
    """Return the folder of a pipeline that generates images, after checking that it is one and has a network."""
    path = locate(path)
    if not (path / PIPELINE).is_file():
        raise BinarizeError(f"{path}: is no pipeline's folder; give one that holds a {PIPELINE}.")
    index = _read_part(path / PIPELINE)
    if index.get("_class_name") == UPSCALES:
        raise BinarizeError(f"{path}: upscales images; use `binarize upscale`.")
    parts = {name for name, value in index.items() if isinstance(value, list) and len(value) == 2 and value[0]}
    if index.get("_class_name") != "GenerationPipeline" and parts != {"unet", "scheduler"}:
        raise BinarizeError(f"{path}: is a {index.get('_class_name')}, not a pipeline that generates images.")
    _read_part(path / "unet" / NETWORK)
    return path


def pipeline_around(path: Path) -> Path:
    """Return the pipeline's folder if `path` is the network inside it, or the network's file; else `path`."""
    network = path.parent if path.is_file() else path
    return network.parent if network.name == "unet" and (network.parent / PIPELINE).is_file() else path


def may_be_on_the_hub(path: Path) -> bool:
    """Whether a path that is not on this machine can name a repository of the Hugging Face hub."""
    is_file_name = path.suffix.lower() in (*CHECKPOINT_SUFFIXES, PACKED_SUFFIX)
    # If the first folder exists, the rest of a local path is misspelt.
    return HUB_NAME.fullmatch(path.as_posix()) is not None and not is_file_name and not Path(path.parts[0]).exists()


def _read_part(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise BinarizeError(f"{path}: is missing; the model is incomplete. Copy or save it again.")
    return read_json(path)
