"""The operators of packed networks, registered with PyTorch's dispatcher, and the choice of the code that runs them.

`torch.compile` and `torch.export` see one call per operator. Packed operators raise an error if a gradient is required.
A call with ordinary CPU tensors skips the dispatcher, which takes about as long as the kernel of a small layer, unless
the call is being compiled, traced, recorded or differentiated. Row sums are computed only by calls that skip it, so a
profiled network makes more passes over its activations.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Generic, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from binarize.errors import BinarizeError
from binarize.kernels import backends, reference
from binarize.kernels.binary_conv import BinaryConv, Shortcut
from binarize.kernels.bitpack import LANES
from binarize.kernels.capture import is_captured
from binarize.kernels.checks import check_devices, check_shape
from binarize.kernels.row_sums import RowSums

P = ParamSpec("P")
R = TypeVar("R")
_libraries: dict[str, torch.library.Library] = {}  # an operator exists as long as its library does


class Operator(Generic[P, R]):
    """A function that is also an operator of PyTorch, without a gradient.

    `torch.library.custom_op` checks gradients and aliases in Python at each call, which takes as long as the kernel of
    a small layer; this registers the same with less. ``function`` returns new tensors on any device, ``fake`` the same
    on meta tensors, and ``schema`` is inferred from the annotations if it is None.
    """

    def __init__(self, function: Callable[P, R], fake: Callable[P, Any], schema: str | None = None) -> None:
        self.__doc__, self.name = function.__doc__, f"binarize::{function.__name__}"
        if self.name in _libraries:  # the module is loaded again
            _libraries.pop(self.name)._destroy()
        self._function = function
        library = _libraries[self.name] = torch.library.Library("binarize", "FRAGMENT")
        signature = schema or torch.library.infer_schema(function, mutates_args=())
        library.define(function.__name__ + signature, tags=torch.Tag.pt2_compliant_tag)
        library.impl(function.__name__, function, "CompositeExplicitAutograd")
        torch.library.register_autograd(self.name, _refuse_gradient, lib=library)
        torch.library.register_fake(self.name, fake, lib=library)
        self.overload = getattr(torch.ops.binarize, function.__name__).default

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the operator. The dispatcher does not see ``row_sums``, and does not fill them."""
        if skips_dispatcher(*args, *kwargs.values()):
            return self._function(*args, **kwargs)
        kwargs.pop("row_sums", None)
        if forward_ad._current_level >= 0 and any(map(_has_tangent, [*args, *kwargs.values()])):
            _refuse_gradient(None)  # the dispatcher would drop the tangent
        return self.overload(*args, **kwargs)


def operator(fake: Callable[..., Any], schema: str | None = None) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Return a decorator that makes an `Operator` of a function."""
    return lambda function: Operator(function, fake, schema)


def skips_dispatcher(*values: object) -> bool:
    """Return whether a call with these arguments can run at once: plain CPU tensors that need no gradient.

    Compilers, tracers, dispatch modes and the profiler have to see the call, so it then goes through the dispatcher.
    """
    if is_captured() or torch.autograd._profiler_enabled():
        return False
    grad = torch.is_grad_enabled()
    for value in values:
        if value is None:
            continue
        if type(value) is Tensor or type(value) is Parameter:
            plain = value.is_cpu and value.layout is torch.strided and not value.is_neg()
            if not plain or (grad and value.requires_grad):
                return False
        elif hasattr(type(value), "__torch_function__"):  # a tensor of another kind, or a stand-in for one
            return False
    return True


def _has_tangent(value: object) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


TRAIN_PACKED = (
    "train the model that it was packed from, or call binarize.unpack(model, latents='random'). For methods that this "
    "rejects, such as IR-Net, call binarize.unpack(model)."
)
"""What to do instead of training a packed model."""


def _refuse_gradient(ctx: Any, *grads: Any) -> NoReturn:
    raise BinarizeError(
        f"packed layers have no gradient; {TRAIN_PACKED} A packed network that stays as it is runs under "
        "torch.no_grad()."
    )


class WithoutGradient(torch.autograd.Function):
    """The identity, whose backward raises BinarizeError."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x.view_as(x)

    backward = staticmethod(_refuse_gradient)


