"""SRUNet: one U-Net for diffusion super-resolution whose structure is two options.

`resampling` and `fusion` make SR3's U-Net, BI-DiffSR's full-precision twin and every structural ablation of it
configurations of one class. It is built of plain nn.Conv2d; `binarize.convert` makes it binary.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from binarize.conversion.apply import apply_conversion, check_saveable, write_packed_folder
from binarize.conversion.packing import is_packed
from binarize.errors import BinarizeError, did_you_mean
from binarize.layers import (
    AddFusion,
    ConcatFusion,
    ConvDown,
    ConvUp,
    CPDown,
    CPUp,
    CSFusion,
    PixelDown,
    PixelUp,
    SplitFusion,
    norm_silu,
)
from binarize.layers.winograd import conv3x3
from binarize.modules import align_tensors
from binarize.packed.blocks import fuse, norm_silu_conv
from binarize.packed.files import WEIGHTS, find_packed, read_config, read_packed

DOWN: dict[str, Callable[[int], nn.Module]] = {"conv": ConvDown, "pixel": PixelDown, "cp": CPDown}
UP: dict[str, Callable[[int], nn.Module]] = {"conv": ConvUp, "pixel": PixelUp, "cp": CPUp}
FUSIONS: dict[str, Callable[[int, int, int], nn.Module] | None] = {
    "wide": None,
    "concat": ConcatFusion,
    "add": AddFusion,
    "split": SplitFusion,
    "cs": CSFusion,
}


# No network has more; a configuration that says so would keep the constructor busy for hours.
_MOST_LEVELS, _MOST_BLOCKS = 12, 64

_MISFITS = ("missing_keys", "unexpected_keys", "mismatched_keys")


class SinusoidalTime(nn.Module):
    """sin and cos of t exp(-ln(1e4) k / (C / 2)), sines first (the released networks' encoding of raw integer steps).

    Args:
        channels: C, even.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, timesteps: Tensor) -> Tensor:
        """Encode ``(B,)`` floating-point timesteps as ``(B, C)``."""
        half = self.channels // 2
        k = torch.arange(half, dtype=timesteps.dtype, device=timesteps.device) / half
        angles = timesteps.unsqueeze(1) * torch.exp(-math.log(1e4) * k)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class SelfAttention(nn.Module):
    """Single-head self-attention over all pixels, scores / sqrt(C), added to its input (SR3).

    Args:
        channels: C.
        norm_groups: Of the GroupNorm before it.
    """

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over ``(B, C, H, W)``; the shape stays."""
        q, k, v = (part.flatten(2).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, dim=1))
        y = F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)
        out: Tensor = self.out(y.transpose(1, 2).reshape(x.shape))
        return x + out


class ResBlock(nn.Module):
    """GroupNorm -> Swish -> conv, + time, GroupNorm -> Swish -> dropout -> conv, + residual.

    Args:
        in_channels: Width of the input, that of the concatenation where there is a skip.
        out_channels: C.
        time_channels: Width of the time embedding.
        norm_groups: Of both GroupNorms.
        dropout: Probability before the second convolution.
        fusion: What fuses the concatenation of hidden and skip to C channels, or None.
        attention: Whether self-attention follows.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_channels: int,
        norm_groups: int,
        dropout: float,
        fusion: nn.Module | None = None,
        attention: bool = False,
    ) -> None:
        super().__init__()
        width = in_channels if fusion is None else out_channels
        self.fusion = fusion
        self.norm1 = nn.GroupNorm(norm_groups, width)
        self.conv1 = nn.Conv2d(width, out_channels, 3, padding=1)
        self.time = nn.Linear(time_channels, out_channels)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.residual = nn.Conv2d(width, out_channels, 1) if width != out_channels else nn.Identity()
        self.attention = SelfAttention(out_channels, norm_groups) if attention else None
        self.packed = False

    def pack_(self) -> None:
        """Fold what stands around the convolutions into them; `binarize.pack` calls this."""
        self.packed = True

    def unpack_(self) -> None:
        """Call the convolutions and what stands around them one by one; `binarize.unpack` calls this."""
        self.packed = False

    def _packed_forward(self, x: Tensor, time: Tensor, skip: Tensor | None) -> Tensor:
        if skip is not None:
            x = fuse(self.fusion, x, skip)
        h = norm_silu_conv(self.norm1, self.conv1, x)
        h = norm_silu_conv(self.norm2, self.conv2, h, shift=self.time(F.silu(time)), residual=self.residual(x))
        return h if self.attention is None else self.attention(h)

    def forward(self, x: Tensor, time: Tensor, skip: Tensor | None = None) -> Tensor:
        """Map ``(B, C_in, H, W)``, the embedding ``(B, C_time)`` and maybe a skip to ``(B, C, H, W)``."""
        if self.packed:
            return self._packed_forward(x, time, skip)
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        if self.fusion is not None:
            x = self.fusion(x)
        h = conv3x3(self.conv1, norm_silu(x, self.norm1))
        h = conv3x3(self.conv2, norm_silu(h, self.norm2, self.dropout, shift=self.time(F.silu(time))))
        h = h + self.residual(x)
        return h if self.attention is None else self.attention(h)


