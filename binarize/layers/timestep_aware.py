"""Shifts and RPReLUs around the binary product, with one row of parameters per timestep group.

A timestep-aware part has (K, C) parameters, one row per timestep group, and gathers the row of each sample. A batch may
mix timesteps, no value is read back to the host, and torch.compile captures one graph. Rows that no sample of a batch
selects get a zero gradient (not None), so an optimizer's momentum still moves them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from binarize.errors import BinarizeError
from binarize.kernels.binary_conv import OutputTransform
from binarize.layers.parts import LayerPart, LayerSpec, Site, register_part
from binarize.timestep import TimestepContext, repeat_for


class _TimestepAware(LayerPart):
    """Base class of parts with parameters of shape (K, C), for K timestep ``groups`` that ``context`` tells apart.

    ``channel_dim`` is the dimension of the channels.
    """

    defaults: dict[str, float]  # the parameters, by name, and what they start at

    def __init__(
        self, channels: int, groups: int = 1, context: TimestepContext | None = None, channel_dim: int = 1
    ) -> None:
        super().__init__()
        if groups > 1 and context is None:
            raise BinarizeError(
                f"{type(self).__name__} with {groups} timestep groups needs a TimestepContext; got None. Use groups=1."
            )
        self.channels, self.groups, self.context, self.channel_dim = channels, groups, context, channel_dim
        for name, start in self.defaults.items():
            self.register_parameter(name, nn.Parameter(torch.full((groups, channels), start)))

    def gather(self, parameter: Tensor) -> Tensor:
        """Return the parameter's rows for the running timesteps, ``(B, C)`` or ``(1, C)``."""
        if self.groups == 1 or self.context is None:
            return parameter
        return F.embedding(self.context.group(self.groups).to(parameter.device), parameter)

    def rows(self, parameter: Tensor, x: Tensor) -> Tensor:
        """Return the parameter's rows for the batch of ``x``, broadcastable against it, in its dtype."""
        rows = repeat_for(x.shape[0], self.gather(parameter))
        shape = [1] * x.dim()
        shape[0], shape[self.channel_dim] = rows.shape[0], self.channels
        return rows.reshape(shape).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.channels}, groups={self.groups}"


class Shift(_TimestepAware):
    """x + b_g: ReActNet's RSign shift with one group, BI-DiffSR's TaR with K groups. Zero at the start."""

    bias: nn.Parameter
    defaults = {"bias": 0.0}

    def forward(self, x: Tensor) -> Tensor:
        """Shift ``(B, C, ...)`` (or ``(..., C)``) channel by channel; the shape stays."""
        return x + self.rows(self.bias, x)

    def input_shift(self) -> Tensor:
        """Return the shifts, ``(K, C)``."""
        return self.bias


class RPReLU(_TimestepAware):
    """PReLU(x + b0) + b1 with a slope per channel: ReActNet's RPReLU, and BI-DiffSR's TaA with K groups.

    Shifts start at 0 and slopes at 0.25.
    """

    shift_in: nn.Parameter
    slope: nn.Parameter
    shift_out: nn.Parameter
    defaults = {"shift_in": 0.0, "slope": 0.25, "shift_out": 0.0}

    def forward(self, x: Tensor) -> Tensor:
        """Activate ``(B, C, ...)`` (or ``(..., C)``); the shape stays."""
        x = x + self.rows(self.shift_in, x)
        # Strictly positive, as in nn.PReLU: dot products of signs are often exactly 0, and there the slope counts.
        return torch.where(x > 0, x, x * self.rows(self.slope, x)) + self.rows(self.shift_out, x)

    def lower(self, transform: OutputTransform, site: Site) -> OutputTransform | None:
        """Append the RPReLU."""
        return transform.then_rprelu(self.shift_in, self.slope, self.shift_out)

    def fold_bias_(self, bias: Tensor) -> None:
        """Add a convolution's bias to the first shift of every timestep group, which is exact."""
        with torch.no_grad():
            self.shift_in.add_(bias)


@register_part("pre", "tar", timestep_aware=True)
def _tar(spec: LayerSpec) -> nn.Module:
    return Shift(spec.in_channels, spec.groups, spec.context, spec.channel_dim)


@register_part("post", "taa", timestep_aware=True)
def _taa(spec: LayerSpec) -> nn.Module:
    return RPReLU(spec.out_channels, spec.groups, spec.context, spec.channel_dim)


register_part("pre", "shift")(lambda spec: _tar(replace(spec, groups=1, context=None)))
register_part("post", "rprelu")(lambda spec: _taa(replace(spec, groups=1, context=None)))
