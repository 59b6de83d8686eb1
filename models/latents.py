"""The autoencoder of latent diffusion (Rombach et al. 2022): between images and what the network diffuses."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from binarize.digests import file_digest
from binarize.errors import BinarizeError, one_line
from binarize.json_files import read_json
from binarize.models.checks import check_weights
from binarize.models.location import NETWORK, RUN, may_be_on_the_hub

_ALLOWED = (
    "the folder of diffusers' AutoencoderKL, or of a pipeline or a run with one, or a name on the Hugging Face hub, "
    "such as user/repository/vae"
)


class LatentGeometry(NamedTuple):
    """Channels of the latents, the factor by which images are reduced, and channels of the images."""

    channels: int
    factor: int
    image_channels: int


def autoencoder_folder(path: Path) -> Path:
    """Return the folder of an autoencoder, which is downloaded once if its name is on the hub."""
    folder = path
    if not path.is_dir():
        if not may_be_on_the_hub(path):
            raise BinarizeError(f"vae: {path}: no such folder; give {_ALLOWED}.")
        from binarize.models.hub import download

        folder = download(path.as_posix(), _ALLOWED)
    found = [each for each in (folder, folder / "vae", folder / RUN / "vae") if (each / NETWORK).is_file()]
    if not found:
        raise BinarizeError(f"vae: {path}: holds no autoencoder; give {_ALLOWED}.")
    kind = read_json(found[0] / NETWORK).get("_class_name")
    if kind != AutoencoderKL.__name__:
        raise BinarizeError(f"vae: {found[0]} holds a {kind!s:.80}; give {_ALLOWED}.")
    return found[0]


def latent_geometry(config: Any, where: str) -> LatentGeometry:
    """Return the geometry of an autoencoder with a configuration; ``where`` is its place in errors."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(AutoencoderKL).parameters.items()}
    names = ("latent_channels", "in_channels", "out_channels", "block_out_channels")
    latent, images, drawn, blocks = (config.get(name, defaults[name]) for name in names)
    whole = all(isinstance(value, int) and 0 < value < 2**16 for value in (latent, images, drawn))
    if not (whole and isinstance(blocks, list | tuple) and 0 < len(blocks) <= 16):
        given = f"latent_channels={latent!r:.40}, in_channels={images!r:.40}, block_out_channels={blocks!r:.40}"
        raise BinarizeError(f"{where}: its configuration has {given}; needed: whole numbers, and a list of them.")
    if images != drawn or images not in (1, 3):
        given = f"takes images of {images} channels and gives {drawn}"
        raise BinarizeError(f"{where}: {given}; needed: both 1 (greyscale) or both 3 (RGB).")
    return LatentGeometry(latent, 2 ** (len(blocks) - 1), images)


def read_geometry(path: Path) -> LatentGeometry:
    """Return the geometry of a saved autoencoder, without reading its weights."""
    folder = autoencoder_folder(path)
    return latent_geometry(read_json(folder / NETWORK), f"vae: {folder}")


def autoencoder_digests(path: Path) -> dict[str, str]:
    """Return the digests by which a run knows its autoencoder: name of a file -> SHA-256."""
    folder = autoencoder_folder(path)
    files = [folder / NETWORK, *sorted(folder.glob("*.safetensors"))]
    return {f"vae/{file.name}": file_digest(file) for file in files}


def load_autoencoder(path: Path) -> AutoencoderKL:
    """Load an autoencoder on the CPU, in float32 and evaluation mode, without gradients."""
    folder = autoencoder_folder(path)
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "torch_dtype": torch.float32}
    try:
        loaded: Any = AutoencoderKL.from_pretrained(str(folder), **options, output_loading_info=True)
    except Exception as error:  # diffusers and safetensors raise many kinds
        raise BinarizeError(f"vae: {folder} cannot be read: {one_line(error)}") from error
    vae, info = loaded
    if info["missing_keys"]:
        raise BinarizeError(f"vae: {folder}: its weights lack {min(info['missing_keys'])}; copy or save it again.")
    check_weights(vae, f"vae: {folder}")
    return vae.eval().requires_grad_(False)


def check_autoencoder(vae: Any, channels: Any) -> None:
    """Raise BinarizeError unless the latents of an autoencoder have the channels of a network."""
    if not isinstance(vae, AutoencoderKL):
        raise BinarizeError(f"vae: is a {type(vae).__name__}; needed: diffusers' AutoencoderKL.")
    latents = latent_geometry(vae.config, "vae").channels
    if latents != channels:
        fix = "give the autoencoder that the network was trained with, or make another network"
        raise BinarizeError(f"vae: its latents have {latents} channels, but the network has {channels}; {fix}.")


def same_autoencoder(one: AutoencoderKL | None, other: AutoencoderKL | None) -> bool:
    """Whether two autoencoders have the same latents."""
    if one is None or other is None:
        return one is other
    if any(one.config.get(key) != other.config.get(key) for key in ("scaling_factor", "shift_factor")):
        return False
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key].cpu(), theirs[key].cpu()) for key in mine)


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Return the images in [-1, 1], (B, C, H, W), of latents of about unit variance, one after the other."""
    if vae.dtype == torch.float16 and vae.config.get("force_upcast"):
        vae.to(torch.float32)  # as diffusers does: its activations overflow in float16
    scaled = latents / vae.config["scaling_factor"] + (vae.config.get("shift_factor") or 0.0)
    return torch.cat([vae.decode(each[None].to(vae.dtype)).sample.to(latents.dtype) for each in scaled])


def encode(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the latents, scaled to about unit variance, of images in [-1, 1]."""
    posterior: Any = vae.encode(images.to(vae.device, vae.dtype)).latent_dist
    scale, shift = vae.config["scaling_factor"], vae.config.get("shift_factor") or 0.0
    return ((posterior.mean - shift) * scale).float().cpu(), (posterior.std * scale).float().cpu()
