"""Parts that compute in full precision until a share of the training is done, and are then what they stand for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from binarize.errors import BinarizeError
from binarize.kernels.product import BinaryWeight
from binarize.layers.parts import LayerSpec, Part, PartKind, build_part, register_part
from binarize.layers.schedule import Scheduled


class Delayed(Scheduled):
    """A part that joins in once ``until`` of the training is done.

    The choice is made with torch.where, so that a compiled graph stays valid; the part's own parameters get gradients
    of zero before.

    Args:
        part: The part.
        until: The progress from which it counts, in (0, 1].
    """

    def __init__(self, part: nn.Module, until: float) -> None:
        super().__init__()
        if not 0 < until <= 1:
            raise BinarizeError(f"{type(self).__name__}: until is a share of training, in (0, 1]; got {until}.")
        self.part = part
        self.until = until

    @property
    def joined(self) -> Tensor:
        """Whether the part counts now, a bool scalar."""
        return self.progress >= self.until

    def extra_repr(self) -> str:
        """Say when the part joins in."""
        return f"until={self.until}"


class DelayedActivation(Delayed):
    """The identity, later an activation binarizer."""

    @property
    def levels(self) -> tuple[int, int] | None:
        """The two values that it gives once it has joined in, or None if the binarizer does not say."""
        return getattr(self.part, "levels", None)

    def forward(self, x: Tensor) -> Tensor:
        """Map any shape to the same shape."""
        return torch.where(self.joined, self.part(x), x)


class DelayedWeight(Delayed):
    """The latent weights themselves, later a weight binarizer."""

    @property
    def terms(self) -> int:
        """How many codes a weight has."""
        return int(getattr(self.part, "terms", 1))

    @property
    def stored_scales(self) -> str:
        """What scales a file needs."""
        return str(getattr(self.part, "stored_scales", "filter"))

    def forward(self, w: Tensor) -> BinaryWeight:
        """Return what the binarizer returns, or the weights with a scale of one."""
        binary: BinaryWeight = self.part(w)
        joined = self.joined
        codes, scales = torch.zeros_like(binary.codes), torch.zeros_like(binary.scales)
        codes[0], scales[0] = w.detach(), 1
        return BinaryWeight(
            torch.where(joined, binary.surrogate, w),
            torch.where(joined, binary.codes, codes),
            torch.where(joined, binary.scales, scales),
        )


class DelayedScale(Delayed):
    """No scale, later a scale of the product: what stands for the magnitude that signs have lost."""

    @property
    def of_input(self) -> bool:
        """Whether the scale is taken of the layer's own input."""
        return bool(getattr(self.part, "of_input", False))

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Scale the product ``y``."""
        return torch.where(self.joined, self.part(y, x), y)


def delayed(part: Part, until: float) -> dict[str, Any]:
    """Return the part that is ``part`` from ``until`` of the training on; for activations, weights and scales."""
    return {"name": "delayed", "part": part, "until": until}


@register_part("activation", "delayed", timestep_aware=True)
def _delayed_activation(spec: LayerSpec, part: Part = "ste", until: float = 0.5) -> nn.Module:
    return DelayedActivation(_inner("activation", part, spec), until)


@register_part("weight", "delayed", timestep_aware=True)
def _delayed_weight(spec: LayerSpec, part: Part = "scaled_sign", until: float = 0.5) -> nn.Module:
    return DelayedWeight(_inner("weight", part, spec), until)


@register_part("scale", "delayed", timestep_aware=True)
def _delayed_scale(spec: LayerSpec, part: Part = "channel", until: float = 0.5) -> nn.Module:
    return DelayedScale(_inner("scale", part, spec), until)


def _inner(kind: PartKind, part: Part, spec: LayerSpec) -> nn.Module:
    built = build_part(kind, part, spec)
    if built is None:
        raise BinarizeError(f"{kind} part 'delayed': there is nothing to delay; name a part, such as part: NAME.")
    return built


def undelayed(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's state dict as the same model without delays has it."""
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, Delayed):
            del state[f"{name}.progress"]
            inside = f"{name}.part."
            for key in [key for key in state if key.startswith(inside)]:
                state[f"{name}.{key.removeprefix(inside)}"] = state.pop(key)
    return state
