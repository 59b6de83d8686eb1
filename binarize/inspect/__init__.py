"""Looking inside a binary network: what flips, what saturates, and how activations are distributed.

Each function returns plain data, numpy arrays in a frozen dataclass, whose ``plot`` draws the usual figure (matplotlib
is imported there and nowhere else). The model is observed in evaluation mode through hooks; the hooks are removed and
the mode of every module is restored whatever happens.
"""

from __future__ import annotations

from binarize.inspect._activations import ActivationDistribution, activation_distribution
from binarize.inspect._flips import FlipRatios, FlipTracker
from binarize.inspect._fusion import FusionDistributions, fusion_distributions
from binarize.inspect._observe import Run
from binarize.inspect._saturation import Saturation, saturation
from binarize.inspect._shifts import TarBiases, tar_biases
from binarize.inspect._values import Distribution

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
