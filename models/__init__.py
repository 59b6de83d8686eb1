"""The U-Net, the loader of released checkpoints, the pipelines, and the models that are shipped."""

from binarize.models.default import default_model
from binarize.models.generation import GenerationPipeline
from binarize.models.official import OFFICIAL_CONFIG, load_official
from binarize.models.pipeline import SuperResolutionPipeline, default_scheduler
from binarize.models.unet import SRUNet

__all__ = ["OFFICIAL_CONFIG", "GenerationPipeline", "SRUNet", "SuperResolutionPipeline"]
__all__ += ["default_model", "default_scheduler", "load_official"]
