"""A generator that the page of `binarize web` runs in an instant."""

import torch
from diffusers import DDIMScheduler, UNet2DModel
from packed_case import scatter

import binarize
from binarize.models import GenerationPipeline


def tiny_generator() -> GenerationPipeline:
    """Return an unconditional generator of grey images of 8x10 pixels, not trained."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=(8, 10), in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        add_attention=False,
    )  # fmt: skip
    scheduler = DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing")
    return GenerationPipeline(scatter(binarize.convert(unet, "reactnet")), scheduler, num_inference_steps=3)
