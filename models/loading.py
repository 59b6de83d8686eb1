"""From the name that a user gives to a model to a pipeline that is ready to run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.utils import logging as diffusers_logging
from PIL import Image

from binarize.conversion.packing import is_packed, pack_if_possible, unpack
from binarize.errors import BinarizeError, clip, one_line
from binarize.imaging import DecodedImage
from binarize.json_files import read_json
from binarize.kernels.backends import kernels_for
from binarize.models.checks import OtherTimestepsError, check_weights
from binarize.models.generation import GenerationPipeline
from binarize.models.hub import HUB_NAME, download
from binarize.models.official import load_official
from binarize.models.pipeline import SuperResolutionPipeline
from binarize.models.unet import SRUNet
from binarize.packed.files import WEIGHTS

Device = Literal["auto", "cpu", "cuda", "mps"]
Dtype = Literal["float32", "bfloat16", "float16"]
Scheduler = Literal["ddim", "dpm++"]
PipelineT = TypeVar("PipelineT", SuperResolutionPipeline, GenerationPipeline)

PIPELINE, NETWORK, RUN = "model_index.json", "config.json", "model"
_NETWORK_FOLDERS = ("unet", "transformer")
CHECKPOINT_SUFFIXES, PACKED_SUFFIX = (".pth", ".pt"), ".safetensors"
_ALLOWED = (
    "a folder that `binarize train`, `binarize import-official` or `binarize pack` wrote, a run's folder, an SRUNet's "
    "folder, a packed network's .safetensors file, a released .pth file, or a name on the Hugging Face hub "
    "(user/repository or user/repository/folder, with @revision if need be)"
)
_SCHEDULERS: dict[str, Any] = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler}


def at_revision(path: Path, revision: str | None) -> Path:
    """Return a name on the Hugging Face hub with the revision that ``--revision`` gives, or `path` if it is None."""
    if revision is None:
        return path
    named = Path(f"{path}@{revision}")
    if path.exists():
        problem = f"{path} is on this machine; leave the revision out."
    elif "@" in str(path):
        problem = f"{path} has a revision; give one of them."
    elif len(revision) > 200 or not _may_be_on_the_hub(named):
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
        if not _may_be_on_the_hub(path):
            raise BinarizeError(f"{path}: no such file or folder; give {_ALLOWED}.")
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


def scale_of(path: Path, scale: int | None = None) -> int:
    """Return the scale of a model without loading its weights; see `load_pipeline`."""
    path = _pipeline_around(locate(path))
    if not (path / PIPELINE).is_file():
        _check_is_srunet(path)
        if scale is None:
            raise BinarizeError(f"{path}: does not store its scale; add --scale, such as --scale 4.")
        return scale
    index = _read_json(path / PIPELINE)
    if index.get("_class_name") != "SuperResolutionPipeline":
        kind = index.get("_class_name")
        fix = "`binarize generate` runs pipelines that generate images"
        raise BinarizeError(f"{path}: is a {kind!s:.80}, not a SuperResolutionPipeline; {fix}.")
    known = index.get("scale")
    if scale is not None and scale != known:
        raise BinarizeError(f"--scale {scale}: {path} upscales by {known}; omit --scale.")
    if not isinstance(known, int):
        raise BinarizeError(f"{path / PIPELINE}: scale is {known!r}; it must be the integer of the training.")
    return known


def load_network(path: Path) -> SRUNet:
    """Load the network of a model on the CPU, in evaluation mode; see `locate`."""
    path = locate(path)
    if path.is_file() and path.suffix.lower() in CHECKPOINT_SUFFIXES:
        return load_official(path)
    return _read_network(path / "unet" if (path / PIPELINE).is_file() else path)


def load_pipeline(path: Path, *, scale: int | None = None) -> SuperResolutionPipeline:
    """Load a model as a pipeline on the CPU.

    The network inside a pipeline's folder, or its file, stands for the pipeline. Any other network is combined with the
    noise schedule of the released models. `scale` is required if the model does not store it, and must not differ from
    a stored one.
    """
    path = _pipeline_around(locate(path))
    scale = scale_of(path, scale)
    if not (path / PIPELINE).is_file():
        try:
            return SuperResolutionPipeline(load_network(path), scale=scale)
        except OtherTimestepsError as error:
            what = f"is a network of {error.trained} timesteps without its noise schedule; the released one has"
            fix = f"Give the folder of its pipeline, which holds a {PIPELINE}."
            raise BinarizeError(f"{path}: {what} {error.scheduled}. {fix}") from error
    network = _read_network(path / "unet")
    with _reading(path, "a pipeline"):
        return SuperResolutionPipeline.from_pretrained(str(path), unet=network, local_files_only=True)


def generates(path: Path) -> bool:
    """Whether a model is the folder of a pipeline for another task than super-resolution."""
    path = locate(path)
    if not path.is_dir() or not (path / PIPELINE).is_file():
        return False
    return _read_json(path / PIPELINE).get("_class_name") != SuperResolutionPipeline.__name__


def load_generator(path: Path) -> GenerationPipeline:
    """Load a model that generates images as a pipeline on the CPU: a run's folder, or the folder of a pipeline.

    A `DDPMPipeline` or another pipeline of diffusers with a ``unet`` and a ``scheduler`` alone is unconditional.
    """
    path = locate(path)
    if not (path / PIPELINE).is_file():
        raise BinarizeError(f"{path}: is no pipeline's folder; give one that holds a {PIPELINE}.")
    index = _read_json(path / PIPELINE)
    if index.get("_class_name") == SuperResolutionPipeline.__name__:
        raise BinarizeError(f"{path}: upscales images; use `binarize upscale`.")
    parts = {name for name, value in index.items() if isinstance(value, list) and len(value) == 2 and value[0]}
    if index.get("_class_name") != "GenerationPipeline" and parts != {"unet", "scheduler"}:
        raise BinarizeError(f"{path}: is a {index.get('_class_name')}, not a pipeline that generates images.")
    _read_json(path / "unet" / NETWORK)
    with _reading(path, "a pipeline"):
        pipeline = GenerationPipeline.from_pretrained(str(path), local_files_only=True)
    pipeline.unet.eval()
    return pipeline


def find_device(name: Device) -> torch.device:
    """Return a device of this machine by name; "auto" is a GPU if there is one."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if available[kind]))
    if not available[name]:
        found = ", ".join(kind for kind, is_there in available.items() if is_there)
        raise BinarizeError(f"--device {name}: PyTorch finds no such device here; available: {found}.")
    return torch.device(name)


