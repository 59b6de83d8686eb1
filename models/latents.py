"""The autoencoder of latent diffusion (Rombach et al. 2022): between images and what the network diffuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from binarize.errors import BinarizeError, one_line
from binarize.json_files import read_json
from binarize.models.location import NETWORK, locate, network_folder

COMPONENT = "vae"
"""Its name in pipelines."""


def autoencoder_folder(path: Path) -> Path:
    """Return the folder of an autoencoder: the folder itself, or the part of that name of a pipeline's."""
    try:
        folder = locate(path)
        folder = folder / COMPONENT if (folder / COMPONENT / NETWORK).is_file() else network_folder(folder)
    except BinarizeError as error:
        raise BinarizeError(f"vae: {error}") from error
    found = read_json(folder / NETWORK).get("_class_name")
    if found != AutoencoderKL.__name__:
        raise BinarizeError(f"vae: {folder} holds a {found}; needed: diffusers' AutoencoderKL.")
    return folder


def load_autoencoder(path: Path) -> AutoencoderKL:
    """Load an autoencoder on the CPU, in float32 and evaluation mode, without gradients."""
    folder = autoencoder_folder(path)
    try:
        vae = AutoencoderKL.from_pretrained(str(folder), local_files_only=True, torch_dtype=torch.float32)
    except Exception as error:  # diffusers and safetensors raise many kinds
        raise BinarizeError(f"vae: {folder} cannot be read: {one_line(error)}") from error
    return vae.eval().requires_grad_(False)


def latent_geometry(config: Any) -> tuple[int, int]:
    """Return the channels of the latents, and how many pixels one of their pixels is wide, from a configuration."""
    return config["latent_channels"], 2 ** (len(config["block_out_channels"]) - 1)


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Return the images in [-1, 1], (B, C, H, W), of latents of about unit variance, one after the other."""
    scaled = latents / vae.config["scaling_factor"] + (vae.config.get("shift_factor") or 0.0)
    return torch.cat([vae.decode(each[None].to(vae.dtype)).sample.to(latents.dtype) for each in scaled])


def encode(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the latents, scaled to about unit variance, of images in [-1, 1]."""
    posterior: Any = vae.encode(images.to(vae.device, vae.dtype)).latent_dist
    scale, shift = vae.config["scaling_factor"], vae.config.get("shift_factor") or 0.0
    return ((posterior.mean - shift) * scale).float().cpu(), (posterior.std * scale).float().cpu()
