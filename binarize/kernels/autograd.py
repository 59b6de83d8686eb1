"""Autograd nodes that keep little for the backward: a binary convolution, GroupNorm with SiLU, a 3x3 convolution.

``y = RPReLU(scale * conv(sign(x + b), sign(w))) + x`` as a chain of modules keeps the input of every step. As one node
it keeps only the input x, which belongs to the layer before anyway, and the dot products as 16-bit integers, and
computes the rest again. Its gradients are the chain's up to rounding. Where gradients are differentiated themselves
(``create_graph=True``), and where something records the backward, they are those of the chain: see `_chain_gradients`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from binarize.errors import BinarizeError
from binarize.kernels import product, signs, training
from binarize.kernels.binary_conv import SAME_3X3, Geometry, OutputTransform, Shortcut
from binarize.kernels.capture import is_captured
from binarize.kernels.signs import SignZero, hard_sign
from binarize.kernels.training import RPReLURows, Surrogate

Memory = Literal["exact", "compact"]
MEMORY_MODES: tuple[Memory, ...] = ("exact", "compact")


_SIGNS = {"approx": signs.approx_sign, "clip": signs.clipped_sign, "identity": signs.identity_sign}


def _needs_chain() -> bool:
    """Return whether a backward has to consist of operators that torch can differentiate or record."""
    return torch.is_grad_enabled() or is_captured()


def _chain_gradients(
    chain: Callable[..., Tensor], inputs: Sequence[Tensor | None], needed: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of ``chain(*inputs)``, each if it is ``needed``, which are differentiable in turn."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that an input that was computed from another one adds nothing to the other's gradient.
        views = [None if t is None else t.view_as(t) for t in inputs]
        out = chain(*views)
        wanted = [t for t, need in zip(views, needed, strict=True) if t is not None and need]
        found = iter(torch.autograd.grad(out, wanted, grad.to(out.dtype), create_graph=create_graph))
    return tuple(next(found) if t is not None and need else None for t, need in zip(views, needed, strict=True))


class BinaryConvOptions(NamedTuple):
    """What defines a binary convolution in training, apart from tensors."""

    geometry: Geometry  # its padding is the same on opposite sides
    groups: int  # of the convolution
    sign_zero: SignZero  # what sign(0) is
    surrogate: Surrogate  # gradient of the activation's sign
    clip_weight: bool  # whether the gradient of a latent weight outside [-1, 1] is 0
    shortcut: bool  # whether x is added to the output
    memory: Memory  # "exact" keeps x; "compact" keeps one byte per element and computes the dot products again
    dtype: torch.dtype  # of the product


class BinaryConvFunction(torch.autograd.Function):
    """``RPReLU(scale * conv(sign(x + shift), sign(weight))) + x`` as one node."""

    @staticmethod
    def forward(
        ctx: Any, options: BinaryConvOptions, x: Tensor, weight: Tensor, scale: Tensor | None, *rows: Tensor | None
    ) -> Tensor:
        """Return ``(B, C_out, H', W')`` of ``x``, ``(B, C_in, H, W)``.

        ``scale`` is ``(C_out,)``, or None for 1. ``rows`` are the shift before the sign, ``(R, C_in)``, and the
        RPReLU's ``shift_in``, ``slope`` and ``shift_out``, ``(R, C_out)``; None leaves a step out.
        """
        (shift, shift_in, slope, shift_out), rprelu = rows, None
        if shift_in is not None and slope is not None and shift_out is not None:
            rprelu = RPReLURows(shift_in, slope, shift_out)
        out_dtype = torch.promote_types(options.dtype, x.dtype) if options.shortcut else options.dtype
        ctx.options, ctx.x_dtype, ctx.packed, dot = options, x.dtype, None, None
        counts_bits = options.sign_zero == "plus" and weight.dtype == torch.float32
        kernels = training.compiled(x) if counts_bits else None
        if kernels is not None:
            ctx.packed = kernels.elementwise.pack(weight, options.groups)
            shortcut = Shortcut.LAST if options.shortcut else Shortcut.NONE
            transform = OutputTransform(scale, None, None, shift_in, slope, shift_out, shortcut=shortcut)
            out = kernels.elementwise.binary_conv(x, ctx.packed, shift, options.geometry, transform).to(out_dtype)
        else:
            codes = hard_sign(weight, options.sign_zero).to(options.dtype)
            total = _conv2d(training.signs(x, shift, options.sign_zero, options.dtype), codes, options)
            if rprelu is not None and any(ctx.needs_input_grad):
                # float16 may overflow to infinity, which no integer holds.
                short = weight[0].numel() < 2**15 and options.dtype != torch.float16
                dot = total.to(torch.int16 if short else torch.int32)
            out = training.activate(total, scale, rprelu, x if options.shortcut else None, out_dtype)
        if options.memory == "compact" and options.sign_zero == "plus" and any(ctx.needs_input_grad):
            x, shift = training.encode(x, shift), None if shift is None else torch.zeros_like(shift)
        ctx.save_for_backward(x, dot, weight, scale, shift, shift_in, slope, shift_out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the forward's arguments."""
        x, dot, weight, scale, shift, shift_in, slope, shift_out = ctx.saved_tensors
        options: BinaryConvOptions = ctx.options
        if _needs_chain():
            inputs = x, weight, scale, shift, shift_in, slope, shift_out
            return None, *_chain_gradients(_binary_conv_chain(options), inputs, ctx.needs_input_grad[1:], grad)
        layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        grad = grad.contiguous(memory_format=layout)
        dtype = training.gradient_dtype(options.dtype, x.device)
        kernels = training.compiled(x) if ctx.packed is not None else None
        signs = training.signs(x, shift, options.sign_zero, dtype if kernels is None else torch.float32)
        if ctx.packed is not None and shift_in is not None:
            if kernels is not None:
                dot = kernels.elementwise.binary_conv(signs, ctx.packed, None, options.geometry)
            else:  # the backend has changed since the forward, or a saved-tensor hook returned another layout
                dot = _conv2d(signs, hard_sign(weight, options.sign_zero).to(signs.dtype), options)
        inner, of_in, of_slope, of_out = grad.to(dtype), None, None, None
        if dot is not None:
            rprelu = RPReLURows(shift_in, slope, shift_out)
            inner, of_in, of_slope, of_out = training.activate_backward(grad, dot, scale, rprelu, dtype)
            del dot
        if kernels is not None:
            scaled = kernels.elementwise.scaled_codes(weight, scale)
        else:
            scaled = hard_sign(weight, options.sign_zero)
            scaled = scaled if scale is None else scaled.mul_(scale.view(-1, 1, 1, 1))
        needed = ctx.needs_input_grad[1] or ctx.needs_input_grad[4], ctx.needs_input_grad[2]
        of_signs, of_weight = training.conv_backward(
            inner, signs.to(dtype), scaled.to(dtype), options.geometry, options.groups, needed,
            low_precision=options.dtype != dtype,
        )  # fmt: skip
        del inner, signs, scaled
        if of_weight is not None:
            of_weight = of_weight.to(weight.dtype)
            if options.clip_weight and kernels is not None:
                of_weight = kernels.elementwise.clip_(of_weight.contiguous(), weight)
            elif options.clip_weight:
                of_weight = of_weight.mul_(weight.abs() <= 1)
        of_x = of_shift = None
        if of_signs is not None:
            shortcut_grad = grad if options.shortcut else None
            of_x, of_shift = training.sign_backward(of_signs, x, shift, shortcut_grad, options.surrogate, ctx.x_dtype)
        gradients = (of_shift, of_in, of_slope, of_out)
        rows = (shift, shift_in, slope, shift_out)
        of_rows = (None if g is None else g.to(row.dtype) for g, row in zip(gradients, rows, strict=True))
        return None, of_x, of_weight, None, *of_rows


