"""Full-precision branches beside the binary product: low-rank and sparse matrices (BiMaCoSR, Liu et al. 2025)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from binarize.errors import BinarizeError
from binarize.layers.parts import Branch, LayerSpec, per_channel, register_part

_CONVOLUTIONS: dict[int, Any] = {4: F.conv2d, 5: F.conv3d}


class LowRankSparse(Branch):
    """Adds (S + A B) x, with a sparse matrix S and a product of ``rank`` r, which take over a share of the weights.

    M is the layer's weight as a matrix ``(C_out, C_in)``, the mean over the taps of a convolution. S has the entries of
    M with the largest magnitudes, ``density * max(C_in, C_out)`` of them. A B = U_r S_r V_r^T are the first r singular
    components of M without S, with the square roots of the singular values in both factors. The latent weights are the
    weights minus S minus A B; a convolution takes them from the central tap, at which the branch reads its input. All
    of this is as in the authors' released code, which has r = 8, density 2 and square kernels, and leaves out or pools
    a branch whose output has another size; here it reads every ``stride``-th pixel.

    A factor is trained as a whole, and S only in the entries it has.
    """

    indices: Tensor  # row * C_in + column of the entries of S, int32

    def __init__(self, spec: LayerSpec, rank: int = 8, density: float = 2.0) -> None:
        super().__init__()
        if type(rank) is not int or rank < 0 or not density >= 0:
            raise BinarizeError(
                f"low_rank_sparse: rank must be a whole number and density a number, of at least 0; got {rank!r} and "
                f"{density!r}."
            )
        self.widths, self.shape = (spec.in_channels, spec.out_channels), spec.weight.shape
        self.channel_dim, self.conv_groups = spec.channel_dim, spec.in_channels // spec.weight.shape[1]
        self.kernel = tuple(spec.weight.shape[2:])
        # The pixel of the first output's central tap, and the step to the next, for each dimension.
        taps = zip(self.kernel, spec.padding, spec.dilation, spec.stride, strict=True) if self.kernel else ()
        self.places = [(k // 2 * dilation - pad, stride) for k, pad, dilation, stride in taps]
        with torch.no_grad():
            matrix = spec.weight.detach()
            matrix = matrix.mean(tuple(range(2, matrix.dim()))) if self.kernel else matrix
            matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
            entries = min(int(density * max(self.widths)), matrix.numel())
            chosen = matrix.flatten().abs().topk(entries).indices.sort().values
            values = matrix.flatten()[chosen]
            self.register_buffer("indices", self._in_whole_matrix(chosen).int())
            self.values = nn.Parameter(values)
            rest = matrix.flatten().index_add(0, chosen, values, alpha=-1 / max(1, self.shape[2:].numel()))
            blocks = rest.view(self.conv_groups, -1, self.shape[1])
            whole = torch.block_diag(*blocks) if len(blocks) > 1 else blocks[0]
            u, s, vh = torch.linalg.svd(whole, full_matrices=False)
            root = s[:rank].sqrt()
            up, down = u[:, :rank] * root, root.unsqueeze(1) * vh[:rank]
            # Contiguous, as they are once loaded from a file: sums then round in the same way.
            self.up, self.down = nn.Parameter(up.contiguous()), nn.Parameter(down.contiguous())

    def _in_whole_matrix(self, chosen: Tensor) -> Tensor:
        """Return indices into ``(C_out, C_in)`` of those into ``(C_out, C_in / groups)``."""
        row, column = chosen // self.shape[1], chosen % self.shape[1]
        first = row // (self.widths[1] // self.conv_groups) * self.shape[1]
        return row * self.widths[0] + first + column

    def extra_repr(self) -> str:
        """Return the rank and the number of entries for the module's repr."""
        return f"rank={len(self.down)}, entries={len(self.values)}"

    def as_weight(self) -> Tensor:
        """Return S + A B at the central tap of a weight tensor; of a grouped convolution, what lies in its groups."""
        matrix = (self.up @ self.down).flatten().index_add(0, self.indices, self.values)
        rows = matrix.view(self.conv_groups, -1, self.conv_groups, self.shape[1])
        rows = rows.diagonal(dim1=0, dim2=2).permute(2, 0, 1).reshape(self.shape[:2])
        if not self.kernel:
            return rows
        weight = rows.new_zeros(self.shape)
        centre: Any = (slice(None), slice(None), *(k // 2 for k in self.kernel))
        weight[centre] = rows
        return weight

    def macs(self, outputs: int) -> int:
        """Return the multiply-accumulates of S for this many elements of the output; those of A B are operators."""
        return len(self.values) * outputs // self.widths[1]

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y ``(B, C_out, ...)``, or ``(..., C_out)``, plus the branch of x."""
        x = self._central_taps(x, y.shape).to(y.dtype)
        up, down, values = (parameter.to(y.dtype) for parameter in (self.up, self.down, self.values))
        if len(down):
            if self.channel_dim == 1:
                convolve, ones = _CONVOLUTIONS[x.dim()], [1] * (x.dim() - 2)
                low_rank = convolve(convolve(x, down.view(*down.shape, *ones)), up.view(*up.shape, *ones))
            else:
                low_rank = F.linear(F.linear(x, down), up)
            y = y + low_rank.to(y.dtype)
        indices = self.indices.long()  # ONNX takes no other integers as indices
        rows, columns = indices // self.widths[0], indices % self.widths[0]
        taken = x.index_select(self.channel_dim, columns)
        return y.index_add(
            self.channel_dim, rows, taken * (per_channel(values, x) if self.channel_dim == 1 else values)
        )

    def _central_taps(self, x: Tensor, size: torch.Size) -> Tensor:
        """Return the pixels of ``x`` that the central taps read for an output of this size; zeros outside of it."""
        for dim, ((start, stride), length) in enumerate(zip(self.places, size[2:], strict=False), start=2):
            stop = start + stride * (length - 1) + 1
            if (start, stop, stride) == (0, x.shape[dim], 1):
                continue
            before, after = max(0, -start), max(0, stop - x.shape[dim])
            if before or after:
                x = F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (before, after))
            x = x[(slice(None),) * dim + (slice(start + before, stop + before, stride),)]
        return x


@register_part("branch", "low_rank_sparse")
def _low_rank_sparse(spec: LayerSpec, rank: int = 8, density: float = 2.0) -> nn.Module:
    return LowRankSparse(spec, rank, density)
