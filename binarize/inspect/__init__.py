"""Inside a binary network: sign flips, saturation, and the distributions of activations.

Each function returns numpy arrays in a frozen dataclass, whose ``plot(ax)`` draws them on the given axes or on a new
figure and raises a BinarizeError if matplotlib is missing. The model runs in evaluation mode under hooks; afterwards
the hooks are removed and the mode of every module is restored, even after an error.
"""

from __future__ import annotations

from binarize.inspect.activations import ActivationDistribution, activation_distribution
from binarize.inspect.distribution import Distribution
from binarize.inspect.flips import FlipRatios, FlipTracker
from binarize.inspect.fusion import FusionDistributions, fusion_distributions
from binarize.inspect.observe import Run
from binarize.inspect.saturation import Saturation, saturation
from binarize.inspect.shifts import TarBiases, tar_biases

__all__ = [
    "ActivationDistribution", "Distribution", "FlipRatios", "FlipTracker", "FusionDistributions", "Run", "Saturation",
    "TarBiases", "activation_distribution", "fusion_distributions", "saturation", "tar_biases",
]  # fmt: skip