def _binary_conv_chain(options: BinaryConvOptions) -> Callable[..., Tensor]:
    def chain(x: Tensor, weight: Tensor, scale: Tensor | None, *rows: Tensor | None) -> Tensor:
        if x.dtype == torch.uint8:
            raise BinarizeError(
                'memory_mode: "compact" keeps too little to differentiate a gradient (create_graph=True) or to record '
                'the backward; call binarize.memory_mode(model, "exact") first.'
            )
        shift, shift_in, slope, shift_out = (None if t is None else training.broadcast(t, dtype) for t in rows)
        v = x.to(dtype) if shift is None else x + shift
        codes = hard_sign(weight, options.sign_zero).to(dtype).unsqueeze(0)
        scales = codes.new_ones(1, len(weight)) if scale is None else scale.to(dtype).unsqueeze(0)
        surrogate = signs.clipped_identity(weight) if options.clip_weight else weight
        geometry = options.geometry.stride, options.geometry.padding, options.geometry.dilation, options.groups
        binary = product.BinaryWeight(surrogate, codes, scales)
        y = product.binary_conv2d(_SIGNS[options.surrogate](v, options.sign_zero), binary, *geometry)
        if shift_in is not None and slope is not None and shift_out is not None:
            y = y + shift_in
            y = torch.where(y > 0, y, y * slope) + shift_out
        return y + x if options.shortcut else y

    dtype = training.acc_dtype(options.dtype)
    return chain


