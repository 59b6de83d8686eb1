"""Features of images, by which sets of images are compared."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from binarize.errors import BinarizeError, one_line
from binarize.evaluation.feature_names import INCEPTION, PIXELS, feature_name, is_function
from binarize.evaluation.perceptual import read_weights
from binarize.recipes.code import import_code

_SIDE = 224
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Features:
    """A function from images, uint8 (B, C, H, W), to features, float32 (B, D), and the name that labels its values.

    Values of different features are not comparable. ``source`` is one of:

    - ``"pixels"``: the levels in [0, 1] of all pixels, for tiny images.
    - ``"inception"``: the 2048 features of torch-fidelity's Inception v3, those of published FIDs, which it downloads.
    - A ``.pth`` file of torchvision's squeezenet1_1: the mean over the positions of its last 512 feature maps, of the
      image resized to 224x224.
    - ``"module:function"`` or ``"file.py:function"``: a function without arguments that returns such a function, or an
      nn.Module, for float images (B, 3, H, W) in [0, 1].
    """

    def __init__(self, source: str, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.name, self._function = feature_name(source), _load(source, self.device)

    @torch.no_grad()
    def __call__(self, batches: Iterable[Tensor]) -> Tensor:
        """Return the features of batches of images, on the CPU."""
        found = []
        for images in batches:
            features = self._function(images.to(self.device))
            if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
                got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
                raise BinarizeError(f"features: {self.name} gives {got} for {len(images)} images; needed: (images, D).")
            found.append(features.float().cpu())
        return torch.cat(found)


def _load(source: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    if source == PIXELS:
        return lambda images: images.flatten(1) / 255
    if source == INCEPTION:
        return _inception(device)
    if not is_function(source):
        return _squeezenet(Path(source), device)
    module, _, name = source.rpartition(":")
    try:
        found = attrgetter(name)(import_code(module, "features", f"the features {source!r}"))()
    except AttributeError as error:
        raise BinarizeError(f"features: {source!r}: {error}.") from error
    function = found.to(device).eval() if isinstance(found, nn.Module) else found
    return lambda images: function(_rgb(images))


def _squeezenet(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    from torchvision.models import squeezenet1_1

    network = squeezenet1_1().features
    weights = {key.removeprefix("features."): value for key, value in read_weights(path, "file of features").items()}
    try:
        network.load_state_dict({key: weights[key] for key in network.state_dict()})
    except (KeyError, RuntimeError) as error:
        raise BinarizeError(f"{path}: is not a file of torchvision's squeezenet1_1: {one_line(error, 100)}") from error
    network = network.to(device).eval()
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (_MEAN, _STD))

    def features(images: Tensor) -> Tensor:
        large = F.interpolate(_rgb(images), (_SIDE, _SIDE), mode="bilinear", antialias=True)
        return network((large - mean) / std).mean(dim=(2, 3))

    return features


def _inception(device: torch.device) -> Callable[[Tensor], Tensor]:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise BinarizeError("features: inception needs torch-fidelity: pip install torch-fidelity.") from error
    try:
        with contextlib.redirect_stdout(sys.stderr):
            network: Any = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device).eval()
    except Exception as error:  # it downloads
        raise BinarizeError(f"features: Inception's weights cannot be loaded: {one_line(error, 200)}") from error
    return lambda images: network((_rgb(images) * 255).byte())[0]


def _rgb(images: Tensor) -> Tensor:
    """Return float images in [0, 1] with three channels."""
    return images.float().expand(-1, 3, -1, -1) / 255