class EncoderLevel(nn.Module):
    """The ResBlocks of one resolution and what follows them down."""

    blocks: nn.ModuleList
    down: nn.Module | None

    def __init__(self, blocks: Sequence[ResBlock], down: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.down = down


class DecoderLevel(nn.Module):
    """The fusing ResBlocks of one resolution and what follows them up."""

    blocks: nn.ModuleList
    up: nn.Module | None

    def __init__(self, blocks: Sequence[ResBlock], up: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.up = up


class SRUNet(ModelMixin, ConfigMixin):
    """The noise predictor of SR3 and BI-DiffSR. Without arguments: the released structure in full precision.

    Modules are named ``encoder.LEVEL.blocks.N``, ``encoder.LEVEL.down``, ``middle.N``, ``decoder.LEVEL.blocks.N`` and
    ``decoder.LEVEL.up``; level 0 is the finest resolution in both.

    Args:
        in_channels: Channels of condition and sample together, as they are given.
        out_channels: Channels of the prediction.
        base_channels: Width at the finest level.
        channel_mults: Width of each level over ``base_channels``.
        res_blocks: ResBlocks of an encoder level; a decoder level has one more.
        norm_groups: Groups of every GroupNorm.
        dropout: Probability inside ResBlocks.
        attention_levels: Levels whose ResBlocks are followed by self-attention; the middle always has one.
        resampling: "conv" (SR3: stride-2 convolution; nearest + convolution), "pixel" (one convolution and
            PixelUnshuffle or PixelShuffle) or "cp" (CP-Down and CP-Up).
        fusion: "wide" (SR3: the ResBlock takes the concatenation and has a 1x1 residual), "concat", "add", "split" or
            "cs" (CS-Fusion); see `binarize.layers`.
        num_train_timesteps: T of the noise schedule the network is trained for.
        detail_factor: With a positive number, the first convolution also sees the condition's fine detail, its
            difference from its mean over 3x3 pixels times this number; the network computes it itself. It adds as many
            channels as the condition has, between condition and sample. None, as released, leaves it out.
        conversion: How the network is binarized, as `binarize.convert` recorded it; set by loading, not by hand.

    Raises:
        BinarizeError: If the options cannot be built together.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResBlock"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 6,
        out_channels: int = 3,
        base_channels: int = 64,
        channel_mults: tuple[int, ...] = (1, 2, 4, 8),
        res_blocks: int = 2,
        norm_groups: int = 16,
        dropout: float = 0.2,
        attention_levels: tuple[int, ...] = (),
        resampling: str = "cp",
        fusion: str = "cs",
        num_train_timesteps: int = 2000,
        detail_factor: float | None = None,
        conversion: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        _check_config(base_channels, channel_mults, res_blocks, norm_groups, attention_levels, resampling, fusion)
        _check_detail(detail_factor, in_channels - out_channels)
        self.gradient_checkpointing = False
        base, levels = base_channels, len(channel_mults)
        self.time_proj = SinusoidalTime(base)
        self.time_mlp = nn.Sequential(nn.Linear(base, 4 * base), nn.SiLU(), nn.Linear(4 * base, base))
        self._given_channels, self._detail_factor = in_channels, detail_factor
        extra = 0 if detail_factor is None else in_channels - out_channels
        self.conv_in = nn.Conv2d(in_channels + extra, base, 3, padding=1)

        def block(width: int, out: int, level: int, fuse: nn.Module | None = None) -> ResBlock:
            return ResBlock(width, out, base, norm_groups, dropout, fuse, level in attention_levels)

        width, skips = base, [base]
        self.encoder = nn.ModuleList()
        for level, mult in enumerate(channel_mults):
            blocks = []
            for _ in range(res_blocks):
                blocks.append(block(width, base * mult, level))
                width = base * mult
                skips.append(width)
            down = None
            if level < levels - 1:
                down = DOWN[resampling](width)
                width = down.out_channels  # type: ignore[assignment]
                skips.append(width)
            self.encoder.append(EncoderLevel(blocks, down))

        self.middle = nn.ModuleList(
            ResBlock(width, width, base, norm_groups, dropout, None, attention) for attention in (True, False)
        )

        decoder: list[DecoderLevel] = []
        for level in reversed(range(levels)):
            blocks, out = [], base * channel_mults[level]
            for _ in range(res_blocks + 1):
                skip = skips.pop()
                make = FUSIONS[fusion]
                fuse = None if make is None else make(width, skip, out)
                blocks.append(block(width + skip, out, level, fuse))
                width = out
            up = None
            if level > 0:
                up = UP[resampling](width)
                width = up.out_channels  # type: ignore[assignment]
            decoder.append(DecoderLevel(blocks, up))
        self.decoder = nn.ModuleList(reversed(decoder))

        self.norm_out = nn.GroupNorm(norm_groups, width)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

        if conversion is not None:
            apply_conversion(self, conversion)

    @property
    def size_multiple(self) -> int:
        """Height and width of the input must be multiples of this."""
        return 2 ** (len(self.encoder) - 1)

    def forward(
        self, sample: Tensor, timestep: Tensor | float | int, condition: Tensor, return_dict: bool = True
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predict the noise (or what the scheduler's prediction type says).

        Args:
            sample: x_t, ``(B, 3, H, W)``, H and W multiples of `size_multiple`.
            timestep: Scalar or ``(B,)``, in steps of the training schedule; a batch may mix them.
            condition: The enlarged LR picture, ``(B, 3, H, W)``, in the value range of the training pictures.
            return_dict: Return diffusers' UNet2DOutput rather than a tuple.

        Returns:
            UNet2DOutput with ``sample`` ``(B, 3, H, W)``.

        Raises:
            BinarizeError: If shapes do not fit.
        """
        self._check_input(sample, condition)
        if not isinstance(timestep, Tensor):
            timestep = torch.as_tensor(timestep, device=sample.device)
        precise = torch.float64 if sample.dtype == torch.float64 else torch.float32
        if timestep.numel() not in (1, sample.shape[0]):
            raise BinarizeError(
                f"SRUNet: timestep must be a scalar or hold one value for each of the {sample.shape[0]} samples; "
                f"got shape {tuple(timestep.shape)}."
            )
        timesteps = timestep.to(device=sample.device, dtype=precise).reshape(-1).expand(sample.shape[0])
        time = self.time_mlp(self.time_proj(timesteps).to(self.time_mlp[0].weight.dtype))

        seen = [condition] if self._detail_factor is None else [condition, fine_detail(condition, self._detail_factor)]
        x = torch.cat([*seen, sample], dim=1)
        if x.device.type == "cpu":  # where everything that follows is faster in this layout, and keeps it
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.conv_in(x)
        skips = [x]
        for level in cast(Iterable[EncoderLevel], self.encoder):
            for block in level.blocks:
                x = self._run(block, x, time)
                skips.append(x)
            if level.down is not None:
                x = self._run(level.down, x)
                skips.append(x)
        for block in self.middle:
            x = self._run(block, x, time)
        for rung in reversed(cast(Sequence[DecoderLevel], self.decoder)):
            for block in rung.blocks:
                x = self._run(block, x, time, skips.pop())
            if rung.up is not None:
                x = self._run(rung.up, x)
        packed = self.middle[0].packed
        x = norm_silu_conv(self.norm_out, self.conv_out, x) if packed else self.conv_out(norm_silu(x, self.norm_out))
        return UNet2DOutput(sample=x) if return_dict else (x,)

    def _run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            out: Tensor = self._gradient_checkpointing_func(block, *inputs)
        else:
            out = block(*inputs)
        return out

    def _check_input(self, sample: Tensor, condition: Tensor) -> None:
        if sample.dim() != 4 or condition.dim() != 4 or sample.shape[0::2] != condition.shape[0::2]:
            raise BinarizeError(
                "SRUNet: sample and condition must be (B, 3, H, W) of equal size; "
                f"got {tuple(sample.shape)} and {tuple(condition.shape)}."
            )
        if sample.shape[3] != condition.shape[3]:
            raise BinarizeError(
                f"SRUNet: sample and condition differ in width: {tuple(sample.shape)} and {tuple(condition.shape)}."
            )
        if sample.shape[1] + condition.shape[1] != self._given_channels:
            raise BinarizeError(
                f"SRUNet: expects {self._given_channels} channels in all; got {sample.shape[1]} of sample and "
                f"{condition.shape[1]} of condition."
            )
        multiple = self.size_multiple
        if sample.shape[2] % multiple or sample.shape[3] % multiple:
            raise BinarizeError(
                f"SRUNet: height and width must be multiples of {multiple}; got {tuple(sample.shape[2:])}. "
                "SuperResolutionPipeline pads and crops for you."
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> Any:
        """Load as diffusers does, but strictly: it would go on with weights that are missing.

        A packed model's ``model.safetensors`` can also be given by itself; half precision in it becomes float32, unless
        ``dtype`` (``torch_dtype`` in older versions of diffusers) says otherwise.

        Raises:
            BinarizeError: If weights and configuration do not belong together, or a packed file is broken.
        """
        packed = find_packed(pretrained_model_name_or_path, kwargs)
        if packed is not None:
            return cls._from_packed(packed, kwargs.get("dtype", kwargs.get("torch_dtype")))
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        wrong = [f"{len(info[kind])} {kind.replace('_', ' ')}" for kind in _MISFITS if info.get(kind)]
        if wrong:
            first = next(str(key) for kind in _MISFITS for key in info.get(kind) or ())
            raise BinarizeError(
                f"{pretrained_model_name_or_path}: weights and config.json do not belong together: "
                f"{', '.join(wrong)}, such as {first}."
            )
        align_tensors(model)
        return (model, info) if wants_info else model

    @classmethod
    def _from_packed(cls, path: Path, dtype: torch.dtype | None) -> Any:
        config = read_config(path)
        if config.get("_class_name") != cls.__name__:
            raise BinarizeError(f"{path}: holds a {config.get('_class_name')}, not an {cls.__name__}.")
        try:
            with torch.device("meta"):
                model = cls.from_config(config)
        except BinarizeError:
            raise
        except (
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            ImportError,
            RuntimeError,
        ) as error:
            raise BinarizeError(f"{path}: its configuration builds no {cls.__name__}: {error}.") from error
        read_packed(model, path, dtype)
        return model

    def save_pretrained(  # diffusers' pipelines read these names from the signature
        self,
        save_directory: str | PathLike[str],
        is_main_process: bool = True,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save as diffusers does; a converted network keeps its method and options in config.json.

        Raises:
            BinarizeError: If the conversion uses a part that cannot be named in a file.
        """
        check_saveable(self)
        if is_packed(self):
            if is_main_process:
                text = self.to_json_string()
                write_packed_folder(self, Path(save_directory), WEIGHTS, text, json.loads(text))
            return
        super().save_pretrained(
            save_directory,
            is_main_process=is_main_process,
            save_function=save_function,
            safe_serialization=safe_serialization,
            variant=variant,
            max_shard_size=max_shard_size,
            push_to_hub=push_to_hub,
            **kwargs,
        )


def fine_detail(picture: Tensor, factor: float) -> Tensor:
    """Return (picture - its mean over 3x3 pixels) * factor; at borders the mean is over the pixels that there are.

    Args:
        picture: ``(B, C, H, W)``.
        factor: Brings the differences, a few hundredths in pictures in [0, 1], to about one.
    """
    return (picture - F.avg_pool2d(picture, 3, stride=1, padding=1, count_include_pad=False)) * factor


def _check_detail(factor: float | None, condition_channels: int) -> None:
    if factor is None:
        return
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor < math.inf:
        raise BinarizeError(
            "SRUNet: detail_factor multiplies the condition's fine detail, a positive number such as 30; got "
            f"{factor!r}. None leaves the detail out."
        )
    if condition_channels < 1:
        raise BinarizeError(
            f"SRUNet: detail_factor={factor:g} needs a condition, whose detail it shows; in_channels must be larger "
            "than out_channels by the condition's channels."
        )


def _check_config(
    base_channels: int,
    channel_mults: Sequence[int],
    res_blocks: int,
    norm_groups: int,
    attention_levels: Sequence[int],
    resampling: str,
    fusion: str,
) -> None:
    for key, value, allowed in (("resampling", resampling, DOWN), ("fusion", fusion, FUSIONS)):
        if value not in allowed:
            raise BinarizeError(
                f"SRUNet: unknown {key} {value!r}; allowed: {', '.join(allowed)}.{did_you_mean(str(value), allowed)}"
            )
    if len(channel_mults) > _MOST_LEVELS or res_blocks > _MOST_BLOCKS:
        raise BinarizeError(
            f"SRUNet: at most {_MOST_LEVELS} levels of {_MOST_BLOCKS} ResBlocks; got {len(channel_mults)} of "
            f"{res_blocks}."
        )
    if not channel_mults or any(mult < 1 for mult in channel_mults) or res_blocks < 1:
        raise BinarizeError(
            f"SRUNet: needs at least one level and one ResBlock; got channel_mults={tuple(channel_mults)}, "
            f"res_blocks={res_blocks}."
        )
    if base_channels < 1 or norm_groups < 1:
        raise BinarizeError(
            f"SRUNet: base_channels and norm_groups must be at least 1; got {base_channels} and {norm_groups}."
        )
    widths = [base_channels * mult for mult in channel_mults]
    if base_channels % 2 or any(width % norm_groups for width in widths):
        raise BinarizeError(
            f"SRUNet: base_channels must be even and every level's width a multiple of norm_groups={norm_groups}; "
            f"got widths {widths}."
        )
    if resampling == "conv" and fusion != "wide":
        raise BinarizeError(
            f"SRUNet: resampling='conv' goes with fusion='wide' only, since its skips differ in width; got {fusion!r}. "
            "Use resampling='pixel' or 'cp'."
        )
    if resampling != "conv" and any(b != 2 * a for a, b in itertools.pairwise(widths)):
        raise BinarizeError(
            f"SRUNet: resampling={resampling!r} doubles the width at each level; got channel_mults="
            f"{tuple(channel_mults)}. Use multipliers such as (1, 2, 4, 8), or resampling='conv'."
        )
    outside = [level for level in attention_levels if not 0 <= level < len(channel_mults)]
    if outside:
        raise BinarizeError(
            f"SRUNet: attention_levels are indices from 0 (the finest) to {len(channel_mults) - 1}; got {outside}."
        )
