"""LPIPS (Zhang et al., 2018) from the authors' package, with the backbone from a file, a cache or a download."""

from __future__ import annotations

import contextlib
import os
import sys
import urllib.request
import warnings
from pathlib import Path
from urllib.error import URLError

import torch

from binarize.digests import load_torch_file
from binarize.errors import BinarizeError, did_you_mean

# Backbone -> torchvision's weights, and the smallest side that its pooling layers accept.
_NETS = {"alex": ("AlexNet_Weights", 31), "vgg": ("VGG16_Weights", 16), "squeeze": ("SqueezeNet1_1_Weights", 17)}
_PROBE_SECONDS = 5.0


class LpipsUnavailable(BinarizeError):
    """The LPIPS package or the backbone is missing; the message says how to get it."""


class Lpips:
    """The distance of two images in the features of a network: 0 for equal images, lower is better.

    Values of different backbones are not comparable, so :attr:`label` names the backbone; the literature reports
    ``alex``.

    Args:
        net: ``alex``, ``vgg`` or ``squeeze``.
        backbone: File with a state dict of the torchvision network or of its ``features``; by default it is read from
            torch's hub cache, or downloaded into it.
        device: Where to compute.

    Raises:
        BinarizeError: If ``net`` is unknown or ``backbone`` is not such a file.
        LpipsUnavailable: If the package is not installed, or there is neither a file nor a network connection.
    """

    def __init__(
        self, net: str = "alex", *, backbone: str | os.PathLike[str] | None = None, device: torch.device | str = "cpu"
    ) -> None:
        if net not in _NETS:
            raise BinarizeError(f"unknown LPIPS backbone {net!r}; choose {', '.join(_NETS)}.{did_you_mean(net, _NETS)}")
        self.net, self.min_side, self.device = net, _NETS[net][1], torch.device(device)
        try:
            import lpips
        except ImportError as error:
            raise LpipsUnavailable("LPIPS needs the lpips package: pip install 'binarize-diffusion[eval]'") from error
        state = _download(net) if backbone is None else read_weights(Path(backbone))
        # The random initialisation, which is replaced at once, must not change the caller's random state.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # lpips 0.1.4 passes an argument that torchvision has deprecated.
            warnings.filterwarnings("ignore", "The parameter 'pretrained' is deprecated", UserWarning)
            warnings.filterwarnings("ignore", "Arguments other than a weight enum", UserWarning)
            self._model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        _fill(self._model.net, state, f"LPIPS ({net})" if backbone is None else str(backbone))
        self._model.requires_grad_(False).eval().to(self.device)

    @property
    def label(self) -> str:
        """The name of the metric, such as ``LPIPS (alex)``."""
        return lpips_label(self.net)

    def distance(self, result: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """Return the distance of each pair, (B,), of float32 images (B, 3, H, W) in [0, 1]; it is differentiable."""
        distances: torch.Tensor = self._model(result, reference, normalize=True)
        return distances.flatten(1).mean(dim=1)

    @torch.no_grad()
    def __call__(self, result: torch.Tensor, reference: torch.Tensor) -> float:
        """Return the distance of two images, uint8 (3, H, W), with H and W at least :attr:`min_side`."""
        for pixels in (result, reference):
            if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape != result.shape:
                got = f"{tuple(result.shape)} and {tuple(reference.shape)}"
                raise BinarizeError(f"{self.label}: expected two uint8 images (3, H, W) of one size, got {got}")
        height, width = result.shape[-2:]
        if min(height, width) < self.min_side:
            raise BinarizeError(f"{self.label}: needs at least {self.min_side} pixels per side, got {width}x{height}")
        ours, theirs = (pixels[None].to(self.device, torch.float32) / 255 for pixels in (result, reference))
        return float(self.distance(ours, theirs).item())


def smallest_side(net: str) -> int:
    """Return the smallest side of an image, in pixels, that a backbone accepts."""
    return _NETS[net][1]


def lpips_label(net: str) -> str:
    """Return ``LPIPS (net)``; values of different backbones are not comparable."""
    return f"LPIPS ({net})"


def read_weights(path: Path, what: str = "LPIPS backbone file") -> dict[str, torch.Tensor]:
    """Return the state dict of a torch file; ``what`` it is says an error."""
    if not path.is_file():
        raise BinarizeError(f"{path}: no such {what}")
    try:
        state = load_torch_file(path)
    except BinarizeError:
        raise
    except Exception as error:
        raise BinarizeError(f"{path}: is not a torch file of weights") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise BinarizeError(f"{path}: holds no state dict")
    return state


def _download(net: str) -> dict[str, torch.Tensor]:
    from torchvision import models

    weights = getattr(models, _NETS[net][0]).IMAGENET1K_V1
    cached = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[1]
    try:
        if not cached.is_file():
            # The downloader has no timeout, so check first that the server answers. The address is torchvision's.
            probe = urllib.request.Request(weights.url, method="HEAD")
            with urllib.request.urlopen(probe, timeout=_PROBE_SECONDS):  # nosec B310
                pass
        with contextlib.redirect_stdout(sys.stderr):
            return dict(weights.get_state_dict(check_hash=True, map_location="cpu", weights_only=True))
    except (URLError, OSError, RuntimeError) as error:
        raise LpipsUnavailable(
            f"{lpips_label(net)}: the backbone could not be downloaded ({error}); download {weights.url} on "
            f"another machine and put it at {cached}, or pass its path as the LPIPS backbone"
        ) from error


def _fill(net: torch.nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Load torchvision's ``features`` into the slices of LPIPS, whose keys have the prefix ``sliceN.``."""
    features = {key.removeprefix("features."): value for key, value in state.items()}
    try:
        net.load_state_dict({key: features[key.split(".", 1)[1]] for key in net.state_dict()})
    except (KeyError, RuntimeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else "its weights have other shapes"
        raise BinarizeError(f"{source}: is not the backbone of this LPIPS; {reason}") from error
