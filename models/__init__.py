"""The U-Net, the loader of released checkpoints, the pipelines, and the models that are shipped."""

from typing import TYPE_CHECKING

from binarize.importing import exports

if TYPE_CHECKING:
    from binarize.models.default import default_model
    from binarize.models.generation import GenerationPipeline
    from binarize.models.official import OFFICIAL_CONFIG, load_official
    from binarize.models.pipeline import SuperResolutionPipeline
    from binarize.models.unet import SRUNet
    from binarize.models.upscaler import default_scheduler

__all__ = ["OFFICIAL_CONFIG", "GenerationPipeline", "SRUNet", "SuperResolutionPipeline"]
__all__ += ["default_model", "default_scheduler", "load_official"]

# Networks and pipelines import PyTorch and diffusers, and finding a model's files needs neither.
_NAMES = {
    "default": ("default_model",),
    "generation": ("GenerationPipeline",),
    "official": ("OFFICIAL_CONFIG", "load_official"),
    "pipeline": ("SuperResolutionPipeline",),
    "unet": ("SRUNet",),
    "upscaler": ("default_scheduler",),
}
__getattr__ = exports(__name__, _NAMES)
