"""From what a user calls a model to a pipeline: a folder, a run, a released checkpoint, or a name on the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from binarize.errors import BinarizeError

if TYPE_CHECKING:
    from PIL import Image

    from binarize.cli.options import Device, Precision, Scheduler
    from binarize.imaging import DecodedImage
    from binarize.models import SRUNet, SuperResolutionPipeline

PIPELINE, NETWORK, RUN = "model_index.json", "config.json", "model"
CHECKPOINT_SUFFIXES, PACKED_SUFFIX = (".pth", ".pt"), ".safetensors"
_ALLOWED = (
    "a folder that `binarize train`, `binarize import-official` or `binarize pack` wrote, a run's folder, an SRUNet's "
    "folder, a packed network's .safetensors file, a released .pth file, or a name on the Hugging Face hub "
    "(user/repository or user/repository/folder)"
)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)+")


def load_network(path: Path) -> SRUNet:
    """Return the network of a model, on the CPU and in evaluation mode.

    Args:
        path: A pipeline's folder, a run's output folder, an SRUNet's folder, a packed network's ``.safetensors`` file,
            a released ``.pth`` file, or, where no such file or folder exists, ``user/repository`` or
            ``user/repository/folder`` on the Hugging Face hub, which is downloaded once.

    Raises:
        BinarizeError: If there is no such thing, or what is there cannot be read or does not fit together.
    """
    from binarize.models import load_official

    path = locate(path)
    if path.suffix.lower() in CHECKPOINT_SUFFIXES and path.is_file():
        return load_official(path)
    if path.is_file():
        from binarize.serialization import load

        return cast("SRUNet", load(path))
    return _read_network(path / "unet" if (path / PIPELINE).is_file() else path)


def has_scale(path: Path) -> bool:
    """Say whether a model says itself how many times it enlarges, as pipelines do."""
    return (locate(path) / PIPELINE).is_file()


def scale_of(path: Path, scale: int | None = None) -> int:
    """Return how many times a model enlarges, without loading it.

    Args:
        path: As for `load_network`.
        scale: As for `load_pipeline`.

    Raises:
        BinarizeError: If there is no such model, or the scale is missing or contradicts the model.
    """
    path = _pipeline_around(locate(path))
    if not (path / PIPELINE).is_file():
        if scale is None:
            raise BinarizeError(f"{path}: does not say how many times it enlarges; add --scale, such as --scale 4.")
        return scale
    index = _read_json(path / PIPELINE)
    if index.get("_class_name") != "SuperResolutionPipeline":
        raise BinarizeError(f"{path}: is a {index.get('_class_name')}, not a SuperResolutionPipeline.")
    known = index.get("scale")
    if scale is not None and scale != known:
        raise BinarizeError(f"--scale {scale}: {path} enlarges {known} times; leave --scale out.")
    if not isinstance(known, int):
        raise BinarizeError(f"{path / PIPELINE}: scale is {known!r}; it must be the whole number of the training.")
    return known


def load_pipeline(path: Path, *, scale: int | None = None) -> SuperResolutionPipeline:
    """Return a model as a pipeline, on the CPU.

    Args:
        path: As for `load_network`. The network of a pipeline's folder, or its file, stands for the pipeline; a network
            alone is one of the released noise schedule.
        scale: How many times larger the result is; needed where the model does not say it, refused where it says
            something else.

    Raises:
        BinarizeError: As `load_network`, or if the scale is missing or contradicts the model, or if a network alone was
            trained for another noise schedule.
    """
    from binarize.models import SuperResolutionPipeline
    from binarize.models.checks import OtherTimestepsError

    path = _pipeline_around(locate(path))
    scale = scale_of(path, scale)
    if not (path / PIPELINE).is_file():
        try:
            return SuperResolutionPipeline(load_network(path), scale=scale)
        except OtherTimestepsError as error:
            raise BinarizeError(
                f"{path}: is a network alone, of {error.trained} timesteps, and does not say how its noise was "
                f"scheduled; only the released schedule of {error.scheduled} can be taken for granted. Give the folder "
                f"of its pipeline, which has a {PIPELINE}; from Python, SuperResolutionPipeline(network, scheduler, "
                f"scale={scale}) makes one."
            ) from error
    network = _read_network(path / "unet")
    try:
        with _quiet_diffusers():
            return SuperResolutionPipeline.from_pretrained(str(path), unet=network, local_files_only=True)
    except BinarizeError:
        raise
    except Exception as error:  # diffusers raises many kinds, and puts advice about its hub into most of them
        raise BinarizeError(f"{path}: cannot be read as a pipeline: {_one_line(error)}") from error


def prepare(
    pipeline: SuperResolutionPipeline,
    device: Device,
    precision: Precision,
    scheduler: Scheduler | None,
    packing: bool = True,
) -> SuperResolutionPipeline:
    """Move a pipeline to a device and a precision, give it the sampler that was asked for, and return it.

    A packed network is unpacked where no kernel computes with its bits.

    Args:
        pipeline: Changed in place.
        device: As given on the command line.
        precision: As given on the command line.
        scheduler: As given on the command line; None keeps the pipeline's.
        packing: Whether a binary network is packed where there are kernels.

    Raises:
        BinarizeError: If the device is not there.
    """
    import torch
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    from binarize.cli.options import torch_device
    from binarize.conversion.packing import is_packed, pack_if_possible, unpack
    from binarize.kernels.backends import kernels_for

    place, dtype = torch_device(device), getattr(torch, precision.value)
    if scheduler is not None:
        kind: Any = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler}[scheduler.value]
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    like = torch.empty(0, dtype=dtype, device=place)
    if packing and kernels_for(like) is not None:
        pack_if_possible(pipeline.unet, like)
    elif is_packed(pipeline.unet):
        unpack(pipeline.unet)
    with _quiet_diffusers():
        pipeline.to(place, dtype)
    return pipeline


def sample(
    pipeline: SuperResolutionPipeline,
    picture: Image.Image | DecodedImage,
    *,
    steps: int | None,
    seed: int,
    tile: int | None = None,
    overlap: int | None = None,
    advance: Callable[[], object] = lambda: None,
) -> Image.Image:
    """Return one picture, enlarged; its noise is drawn on the CPU, so that a seed means the same on every device.

    Args:
        pipeline: The model.
        picture: What to enlarge.
        steps: Denoising steps; None for the number that the pipeline was saved with.
        seed: Decides the noise.
        tile: As for the pipeline.
        overlap: As for the pipeline.
        advance: Called each time that the network has run: once a step and tile.

    Raises:
        BinarizeError: If an option does not fit, or the picture needs more memory than there is.
    """
    import torch

    def on_pass(*_: object) -> None:
        advance()

    # Steps would say too little: a network of one step would show nothing until the last of many tiles is done.
    watch = pipeline.unet.register_forward_hook(on_pass)
    try:
        images = pipeline(
            picture,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            tile=tile,
            overlap=overlap,
            return_dict=False,
        )[0]
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            smaller = "--tile 256" if tile is None else f"a --tile below {tile}"
            raise BinarizeError(
                f"the picture is too large for the memory of {pipeline.device.type}; try {smaller}."
            ) from error
        raise
    finally:
        watch.remove()
    enlarged: Image.Image = images[0]
    return enlarged


def locate(path: Path) -> Path:
    """Return the folder or file that holds the model which ``path`` names; from the hub, it is downloaded.

    Raises:
        BinarizeError: If there is none.
    """
    if path.is_file():
        if path.suffix.lower() not in (*CHECKPOINT_SUFFIXES, PACKED_SUFFIX):
            raise BinarizeError(f"{path}: is not a model; give {_ALLOWED}.")
        return path
    if not path.is_dir():
        if not _names_repository(path):
            raise BinarizeError(f"{path}: no such file or folder; give {_ALLOWED}.")
        path = _download(path.as_posix())
    if (path / PIPELINE).is_file() or (path / NETWORK).is_file():
        return path
    if (path / RUN / PIPELINE).is_file():
        return path / RUN
    if (path / "state.pt").is_file():
        raise BinarizeError(
            f"{path}: is a training checkpoint, from which `binarize train --resume` goes on; the model is in "
            f"{path.parent / RUN}, once the run has reached its first validation."
        )
    raise BinarizeError(f"{path}: holds no model (no {PIPELINE} or {NETWORK}); give {_ALLOWED}.")


def _pipeline_around(path: Path) -> Path:
    """Return the pipeline's folder of which a path is the network, or the network's file; else the path itself."""
    network = path.parent if path.is_file() else path
    return network.parent if network.name == "unet" and (network.parent / PIPELINE).is_file() else path


def _names_repository(path: Path) -> bool:
    """Say whether a path that does not exist may be meant as a name on the hub."""
    name = path.as_posix()
    is_a_file_name = path.suffix.lower() in (*CHECKPOINT_SUFFIXES, PACKED_SUFFIX)
    # With its first folder there, a path is a slip of the pen in the rest of it.
    return _HUB_NAME.fullmatch(name) is not None and not is_a_file_name and not Path(path.parts[0]).exists()


def _download(name: str) -> Path:
    """Return the local copy of ``user/repository`` or ``user/repository/folder``; weights in safetensors alone."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    user, repository, *inside = name.split("/")
    repo, folder = f"{user}/{repository}", "/".join(inside)
    patterns = [f"{folder}/{kind}" if folder else kind for kind in ("*.json", "*.safetensors")]
    try:
        found = Path(snapshot_download(repo, allow_patterns=patterns))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise BinarizeError(
            f"{name}: no such file or folder here, and no repository {repo} on the Hugging Face hub (or a private one: "
            f"`hf auth login`); give {_ALLOWED}."
        ) from error
    except LocalEntryNotFoundError as error:
        raise BinarizeError(
            f"{name}: no such file or folder here, and the Hugging Face hub cannot be reached, nor was {repo} "
            "downloaded before; go online, or give the path of a model."
        ) from error
    except Exception as error:  # the hub's client and the libraries below it raise many kinds
        raise BinarizeError(f"{name}: cannot be downloaded from the Hugging Face hub: {_one_line(error)}") from error
    if not (found / folder).is_dir():
        raise BinarizeError(f"{name}: the repository {repo} on the Hugging Face hub has no folder {folder} of a model.")
    return found / folder


def _read_network(folder: Path) -> SRUNet:
    """Read an SRUNet, with every way to fail as one line."""
    from binarize.models import SRUNet

    config = _read_json(folder / NETWORK)
    if config.get("_class_name") != "SRUNet":
        raise BinarizeError(
            f"{folder}: holds a {config.get('_class_name')}; the command line runs SRUNet. Use "
            "SuperResolutionPipeline from Python for other networks."
        )
    try:
        # Without accelerate's meta tensors, so that a shape that does not fit is an error with both shapes in it.
        with _quiet_diffusers():
            network: SRUNet = SRUNet.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
    except BinarizeError as error:
        raise BinarizeError(f"{error}" if str(folder) in str(error) else f"{folder}: {error}") from error
    except Exception as error:  # diffusers raises many kinds, safetensors its own
        raise BinarizeError(f"{folder}: cannot be read as an SRUNet: {_one_line(error)}") from error
    return network.eval()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BinarizeError(f"{path}: is missing; the model is not complete.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BinarizeError(f"{path}: is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise BinarizeError(f"{path}: must hold a JSON object; it holds a {type(content).__name__}.")
    return content


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Keep diffusers' bars and advice off the terminal; what matters of it is an error here."""
    from diffusers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
