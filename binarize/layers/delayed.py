"""Parts that leave a layer in full precision until a given share of the training is done."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from binarize.errors import BinarizeError
from binarize.kernels.product import BinaryWeight
from binarize.kernels.signs import SignZero
from binarize.layers import parts
from binarize.layers.parts import ActivationBinarizer, LayerSpec, Part, PartKind, Scale, WeightBinarizer, register_part
from binarize.layers.schedule import Scheduled
from binarize.layers.weights import ScaledSignWeight


class Delayed(Scheduled):
    """A part that is active once ``until``, in (0, 1], of the training is done.

    The choice is made with torch.where, so that a compiled graph stays valid; until then, the part's own parameters get
    gradients of zero.
    """

    def __init__(self, part: nn.Module, until: float) -> None:
        super().__init__()
        if not 0 < until <= 1:
            raise BinarizeError(f"{type(self).__name__}: until is a share of training, in (0, 1]; got {until}.")
        self.part = part
        self.until = until

    @property
    def active(self) -> Tensor:
        """A bool scalar: True once the part is active."""
        return self.progress >= self.until

    def extra_repr(self) -> str:
        """Return ``until`` for the module's repr."""
        return f"until={self.until}"


class DelayedActivation(Delayed, ActivationBinarizer):
    """The identity, later an activation binarizer."""

    def __init__(self, part: nn.Module, until: float) -> None:
        super().__init__(part, until)
        self.levels, self.bits = parts.levels_of(part), parts.activation_bits(part)

    def forward(self, x: Tensor) -> Tensor:
        """Map any shape to the same shape."""
        return torch.where(self.active, self.part(x), x)


class DelayedWeight(Delayed, WeightBinarizer):
    """The latent weights themselves, later a weight binarizer (ReActNet's two stages)."""

    def __init__(self, part: nn.Module, until: float) -> None:
        super().__init__(part, until)
        self.bases, self.stored_scales = parts.stored_form(part)

    def forward(self, w: Tensor) -> BinaryWeight:
        """Return the binarizer's result, or the weights with a scale of one."""
        binary: BinaryWeight = self.part(w)
        active = self.active
        codes, scales = torch.zeros_like(binary.codes), torch.zeros_like(binary.scales)
        codes[0], scales[0] = w.detach(), 1
        return BinaryWeight(
            torch.where(active, binary.surrogate, w),
            torch.where(active, binary.codes, codes),
            torch.where(active, binary.scales, scales),
        )


class DelayedScale(Delayed, Scale):
    """No scale, later a scale of the product, which replaces the magnitude that signs have lost."""

    def __init__(self, part: nn.Module, until: float) -> None:
        super().__init__(part, until)
        self.of_input = getattr(part, "of_input", False)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Scale the product ``y``."""
        return torch.where(self.active, self.part(y, x), y)


def delayed(part: Part, until: float) -> dict[str, Any]:
    """Return a part that becomes ``part`` at progress ``until``; for activations, weights and scales."""
    return {"name": "delayed", "part": part, "until": until}


class TwoStageWeight(DelayedWeight):
    """The latent weights until ``switch`` of the training is done, then scaled signs."""

    def __init__(self, sign_zero: SignZero = "plus", switch: float = 0.5) -> None:
        super().__init__(ScaledSignWeight(sign_zero), switch)


@register_part("weight", "two_stage")
def _two_stage(spec: LayerSpec, switch: float = 0.5) -> nn.Module:
    return TwoStageWeight(spec.sign_zero, switch)


def _register(kind: PartKind, delayed_class: type[Delayed], default: str) -> None:
    @register_part(kind, "delayed", timestep_aware=True)
    def build(spec: LayerSpec, part: Part = default, until: float = 0.5) -> nn.Module:
        inner = parts.build_part(kind, part, spec)
        if inner is None:
            raise BinarizeError(f"{kind} part 'delayed': there is nothing to delay; name a part, such as part: NAME.")
        return delayed_class(inner, until)


_register("activation", DelayedActivation, "ste")
_register("weight", DelayedWeight, "scaled_sign")
_register("scale", DelayedScale, "channel")


def undelayed(model: nn.Module, like: nn.Module | None = None) -> dict[str, Tensor]:
    """Return a model's state dict with the keys of the same model without delays.

    ``like`` is the model without delays, if it has delayed parts of its own that stay; None removes all delays.
    """
    kept = set() if like is None else {name for name, module in like.named_modules() if isinstance(module, Delayed)}
    state = dict(model.state_dict())
    names = [name for name, module in model.named_modules() if isinstance(module, Delayed) and name not in kept]
    for name in reversed(names):  # a part before the part that contains it
        del state[f"{name}.progress"]
        inside = f"{name}.part."
        for key in [key for key in state if key.startswith(inside)]:
            state[f"{name}.{key.removeprefix(inside)}"] = state.pop(key)
    return state
