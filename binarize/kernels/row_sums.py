"""What a convolution can compute for the GroupNorm after it."""

from __future__ import annotations

from torch import Tensor


class RowSums:
    """Sums and sums of squares of each row of a convolution's output, by channel.

    GroupNorm's statistics follow from them. ``tensor`` is ``(B, H, 2, C)`` float32 and belongs to the output ``of``;
    both are None if no kernel computed them. `binarize.kernels.ops.norm_factors` reads any other image itself, and
    returns the same bits. If the output is changed in place, its sums must not be used.
    """

    of: Tensor | None = None
    tensor: Tensor | None = None
