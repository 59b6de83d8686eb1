"""PackedConv1d and PackedConv3d: packed convolutions of one and three dimensions, by the kernels of 2-D ones."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from binarize.kernels.ops import binary_conv2d
from binarize.kernels.row_sums import RowSums
from binarize.layers.parts import LayerKind, per_channel
from binarize.packed.compiled import as_under_autocast
from binarize.packed.layers import PackedConv, PackedConv2d, row_width


class PackedConv1d(PackedConv2d):
    """A binary 1-D convolution for inference, ``(B, C_in, L)`` to ``(B, C_out, L')``; see `PackedConv2d`."""

    def forward(
        self, input: Tensor, input_norm: Tensor | None = None, residual: Tensor | None = None,
        row_sums: RowSums | None = None,
    ) -> Tensor:  # fmt: skip
        """Apply the layer to an image of height 1, or of more rows if the positions are independent.

        ``row_sums`` stay empty.
        """
        x = input
        compiled = self.compiled()
        pointwise = self.kernel_size == self.stride == (1,) and self.padding == (0,)
        pointwise = pointwise and compiled is not None and compiled.lowered.is_one_kernel
        rows = x.shape[2] // row_width(x.shape[2]) if pointwise else 1

        def image(line: Tensor) -> Tensor:
            return line.unflatten(2, (rows, -1))

        y = super().forward(image(x), input_norm, None if residual is None else image(residual))
        return y.flatten(2)


class PackedConv3d(PackedConv):
    """A binary 3-D convolution for inference, ``(B, C_in, D, H, W)`` to ``(B, C_out, D', H', W')``.

    It adds up, over the depth of the filters, 2-D convolutions of the images at each depth. Their dot products are
    whole numbers, so the sum is exact. Scales and all parts after the product run as modules.
    """

    kind: LayerKind = "conv3d"

    def _products(self, dtype: torch.dtype) -> Iterable[tuple[Tensor, Tensor | None]]:
        depth = 1 if self.depth is None else self.depth.kernel
        return ((words, None) for basis in self.words for words in basis.chunk(depth, dim=1))

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        compiled, depth = self.kernel_for(input), self.depth
        if compiled is None:
            return self.run_without_kernel(input)
        x = self._input(input, compiled)
        assert depth is not None
        source = self._pad(x if compiled.lowered.fuses_pre else self.shifted(x))
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        batch, _, frames, height, width = source.shape
        images, group = source.to(exact).transpose(1, 2), compiled.timestep_group(x)
        front = depth.pad[0] if self.padding_mode == "zeros" else 0
        out_frames = (depth if self.padding_mode == "zeros" else depth._replace(pad=(0, 0))).output(frames)
        plane = self.geometry if self.padding_mode == "zeros" else self.geometry._replace(pad=(0, 0, 0, 0))
        out_size = plane.output(height, width, self.kernel)
        total: Tensor | None = None
        for basis, scale in enumerate(self.weight_scales().to(x.dtype)):
            dot = source.new_zeros((batch, out_frames, self.out_channels, *out_size), dtype=exact)
            for tap in range(depth.kernel):
                # Output i reads frame i * stride + offset; frames outside the video contribute 0.
                offset = tap * depth.dilation - front
                first = max(0, -(offset // depth.stride))
                last = min(out_frames - 1, (frames - 1 - offset) // depth.stride)
                if last < first:
                    continue
                start, count = first * depth.stride + offset, last - first + 1
                taken = images[:, start : start + (count - 1) * depth.stride + 1 : depth.stride]
                rows = group if group is None or len(group) == 1 else group.repeat_interleave(count)
                conv = compiled.convs[basis * depth.kernel + tap]
                dot[:, first : last + 1] += binary_conv2d(taken.flatten(0, 1), conv, rows).unflatten(0, (batch, count))
            y = dot.transpose(1, 2).to(x.dtype)
            y = y * per_channel(scale, y)
            total = y if total is None else total + y
        assert total is not None
        return self.run_stages(compiled.lowered.rest, as_under_autocast(total, x, compiled), x)
