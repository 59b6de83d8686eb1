"""Lowering: from a layer's parts to the formula that a kernel computes.

`lower` is the one place that decides which parts run inside a kernel. A part says so itself, by the methods of
`binarize.layers.parts.LayerPart`; any other module runs as it is, before or after the kernel. Training
(`BinaryConv2d.forward`) and packing (`binarize.packed.layers`) both use it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from binarize.kernels.binary_conv import OutputTransform, Shortcut
from binarize.layers.declared import runs_as_declared
from binarize.layers.parts import ActivationBinarizer, LayerPart, Site, levels_of
from binarize.layers.pipeline import PartPipeline, Stage
from binarize.timestep import TimestepContext


class LoweredLayer(NamedTuple):
    """A layer's formula: what a kernel computes, and what is left to modules."""

    levels: tuple[int, int]  # the two values of the activation, (-1, 1) or (0, 1)
    shift: Tensor | None  # ``(1 or K, C_in)``, added before the sign, or None
    fuses_pre: bool  # whether the kernel reads the layer's own input, ``pre`` being absent or such a shift
    transform: OutputTransform  # what the kernel does after the product, but for the scale of the weights
    stages: tuple[Stage, ...]  # the stages that the transform computes
    rest: tuple[Stage, ...]  # the stages that run as modules afterwards
    context: TimestepContext | None  # where the timestep group comes from, or None if nothing depends on it
    groups: int  # K, the rows of timestep-aware parameters
    planes: tuple[int, ...] = ()  # what each bit of a k-bit activation counts; each bit is an activation of its own

    @property
    def is_one_kernel(self) -> bool:
        """Whether a kernel computes the whole layer."""
        return self.fuses_pre and not self.rest

    def timestep_group(self, batch: int) -> Tensor | None:
        """Return each sample's timestep group, ``(B,)`` or ``(1,)`` int64, or None if nothing depends on it."""
        return None if self.context is None else self.context.group(self.groups, batch)

    def gather(self, rows: Tensor | None, batch: int) -> Tensor | None:
        """Return the rows ``(1 or B, C)`` of a batch of B from ``(1 or K, C)``."""
        group = None if rows is None or len(rows) == 1 else self.timestep_group(batch)
        if rows is None or group is None:
            return rows
        return F.embedding(group.to(rows.device), rows)


def lower(layer: PartPipeline) -> LoweredLayer | None:
    """Return the formula of a binary or packed layer, or None if no kernel knows its activation.

    Kernels know two declared values. The bits of whole numbers of up to 8 bits are such activations in {0, 1}.
    """
    levels = levels_of(layer.activation)
    if levels is None:
        return _lower_planes(layer)
    lowered: list[LayerPart] = []
    shift = None
    if isinstance(layer.pre, LayerPart) and levels == (-1, 1) and runs_as_declared(layer.pre, "input_shift"):
        shift = layer.pre.input_shift()
        if shift is not None:
            lowered.append(layer.pre)
    fuses_pre = layer.pre is None or shift is not None
    transform, present, done = OutputTransform(), layer.stages(), 0
    summed = layer.bases > 1 or layer.depth is not None  # several products are added up before the first stage
    for stage in () if summed else present:
        site = Site(layer.keeps_shape() and fuses_pre, post_follows="post" in present[done + 1 :])
        part = getattr(layer, stage)
        after: OutputTransform | None = None
        if stage == "bias":
            after = transform.then_affine(offset=part)
        elif isinstance(part, LayerPart) and runs_as_declared(part, "lower") and _same_groups([*lowered, part]):
            after = part.lower(transform, site)
        if after is None:
            break
        if stage != "bias":
            lowered.append(part)
        transform, done = after, done + 1
    timed = _timestep_aware(lowered)
    return LoweredLayer(
        levels, shift, fuses_pre, transform, present[:done], present[done:],
        timed[0].context if timed else None, timed[0].groups if timed else 1,
    )  # fmt: skip


def _lower_planes(layer: PartPipeline) -> LoweredLayer | None:
    activation = layer.activation
    if not isinstance(activation, ActivationBinarizer) or not runs_as_declared(activation, "plane_weights"):
        return None
    if not activation.plane_weights or layer.depth is not None:  # 3-D convolutions add up products over the depth
        return None
    rest, planes = layer.stages(), activation.plane_weights
    return LoweredLayer((0, 1), None, False, OutputTransform(), (), rest, None, 1, planes)


def _timestep_aware(parts: list[LayerPart]) -> list[LayerPart]:
    return [part for part in parts if part.groups > 1 and part.context is not None]


def _same_groups(parts: list[LayerPart]) -> bool:
    """Return whether one timestep group per sample selects the rows of all parts."""
    return len({(part.groups, id(part.context)) for part in _timestep_aware(parts)}) <= 1


def trains_as_one_node(transform: OutputTransform) -> bool:
    """Return whether the autograd node of a binary convolution computes this transform: RPReLU and a last shortcut."""
    affine = transform.factor is not None or transform.offset is not None
    return not affine and transform.low == -transform.high == -float("inf") and transform.shortcut != Shortcut.FIRST
