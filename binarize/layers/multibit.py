"""Activations of more than two values, for networks of which only the weights are binary."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from binarize.errors import BinarizeError
from binarize.kernels.signs import learned_step
from binarize.layers.activations import checked_bits
from binarize.layers.parts import ActivationBinarizer, LayerSpec, register_part


class FullPrecisionActivation(ActivationBinarizer):
    """The identity: only the weights have few bits (BWN of XNOR-Net's paper, BinaryDM's W1A32)."""

    bits = 32

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x


class LearnedStep(ActivationBinarizer):
    """LSQ: forward round(clip(x / s, -Q_N, Q_P)) s, with a learned step s for the layer (Esser et al. 2020).

    ``signed`` values have Q_N = 2^(bits - 1) and Q_P = 2^(bits - 1) - 1, others Q_N = 0 and Q_P = 2^bits - 1. Inside
    the range the gradient passes straight through, and that of the step is multiplied by 1 / sqrt(N Q_P), where N is
    the number of features of one sample (of one token with ``channel_dim`` -1); see
    `binarize.kernels.signs.learned_step`.

    The step starts at the paper's 2 E|x| / sqrt(Q_P) for x of the standard normal distribution. `calibrate` sets it
    from a batch, as the paper does with the first one. BinaryDM's released code (W1A8, W1A4) has the signed form,
    divides by the batch size too, and never uses the step that it learns, since it computes a new one in each forward.
    """

    def __init__(self, bits: int = 8, signed: bool = True, channel_dim: int = 1) -> None:
        super().__init__()
        self.bits = checked_bits("lsq", bits, 2)
        self.signed, self.channel_dim = signed, channel_dim
        self.low: int = -(2 ** (bits - 1)) if signed else 0
        self.high: int = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        planes = [1 << place for place in range(bits)] if bits <= 8 else []
        self.plane_weights = (*planes[:-1], *(-weight if signed else weight for weight in planes[-1:]))
        self.step = nn.Parameter(torch.tensor(self.start(math.sqrt(2 / math.pi))))

    def extra_repr(self) -> str:
        """Return the options for the module's repr."""
        return f"bits={self.bits}, signed={self.signed}"

    def start(self, mean: float) -> float:
        """Return the initial step for inputs of this mean magnitude."""
        return 2 * mean / math.sqrt(self.high)

    def forward(self, x: Tensor) -> Tensor:
        """Map any shape to multiples of the step of the same shape; in half precision, rounded afterwards."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        features = x.shape[1:].numel() if self.channel_dim == 1 else x.shape[-1]
        scale = (features * self.high) ** -0.5
        return learned_step(x.to(dtype), self._positive_step(dtype), self.low, self.high, scale).to(x.dtype)

    def integers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values over the step, int8 or uint8, and the step."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        step = self._positive_step(dtype)
        codes = (x.to(dtype) / step).clamp(self.low, self.high).round()
        return codes.to(torch.int8 if self.signed else torch.uint8), step

    def _positive_step(self, dtype: torch.dtype) -> Tensor:
        return self.step.to(dtype).abs().clamp_min(torch.finfo(torch.float32).tiny)


def calibrate(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Set the steps of all k-bit activations from a batch, as LSQ does with the first one: s = 2 mean |x| / sqrt(Q_P).

    Runs ``model(*args, **kwargs)`` once. Each activation is set when it is reached, so later ones see quantized values.
    Call it after `binarize.convert`, before training and before wrapping the model for several processes; the steps are
    parameters and saved with the model. After an error the steps are as they were. `binarize.training.train` does it.

    Returns:
        The number of activations that were set.

    Raises:
        BinarizeError: If the model has no k-bit activation ("lsq"), or reaches none or an input that is zero or not
            finite.
    """
    if not learned_steps(model):
        raise BinarizeError(
            f"calibrate: this {type(model).__name__} has no k-bit activation; convert it with "
            "activation={'name': 'lsq', 'bits': 8} or fewer bits."
        )
    return len(calibrate_by(model, lambda: model(*args, **kwargs)))


def learned_steps(model: nn.Module) -> dict[str, LearnedStep]:
    """Return the k-bit activations of a model by their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LearnedStep)}


@torch.no_grad()
def calibrate_by(model: nn.Module, forward: Callable[[], object]) -> set[str]:
    """Set steps as `calibrate` does, by a function that runs the model; return the names of those that were set."""
    activations = learned_steps(model)
    reached: set[str] = set()

    def measure(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            activation, x = activations[name], inputs[0]
            mean = float(x.detach().abs().mean(dtype=torch.promote_types(x.dtype, torch.float32)))
            if not 0 < mean < math.inf:
                raise BinarizeError(
                    f"calibrate: the mean magnitude of the input of {name!r} is {mean}; use other data."
                )
            activation.step.fill_(activation.start(mean))
            reached.add(name)

        return hook

    before = {name: module.step.clone() for name, module in activations.items()}
    hooks = [module.register_forward_pre_hook(measure(name)) for name, module in activations.items()]
    try:
        forward()
    except BaseException:
        for name, step in before.items():
            activations[name].step.copy_(step)
        raise
    finally:
        for hook in hooks:
            hook.remove()
    if not reached:
        raise BinarizeError("calibrate: the forward reached none of the model's k-bit activations.")
    return reached


register_part("activation", "none")(lambda spec: FullPrecisionActivation())


@register_part("activation", "lsq")
def _lsq(spec: LayerSpec, bits: int = 8, signed: bool = True) -> nn.Module:
    return LearnedStep(bits, signed, spec.channel_dim)
