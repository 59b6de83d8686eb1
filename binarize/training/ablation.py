"""The former place of `binarize.studies.ablation`."""

from binarize.deprecation import renamed

__getattr__ = renamed(__name__, {"ablate": "binarize.studies.ablation:ablate"})
