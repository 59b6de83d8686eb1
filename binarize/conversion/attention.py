"""Attention of diffusers whose projections are binary: joining them into one would multiply by latent weights."""

from typing import Any

from torch import nn

from binarize.errors import BinarizeError
from binarize.layers import BinaryConv2d, BinaryLinear

_PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


class _Refused:
    """Takes the place of ``fuse_projections`` on one module; it can be copied and pickled with it."""

    def __call__(self, *args: Any, **options: Any) -> None:
        raise BinarizeError(
            "the projections of this attention are binary and cannot be fused: each has a sign and scales of its own. "
            "Leave fuse_qkv_projections out; binarize.pack makes them fast."
        )


def refuse_fusion(model: nn.Module) -> None:
    """Make ``fuse_qkv_projections`` fail where projections are binary.

    Raises:
        BinarizeError: If they are fused already.
    """
    for name, module in model.named_modules():
        binary = any(isinstance(getattr(module, child, None), BinaryConv2d | BinaryLinear) for child in _PROJECTIONS)
        if binary and hasattr(module, "fuse_projections"):
            if getattr(module, "fused_projections", False):
                raise BinarizeError(
                    f"{name!r} has fused projections, which a saved model would lose; convert a model on which "
                    "fuse_qkv_projections was not called, or keep its attention in full precision."
                )
            module.__dict__["fuse_projections"] = _Refused()


def allow_fusion(model: nn.Module) -> None:
    """Undo `refuse_fusion`."""
    for module in model.modules():
        if isinstance(module.__dict__.get("fuse_projections"), _Refused):
            del module.__dict__["fuse_projections"]