def _conv2d(x: Tensor, weight: Tensor, options: BinaryConvOptions) -> Tensor:
    stride, dilation = options.geometry.stride, options.geometry.dilation
    return F.conv2d(x, weight, None, stride, options.geometry.padding, dilation, options.groups)


def _norm_silu_chain(groups: int, eps: float, kept: Tensor | None = None) -> Callable[..., Tensor]:
    def chain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.silu(F.group_norm(x.to(weight.dtype), groups, weight, bias, eps))
        return y if kept is None else y * kept

    return chain


class CompiledNormSiLUFunction(torch.autograd.Function):
    """Dropout, SiLU and GroupNorm of a channels_last tensor on a CPU, in two passes each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, p: float) -> Tensor:
        """Return ``dropout(silu(group_norm(x)), p)``."""
        ctx.kernels = kernels = training.compiled(x).norm_training
        ctx.groups, ctx.eps, ctx.dropout = groups, eps, kernels.draw_dropout(p)
        moments = kernels.moments(x, groups, eps)
        ctx.save_for_backward(x, weight, bias, *moments)
        return kernels.norm_silu(x, moments, weight, bias, ctx.dropout)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight and bias."""
        x, weight, bias, mean, rstd = ctx.saved_tensors
        if _needs_chain():
            inputs, kept = (x, weight, bias), ctx.kernels.kept_by_dropout(x, ctx.dropout)
            chain = _norm_silu_chain(ctx.groups, ctx.eps, kept)
            return *_chain_gradients(chain, inputs, ctx.needs_input_grad[:3], grad), None, None, None
        x = x.contiguous(memory_format=torch.channels_last)  # a saved-tensor hook may return another layout
        grad = grad.to(x.dtype).contiguous(memory_format=torch.channels_last)
        moments = ctx.kernels.Moments(mean, rstd)
        grads = ctx.kernels.norm_silu_backward(grad, x, moments, weight, bias, ctx.dropout, ctx.groups)
        return *grads, None, None, None


class NormSiLUFunction(torch.autograd.Function):
    """SiLU of GroupNorm with PyTorch's operators, keeping only x and the statistics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        """Return ``silu(group_norm(x))``."""
        sizes = x.shape[0], x.shape[1], x.shape[2] * x.shape[3], groups
        out, mean, rstd = torch.native_group_norm(x, weight, bias, *sizes, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.sizes, ctx.eps = sizes, eps
        return F.silu(out, inplace=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight and bias."""
        x, weight, bias, mean, rstd = ctx.saved_tensors
        batch, channels, pixels, groups = ctx.sizes
        if _needs_chain():
            chain = _norm_silu_chain(groups, ctx.eps)
            return *_chain_gradients(chain, (x, weight, bias), ctx.needs_input_grad[:3], grad), None, None
        out = torch.native_group_norm(x, weight, bias, batch, channels, pixels, groups, ctx.eps)[0]
        inner = torch.ops.aten.silu_backward(grad, out)
        del out
        needed = ctx.needs_input_grad[:3]
        grads = torch.ops.aten.native_group_norm_backward(inner, x, mean, rstd, weight, *ctx.sizes, needed)
        return *grads, None, None


def _conv3x3_chain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x.to(weight.dtype), weight, bias, padding=1)


class Conv3x3Function(torch.autograd.Function):
    """A full-precision 3x3 convolution with padding 1 by Winograd's algorithm on a CPU, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the convolution of ``x``, float32 or bfloat16, with a float32 weight."""
        ctx.save_for_backward(x, weight, bias)
        winograd = training.compiled(x).winograd
        tile = winograd.tile_size(x, low_precision=x.dtype == torch.bfloat16)
        return winograd.conv3x3(x, weight, bias, None, None, tile)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight and bias."""
        x, weight, bias = ctx.saved_tensors
        if _needs_chain():
            inputs = x, weight, bias
            return _chain_gradients(_conv3x3_chain, inputs, ctx.needs_input_grad, grad)
        low_precision = x.dtype == torch.bfloat16
        inner, source = (t.float().contiguous(memory_format=torch.channels_last) for t in (grad, x))
        of_x, of_weight = training.conv_backward(
            inner, source, weight, SAME_3X3, 1, ctx.needs_input_grad[:2], low_precision
        )
        of_bias = inner.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        return None if of_x is None else of_x.to(x.dtype), of_weight, of_bias