def binary_conv2d(
    x: Tensor, conv: BinaryConv, timestep_group: Tensor | None = None, input_norm: Tensor | None = None,
    channel_bias: Tensor | None = None, residual: Tensor | None = None, *, row_sums: RowSums | None = None,
) -> Tensor:  # fmt: skip
    """Apply a binary convolution: signs, dot products and everything that follows; see `binarize.kernels.binary_conv`.

    Args:
        x: ``(B, C_in, H, W)`` float32, bfloat16, float16 or float64.
        conv: The convolution.
        timestep_group: ``(B,)`` or ``(1,)`` int64, each sample's row of thresholds and coefficients; None for row 0.
        input_norm: ``(2, B, C_in)`` float32; the layer then reads ``silu(x * input_norm[0] + input_norm[1])``.
        channel_bias: ``(B, C_out)``, added to every pixel.
        residual: ``(B, C_out, H', W')``, added to the output, which is channels_last in x's dtype.
        row_sums: For `norm_factors` of the output; only CPU kernels fill them, and not if the dispatcher runs the call.
    """
    if skips_dispatcher(x, conv.filters, timestep_group, input_norm, channel_bias, residual):
        kernels: Any = backends.kernels_for(x) or reference
        return kernels.run(x, conv, timestep_group, input_norm, channel_bias, residual, row_sums)
    return packed_conv2d(
        x, *conv.tensors, timestep_group, conv.sizes, conv.unsigned, conv.low, conv.high, int(conv.shortcut),
        input_norm, channel_bias, residual,
    )  # fmt: skip


def _fake_conv(x, filters, correction, thresholds, coefficients, group, sizes, *rest):  # type: ignore[no-untyped-def]
    shape, geometry = BinaryConv.from_sizes(sizes)
    height, width = geometry.output(x.shape[2], x.shape[3], shape.kernel)
    out = x.new_empty((x.shape[0], shape.out_channels, height, width))
    return out.to(memory_format=torch.channels_last)


# Written out, since PyTorch 2.6 cannot infer SymInt[].
_CONV_SCHEMA = (
    "(Tensor x, Tensor filters, Tensor padding_correction, Tensor thresholds, Tensor coefficients, "
    "Tensor? timestep_group, SymInt[] sizes, bool unsigned, float low, float high, int shortcut, Tensor? input_norm, "
    "Tensor? channel_bias, Tensor? residual) -> Tensor"
)


