"""The U-Net, the loader of released checkpoints, and the super-resolution pipeline."""

from binarize.models.official import OFFICIAL_CONFIG, load_official
from binarize.models.pipeline import SuperResolutionPipeline, default_scheduler
from binarize.models.unet import SRUNet

__all__ = ["OFFICIAL_CONFIG", "SRUNet", "SuperResolutionPipeline", "default_scheduler", "load_official"]