def prepare(
    pipeline: PipelineT,
    device: Device = "auto",
    dtype: Dtype = "float32",
    scheduler: Scheduler | None = None,
    *,
    pack: bool = True,
) -> PipelineT:
    """Move a pipeline in place to a device and a dtype, replace its scheduler if one is named, and return it.

    A binary network is packed if `pack` is true and the device has kernels for its bits, and unpacked otherwise.
    """
    place, torch_dtype = find_device(device), getattr(torch, dtype)
    if scheduler is not None:
        pipeline.scheduler = _SCHEDULERS[scheduler].from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    like = torch.empty(0, dtype=torch_dtype, device=place)
    if pack and kernels_for(like) is not None:
        pack_if_possible(pipeline.unet, like)
    elif is_packed(pipeline.unet):
        unpack(pipeline.unet)
    with _quiet_diffusers():
        pipeline.to(place, torch_dtype)
    return pipeline


def sample(
    pipeline: SuperResolutionPipeline,
    image: Image.Image | DecodedImage,
    *,
    steps: int | None,
    seed: int,
    tile: int | None = None,
    overlap: int | None = None,
    on_pass: Callable[[], object] | None = None,
) -> Image.Image:
    """Upscale one image. The noise is drawn on the CPU, so that a seed gives the same noise on every device.

    `steps`, `tile` and `overlap` are as in `SuperResolutionPipeline.__call__`. `on_pass` is called after each pass of
    the network, that is, once per step and tile.
    """

    def hook(*_: object) -> None:  # what a hook returns would replace the output
        if on_pass is not None:
            on_pass()

    handle = pipeline.unet.register_forward_hook(hook)
    try:
        options: dict[str, Any] = {"num_inference_steps": steps, "tile": tile, "overlap": overlap, "return_dict": False}
        return pipeline(image, generator=torch.Generator().manual_seed(seed), **options)[0][0]
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and not any(words in str(error) for words in ("allocate memory", "bad_alloc")):
            raise
        device, smaller = pipeline.device.type, "--tile 256" if tile is None else f"a --tile below {tile}"
        raise BinarizeError(f"the image is too large for the memory of {device}; try {smaller}.") from error
    finally:
        handle.remove()


def _pipeline_around(path: Path) -> Path:
    """Return the pipeline's folder if `path` is the network inside it, or the network's file; else `path`."""
    network = path.parent if path.is_file() else path
    return network.parent if network.name == "unet" and (network.parent / PIPELINE).is_file() else path


def _may_be_on_the_hub(path: Path) -> bool:
    is_file_name = path.suffix.lower() in (*CHECKPOINT_SUFFIXES, PACKED_SUFFIX)
    # If the first folder exists, the rest of a local path is misspelt.
    return HUB_NAME.fullmatch(path.as_posix()) is not None and not is_file_name and not Path(path.parts[0]).exists()


def _read_network(path: Path) -> SRUNet:
    _check_is_srunet(path)
    if path.is_dir() and not any(path.glob("diffusion_pytorch_model*")):
        raise BinarizeError(f"{path / WEIGHTS}: is missing; the model is incomplete. Copy or save it again.")
    with _reading(path, "an SRUNet"):  # without accelerate's meta tensors, whose errors do not show both shapes
        network: SRUNet = SRUNet.from_pretrained(path, local_files_only=True, low_cpu_mem_usage=False)
    check_weights(network, str(path))
    return network.eval()


def _check_is_srunet(path: Path) -> None:
    """Raise BinarizeError if a folder holds another network."""
    if path.is_file():
        return
    config = _read_json(path / NETWORK)
    kind, host = config.get("_class_name"), config.get("host")
    if kind != "SRUNet":
        kind = host.get("class") if isinstance(host, dict) else kind
        what = "but the command line runs SRUNet; use `binarize.load` in Python"
        raise BinarizeError(f"{path}: holds a {kind!s:.80}, {what}.")


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Silence diffusers, and turn its errors, those of its hub and of safetensors into one line that names the file."""
    try:
        with _quiet_diffusers():
            yield
    except BinarizeError as error:
        if type(error) is not BinarizeError or str(path) in str(error):
            raise
        raise BinarizeError(f"{path}: {error}") from error
    except Exception as error:
        raise BinarizeError(f"{path}: cannot be read as {what}: {one_line(error)}") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise BinarizeError(f"{path}: is missing; the model is incomplete. Copy or save it again.")
    return read_json(path)


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Silence diffusers' progress bars and advice."""
    verbosity, bars = diffusers_logging.get_verbosity(), diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(verbosity)
        if bars:
            diffusers_logging.enable_progress_bar()