@operator(_fake_conv, _CONV_SCHEMA)
def packed_conv2d(
    x: Tensor, filters: Tensor, padding_correction: Tensor, thresholds: Tensor, coefficients: Tensor,
    timestep_group: Tensor | None, sizes: list[int], unsigned: bool, low: float, high: float, shortcut: int,
    input_norm: Tensor | None, channel_bias: Tensor | None, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """`binary_conv2d` with the convolution as a flat list of arguments, which is what the dispatcher takes."""
    tensors = filters, padding_correction, thresholds, coefficients
    conv = BinaryConv(*_shape_and_geometry(tuple(sizes)), *tensors, unsigned, low, high, Shortcut(shortcut))
    kernels: Any = backends.kernels_for(x) or reference
    return kernels.run(x, conv, timestep_group, input_norm, channel_bias, residual)


_shape_and_geometry = lru_cache(maxsize=512)(BinaryConv.from_sizes)


def _fake_factors(x, channel_bias, groups, weight, bias, eps):  # type: ignore[no-untyped-def]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((2, x.shape[0], x.shape[1]), dtype=dtype)


_FACTORS_SCHEMA = "(Tensor x, Tensor? channel_bias, int groups, Tensor? weight, Tensor? bias, float eps) -> Tensor"


@operator(_fake_factors, _FACTORS_SCHEMA)
def norm_factors(
    x: Tensor, channel_bias: Tensor | None, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, *,
    row_sums: RowSums | None = None,
) -> Tensor:  # fmt: skip
    """Return what GroupNorm of ``x + channel_bias`` multiplies by and adds, ``(2, B, C)`` in float32 or float64.

    ``group_norm(x + channel_bias) = x * factors + offsets``, with ``channel_bias`` ``(B, C)`` added to every pixel. The
    packed convolution, or `norm_silu` in front of a full-precision one, applies them while it reads x. ``row_sums``
    save a pass over x if they are those of x.
    """
    check_devices("GroupNorm", x, channel_bias, weight, bias)
    check_shape("GroupNorm: the input", x, (None, None, None, None))
    check_shape("GroupNorm: channel_bias", channel_bias, (x.shape[0], x.shape[1]))
    for name, values in (("weight", weight), ("bias", bias)):
        check_shape(f"GroupNorm: {name}", values, (x.shape[1],))
    kernels: Any = backends.kernels_for(x) or reference
    return kernels.norm_factors(x, channel_bias, groups, weight, bias, eps, row_sums)


@operator(lambda x, input_norm: torch.empty_like(x, memory_format=torch.channels_last))
def norm_silu(x: Tensor, input_norm: Tensor) -> Tensor:
    """Return ``silu(x * input_norm[0] + input_norm[1])`` in x's dtype, channels_last; see `norm_factors`."""
    check_devices("SiLU", x, input_norm)
    check_shape("SiLU: input_norm", input_norm, (2, x.shape[0], x.shape[1]))
    kernels: Any = backends.kernels_for(x) or reference
    return kernels.norm_silu(x, input_norm)


def _fake_shuffle(hidden, skip):  # type: ignore[no-untyped-def]
    batch, channels, height, width = hidden.shape
    shape = (batch, (channels + skip.shape[1]) // 2, height, width)
    return tuple(hidden.new_empty(shape).to(memory_format=torch.channels_last) for _ in range(2))


@operator(_fake_shuffle)
def shuffle(hidden: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
    """Return CS-Fusion's two mixtures: hidden's odd channels with skip's even ones, and hidden's even with skip's odd.

    ``hidden`` is ``(B, h, H, W)`` and ``skip`` ``(B, s, H, W)``, h and s even; each mixture ``(B, (h + s) / 2, H, W)``.
    """
    check_devices("CS-Fusion", hidden, skip)
    check_shape("CS-Fusion: the skip", skip, (hidden.shape[0], None, *hidden.shape[2:]))
    kernels: Any = backends.cpu_kernels(hidden)
    if kernels is None or hidden.dtype != skip.dtype or hidden.shape[1] % 32 or skip.shape[1] % 32:
        return reference.shuffle(hidden, skip)
    return kernels.shuffle(hidden, skip)


def _fake_conv3x3(x, weight, bias, input_norm, residual):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], weight.shape[0], *x.shape[2:])).to(memory_format=torch.channels_last)


@operator(_fake_conv3x3, "(Tensor x, Tensor weight, Tensor? bias, Tensor? input_norm, Tensor? residual) -> Tensor")
def conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None, input_norm: Tensor | None, residual: Tensor | None, *,
    row_sums: RowSums | None = None,
) -> Tensor:  # fmt: skip
    """Return a full-precision 3x3 convolution with padding 1 of ``silu(x * input_norm[0] + input_norm[1])``.

    These convolutions take most of the time once the others are binary. CPUs run them with Winograd's algorithm,
    F(4x4, 3x3) (Lavin and Gray 2016): a quarter of the multiplications, at rounding errors of a few 1e-6 of the
    output's scale in float32. In bfloat16 the arithmetic inside is float32, except on two kinds of processors. With
    AVX512_BF16, the transforms are rounded to bfloat16 and multiplied; errors are about 1% of the output's scale. With
    AMX, PyTorch's own convolution runs, which is faster. ``C_in`` must be a multiple of 16.

    ``input_norm`` is ``(2, B, C_in)``, or None to convolve x itself; ``residual`` ``(B, C_out, H, W)`` is added.
    ``row_sums`` are filled as by `binary_conv2d`.
    """
    check_devices("convolution", x, weight, bias, input_norm, residual)
    if weight.shape[1] % LANES:
        raise BinarizeError(f"convolution: {weight.shape[1]} input channels; they must be a multiple of {LANES}.")
    check_shape("convolution: the input", x, (None, weight.shape[1], None, None))
    check_shape("convolution: input_norm", input_norm, (2, x.shape[0], x.shape[1]))
    check_shape("convolution: the residual", residual, (x.shape[0], weight.shape[0], *x.shape[2:]))
    kernels: Any = backends.cpu_kernels(x)
    if kernels is None or not kernels.winograd.is_faster(x):
        return reference.conv3x3(x, weight, bias, input_norm, residual)
    return kernels.winograd.conv3x3(x, weight, bias, input_norm, residual, bf16_products=True, row_sums=row_sums)
