"""Looking inside a binary network: what flips, what saturates, and how activations are distributed.

Each function returns plain data, numpy arrays in a frozen dataclass, whose ``plot`` draws the usual figure (matplotlib
is imported there and nowhere else). The model is observed in evaluation mode through hooks; the hooks are removed and
the mode of every module is restored whatever happens.
"""

from __future__ import annotations

from binarize.inspect.activations import ActivationDistribution, activation_distribution
from binarize.inspect.flips import FlipRatios, FlipTracker
from binarize.inspect.fusion import FusionDistributions, fusion_distributions
from binarize.inspect.observe import Run
from binarize.inspect.saturation import Saturation, saturation
from binarize.inspect.shifts import TarBiases, tar_biases
from binarize.inspect.values import Distribution

__all__ = [
    "ActivationDistribution",
    "Distribution",
    "FlipRatios",
    "FlipTracker",
    "FusionDistributions",
    "Run",
    "Saturation",
    "TarBiases",
    "activation_distribution",
    "fusion_distributions",
    "saturation",
    "tar_biases",
]
