"""The U-Net, loaders of released checkpoints, and the super-resolution pipeline."""

from binarize.models.official import load_official

from binarize.models.unet import SRUNet

__all__ = ["SRUNet", "load_official"]
