"""Full-precision 3x3 convolutions, which are what is left to wait for once the others are binary.

On a CPU they run by Winograd's algorithm, F(4x4, 3x3): a quarter of the multiplications, at rounding errors of a few
1e-6 of the output's scale in float32. GroupNorm's result and SiLU are applied while the input is read, the residual
is added while the output is written. In bfloat16 the arithmetic inside is float32; where the processor has AMX tiles,
torch's own bfloat16 convolution is used instead.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from binarize.kernels import backends
from binarize.kernels.bitpack import LANES
from binarize.kernels.inputs import check_devices, check_shape
from binarize.kernels.norm import norm_silu
from binarize.kernels.operator import operator


@operator()
def wide_conv(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, residual: Tensor | None) -> Tensor:
    """Return a full-precision 3x3 convolution with padding 1 of ``silu(x * norm[0] + norm[1])``, plus a residual.

    Args:
        x: ``(B, C_in, H, W)``.
        weight: ``(C_out, C_in, 3, 3)``, both widths multiples of 16, in x's dtype.
        bias: ``(C_out,)`` or None.
        norm: ``(2, B, C_in)``, or None to take x itself.
        residual: ``(B, C_out, H, W)`` or None.

    Returns:
        ``(B, C_out, H, W)`` in x's dtype, channels last.
    """
    check_devices("convolution", x, weight, bias, norm, residual)
    check_shape("convolution: the input", x, (None, weight.shape[1], None, None))
    check_shape("convolution: norm", norm, (2, x.shape[0], x.shape[1]))
    check_shape("convolution: the residual", residual, (x.shape[0], weight.shape[0], *x.shape[2:]))
    if backends.cpu_kernels(x) is not None:
        from binarize.kernels.cpu import winograd as _winograd  # which needs numba

        if _winograd.wide_pays(x):
            return _winograd.wide_conv(x, weight, bias, norm, residual)
    y = F.conv2d(x if norm is None else norm_silu(x, norm), weight, bias, padding=1)
    y = y if residual is None else y.add_(residual)
    return y.contiguous(memory_format=torch.channels_last)


@wide_conv.register_fake
def _(x, weight, bias, norm, residual):  # type: ignore[no-untyped-def]
    out = x.new_empty((x.shape[0], weight.shape[0], x.shape[2], x.shape[3]))
    return out.to(memory_format=torch.channels_last)


def is_wide(conv: nn.Module) -> bool:
    """Say whether a module is a full-precision convolution of the kind that `wide_conv` does."""
    return (
        type(conv) is nn.Conv2d
        and (conv.kernel_size, conv.stride, conv.dilation, conv.padding) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and (conv.padding_mode, conv.groups) == ("zeros", 1)
        and conv.in_channels % LANES == 0
        and conv.out_channels % LANES == 0
    )
