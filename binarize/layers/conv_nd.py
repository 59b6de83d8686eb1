"""BinaryConv1d and BinaryConv3d: binary convolutions of one and three dimensions."""

from __future__ import annotations

from torch import Tensor, nn

from binarize.layers.binary import BinaryConv2d, BinaryConvNd
from binarize.layers.parts import LayerKind


class BinaryConv1d(BinaryConv2d):
    """A 1-D convolution with 1-bit weights and activations: ``(B, C_in, L)`` to ``(B, C_out, L')``.

    Arguments are those of nn.Conv1d and of `BinaryConv2d`. It is a 2-D convolution of height 1: its parts see
    ``(B, C, 1, L)``, and its weight binarizer sees ``(C_out, C_in / groups, 1, k)``.
    """

    plain_class: type[nn.Conv1d | nn.Conv2d | nn.Conv3d] = nn.Conv1d

    def latent(self) -> Tensor:
        """Return the latent weights, ``(C_out, C_in / groups, 1, k)``."""
        return self.weight.unsqueeze(2)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to ``(B, C_in, L)``."""
        return super().forward(input.unsqueeze(2)).squeeze(2)


class BinaryConv3d(BinaryConvNd):
    """A 3-D convolution with 1-bit weights and activations: ``(B, C_in, D, H, W)`` to ``(B, C_out, D', H', W')``.

    Arguments are those of nn.Conv3d and of `BinaryConv2d`. PyTorch's operators train it; no kernel is fused.
    """

    kind: LayerKind = "conv3d"
    plain_class = nn.Conv3d
