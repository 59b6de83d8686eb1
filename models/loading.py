"""From the name that a user gives to a model to a pipeline that is ready to run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import diffusers
import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image

from binarize.conversion.packing import is_packed, pack_if_possible, unpack
from binarize.errors import BinarizeError, one_line
from binarize.imaging import DecodedImage
from binarize.json_files import read_json
from binarize.kernels.backends import kernels_for
from binarize.models.checks import OtherTimestepsError, check_weights
from binarize.models.graphs import counting
from binarize.models.location import (
    CHECKPOINT_SUFFIXES,
    NETWORK,
    PIPELINE,
    generator_of,
    locate,
    network_of,
    pipeline_around,
    scale_of,
)
from binarize.models.official import load_official
from binarize.models.saving import check_network_keys
from binarize.models.unet import SRUNet
from binarize.models.upscaler import Upscaler, Upscaling

if TYPE_CHECKING:
    from binarize.models.generation import GenerationPipeline
    from binarize.models.pipeline import SuperResolutionPipeline

Device = Literal["auto", "cpu", "cuda", "mps"]
Dtype = Literal["float32", "bfloat16", "float16"]
Scheduler = Literal["ddim", "dpm++"]
PipelineT = TypeVar("PipelineT", Upscaler, "SuperResolutionPipeline", "GenerationPipeline")
UpscalingT = TypeVar("UpscalingT", Upscaler, "SuperResolutionPipeline")

# Names, because the second's module imports SciPy.
_SCHEDULERS = {"ddim": "DDIMScheduler", "dpm++": "DPMSolverMultistepScheduler"}


def load_network(path: Path) -> SRUNet:
    """Load the network of a model on the CPU, in evaluation mode; see `locate`."""
    path = network_of(path)
    return load_official(path) if path.suffix.lower() in CHECKPOINT_SUFFIXES else _read_network(path)


def load_upscaler(path: Path, *, scale: int | None = None) -> Upscaler:
    """Load a model to upscale images on the CPU and for nothing else; see `load_pipeline`."""
    return _load(Upscaler, Upscaler.from_folder, path, scale)


def load_pipeline(path: Path, *, scale: int | None = None) -> SuperResolutionPipeline:
    """Load a model as a pipeline on the CPU.

    The network inside a pipeline's folder, or its file, stands for the pipeline. Any other network is combined with the
    noise schedule of the released models. `scale` is required if the model does not store it, and must not differ from
    a stored one.
    """
    from binarize.models.pipeline import SuperResolutionPipeline  # with all networks of diffusers

    read = partial(SuperResolutionPipeline.from_pretrained, local_files_only=True)
    return _load(SuperResolutionPipeline, read, path, scale)


def load_generator(path: Path) -> GenerationPipeline:
    """Load a model that generates images as a pipeline on the CPU: a run's folder, or the folder of a pipeline.

    A `DDPMPipeline` or another pipeline of diffusers with a ``unet`` and a ``scheduler`` alone is unconditional.
    """
    from binarize.models.generation import GenerationPipeline  # with all networks of diffusers

    path = generator_of(path)
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
        pipeline.scheduler = getattr(diffusers, _SCHEDULERS[scheduler]).from_config(pipeline.scheduler.config)
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
    pipeline: Upscaling,
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
    try:
        options: dict[str, Any] = {"num_inference_steps": steps, "tile": tile, "overlap": overlap, "return_dict": False}
        with counting(on_pass):
            return pipeline(image, generator=torch.Generator().manual_seed(seed), **options)[0][0]
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and not any(words in str(error) for words in ("allocate memory", "bad_alloc")):
            raise
        device, smaller = pipeline.device.type, "--tile 256" if tile is None else f"a --tile below {tile}"
        raise BinarizeError(f"the image is too large for the memory of {device}; try {smaller}.") from error


def _load(kind: type[UpscalingT], read: Callable[..., UpscalingT], path: Path, scale: int | None) -> UpscalingT:
    path = pipeline_around(locate(path))
    scale = scale_of(path, scale)
    if not (path / PIPELINE).is_file():
        try:
            return kind(load_network(path), scale=scale)
        except OtherTimestepsError as error:
            what = f"is a network of {error.trained} timesteps without its noise schedule; the released one has"
            fix = f"Give the folder of its pipeline, which holds a {PIPELINE}."
            raise BinarizeError(f"{path}: {what} {error.scheduled}. {fix}") from error
    network = _read_network(path / "unet")
    with _reading(path, "a pipeline"):
        return read(str(path), unet=network)


def _read_network(path: Path) -> SRUNet:
    if path.is_dir():
        check_network_keys(SRUNet, read_json(path / NETWORK), path / NETWORK)
    with _reading(path, "an SRUNet"):  # without accelerate's meta tensors, whose errors do not show both shapes
        network: SRUNet = SRUNet.from_pretrained(path, local_files_only=True, low_cpu_mem_usage=False)
    check_weights(network, str(path))
    return network.eval()


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
