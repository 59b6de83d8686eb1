"""Whether a packed layer can run an activation, which declares its values."""

from __future__ import annotations

from torch import nn

from binarize.errors import BinarizeError
from binarize.layers.delayed import Delayed
from binarize.layers.parts import activation_bits


def check_activation(activation: nn.Module) -> None:
    """Raise BinarizeError unless an activation has few bits now and declares its values."""
    if isinstance(activation, Delayed) and not activation.progress.is_meta and not activation.active:
        raise BinarizeError(
            "pack: activations are still full precision, since training has not reached the step from which they are "
            "binary; call binarize.training_step(model, 1.0) to make them binary."
        )
    if activation_bits(activation) is None:
        raise BinarizeError(
            f"pack: {type(activation).__name__} does not declare the two values that it returns; give it an attribute "
            "levels = (-1, 1) if it is sign(x), or (0, 1) if it is 1 for x > 0.5. If it returns more values, give it "
            f"bits = k for 2^k values, or 32 for floats. Got levels {getattr(activation, 'levels', None)!r} and bits "
            f"{getattr(activation, 'bits', None)!r}."
        )
