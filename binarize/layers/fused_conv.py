"""A binary convolution with its shift, activation and shortcut as one node of the autograd graph.

``y = RPReLU(scale * conv(sign(x + b), sign(w))) + x`` written as a chain of modules keeps every step's input for the
backward. As one node it keeps the input x, which belongs to the layer before anyway, and the dot products as 16-bit
integers; the rest is computed again. Gradients are those of the chain: only rounding differs.

With ``memory="compact"`` it keeps one byte for each element of x instead, and computes the dot products again from it.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from binarize.kernels import training as steps
from binarize.kernels.signs import SignZero, hard_sign
from binarize.kernels.training import Activation, Geometry, Surrogate
from binarize.layers.activations import ApproxSign, ClippedSign, IdentitySign
from binarize.layers.shortcut import PoolShortcut
from binarize.layers.timestep_aware import RPReLU, Shift
from binarize.layers.weights import FixedWeight, ScaledSignWeight, SignWeight

Memory = Literal["exact", "compact"]
MEMORY_MODES: tuple[Memory, ...] = ("exact", "compact")

SURROGATES: dict[type[nn.Module], Surrogate] = {
    ApproxSign: "approx",
    ClippedSign: "clip",
    IdentitySign: "identity",
}


class Block(NamedTuple):
    """What a binary convolution is, apart from tensors."""

    geometry: Geometry
    zero: SignZero
    surrogate: Surrogate
    clip_weight: bool
    shortcut: bool
    memory: Memory
    dtype: torch.dtype


def is_plain(module: nn.Module | None, *kinds: type[nn.Module]) -> bool:
    """Say whether a module is exactly of one of these classes and nobody listens to it, so that it can be passed by."""
    return (
        module is not None
        and type(module) in kinds
        and not (
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        )
    )


def block_fits(layer: Any, x: Tensor) -> bool:
    """Say whether a binary convolution's sign and product are those of `BinaryBlock`.

    A compiled graph keeps the modules, since its compiler fuses them and chooses itself what to keep.
    """
    return (
        is_plain(layer.activation, *SURROGATES)
        and is_plain(layer.weight_binarizer, SignWeight, ScaledSignWeight, FixedWeight)
        and layer.weight_binarizer.terms == 1
        and not getattr(layer.weight_binarizer, "learned", False)
        and layer.activation.sign_zero == layer.weight_binarizer.sign_zero
        and layer.scale is None
        and layer.pad_codes is None
        and not x.is_meta
        and not torch.compiler.is_compiling()
    )


def tail_fits(layer: Any) -> bool:
    """Say whether what follows the product is an RPReLU and an identity shortcut, or less."""
    return (
        layer.bias is None
        and layer.norm is None
        and (layer.post is None or (is_plain(layer.post, RPReLU) and not layer.post_after_shortcut))
        and (layer.shortcut is None or (is_plain(layer.shortcut, PoolShortcut) and _keeps_shape(layer)))
        and (layer.pre is None or layer.shortcut is None or is_plain(layer.pre, Shift))
    )


def _keeps_shape(layer: Any) -> bool:
    same = layer.in_channels == layer.out_channels and layer.stride == (1, 1)
    return same and all(
        2 * padding == dilation * (size - 1)
        for padding, dilation, size in zip(layer.padding, layer.dilation, layer.kernel_size, strict=True)
    )


def _kernels(x: Tensor, weight: Tensor, block: Block) -> ModuleType | None:
    """Return the compiled steps if the xnor-popcount kernel computes this block."""
    if block.zero != "plus" or weight.dtype != torch.float32:
        return None
    return steps.fast(x)


class BinaryBlock(torch.autograd.Function):
    """See the module; `apply` takes the forward's arguments after ``ctx``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        shift_in: Tensor | None,
        slope: Tensor | None,
        shift_out: Tensor | None,
        block: Block,
    ) -> Tensor:
        """Return ``(B, C_out, H', W')``.

        Args:
            ctx: Autograd's.
            x: ``(B, C_in, H, W)``.
            weight: Latent weights.
            scale: ``(C_out,)``, or None for 1.
            shift: Rows ``(R, C_in)`` before the sign, or None.
            shift_in: Rows ``(R, C_out)`` of the RPReLU, or None where there is none; so are the next two.
            slope: Rows.
            shift_out: Rows.
            block: The rest.
        """
        post = None
        if shift_in is not None and slope is not None and shift_out is not None:
            post = Activation(shift_in, slope, shift_out)
        out_dtype = torch.promote_types(block.dtype, x.dtype) if block.shortcut else block.dtype
        ctx.block, ctx.x_dtype, ctx.packed, dot = block, x.dtype, None, None
        quick = _kernels(x, weight, block)
        if quick is not None:
            ctx.packed = quick.pack(weight, block.geometry.groups)
            out = quick.packed_conv(x, ctx.packed, shift, block.geometry, scale, post, block.shortcut).to(out_dtype)
        else:
            codes = hard_sign(weight, block.zero).to(block.dtype)
            total = F.conv2d(steps.signs(x, shift, block.zero, block.dtype), codes, None, *block.geometry)
            if post is not None and any(ctx.needs_input_grad):
                short = weight[0].numel() < 2**15 and block.dtype != torch.float16  # which may overflow to infinity
                dot = total.to(torch.int16 if short else torch.int32)
            out = steps.activate(total, scale, post, x if block.shortcut else None, out_dtype)
        if block.memory == "compact" and block.zero == "plus" and any(ctx.needs_input_grad):
            x, shift = steps.encode(x, shift), None if shift is None else torch.zeros_like(shift)
        ctx.save_for_backward(x, dot, weight, scale, shift, shift_in, slope, shift_out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the forward's arguments."""
        x, dot, weight, scale, shift, shift_in, slope, shift_out = ctx.saved_tensors
        block: Block = ctx.block
        layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        grad = grad.contiguous(memory_format=layout)
        dtype = steps.gradient_dtype(block.dtype, x.device)
        quick = steps.fast(x) if ctx.packed is not None else None
        signs = steps.signs(x, shift, block.zero, dtype if quick is None else torch.float32)
        if ctx.packed is not None and shift_in is not None:
            if quick is not None:
                dot = quick.packed_conv(signs, ctx.packed, None, block.geometry)
            else:  # another backend was chosen since, or a hook gave back memory of another order
                codes = hard_sign(weight, block.zero).to(signs.dtype)
                dot = F.conv2d(signs, codes, None, *block.geometry)
        inner, of_in, of_slope, of_out = grad.to(dtype), None, None, None
        if dot is not None:
            post = Activation(shift_in, slope, shift_out)
            inner, of_in, of_slope, of_out = steps.activate_backward(grad, dot, scale, post, dtype)
            del dot
        if quick is not None:
            scaled = quick.scaled_codes(weight, scale)
        else:
            scaled = hard_sign(weight, block.zero)
            scaled = scaled if scale is None else scaled.mul_(scale.view(-1, 1, 1, 1))
        needed = ctx.needs_input_grad[0] or ctx.needs_input_grad[3], ctx.needs_input_grad[1]
        of_signs, of_weight = steps.product_backward(
            inner, signs.to(dtype), scaled.to(dtype), block.geometry, needed, coarse=block.dtype != dtype
        )
        del inner, signs, scaled
        if of_weight is not None:
            of_weight = of_weight.to(weight.dtype)
            if block.clip_weight and quick is not None:
                of_weight = quick.clip_(of_weight.contiguous(), weight)
            elif block.clip_weight:
                of_weight = of_weight.mul_(weight.abs() <= 1)
        of_x = of_shift = None
        if of_signs is not None:
            through = grad if block.shortcut else None
            of_x, of_shift = steps.sign_backward(of_signs, x, shift, through, block.surrogate, ctx.x_dtype)
        rows = (of_shift, of_in, of_slope, of_out)
        like = (shift, shift_in, slope, shift_out)
        return (
            of_x,
            of_weight,
            None,
            *(None if value is None else value.to(row.dtype) for value, row in zip(rows, like, strict=True)),
            None,
        )
