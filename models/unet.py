"""SRUNet: one U-Net for diffusion super-resolution whose structure is two options.

The options `resampling` and `fusion` select SR3's U-Net, BI-DiffSR's full-precision twin, or any of its structural
ablations. The network consists of plain nn.Conv2d; `binarize.convert` makes it binary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from binarize.conversion.apply import apply_conversion, check_saveable, write_packed_folder
from binarize.conversion.packing import is_packed
from binarize.errors import BinarizeError
from binarize.layers.fused import norm_silu
from binarize.models.blocks import DecoderLevel, EncoderLevel, ResBlock, SinusoidalTime, fine_detail
from binarize.models.unet_config import DOWN, FUSIONS, UP, check_config, check_detail
from binarize.modules import align_tensors
from binarize.packed.blocks import PackedBlock, needs_gradient, norm_silu_conv
from binarize.packed.files import WEIGHTS, find_packed, read_config, read_packed

_UNBUILDABLE = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, ImportError, RuntimeError)
_MISFITS = ("missing_keys", "unexpected_keys", "mismatched_keys")


@dataclass
class SRUNetOutput(BaseOutput):
    """What `SRUNet` returns: the prediction ``sample``, ``(B, 3, H, W)``."""

    # Not diffusers' UNet2DOutput: its module imports every network of diffusers, for a second or two.
    sample: Tensor


class SRUNet(ModelMixin, ConfigMixin):
    """The noise predictor of SR3 and BI-DiffSR. Without arguments: the released structure in full precision.

    Modules are named ``encoder.LEVEL.blocks.N``, ``encoder.LEVEL.down``, ``middle.N``, ``decoder.LEVEL.blocks.N`` and
    ``decoder.LEVEL.up``; level 0 is the finest resolution in both.

    Args:
        in_channels: Channels of condition and sample together.
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
        detail_factor: With a positive number, the first convolution also reads the condition's fine detail, that is its
            difference from its mean over 3x3 pixels times this number. The network computes it and inserts it between
            condition and sample, with as many channels as the condition has. None, as released, leaves it out.
        conversion: How the network is binarized, as recorded by `binarize.convert`; set when loading, not by hand.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResBlock"]

    @register_to_config
    def __init__(
        self, in_channels: int = 6, out_channels: int = 3, base_channels: int = 64,
        channel_mults: tuple[int, ...] = (1, 2, 4, 8), res_blocks: int = 2, norm_groups: int = 16,
        dropout: float = 0.2, attention_levels: tuple[int, ...] = (), resampling: str = "cp", fusion: str = "cs",
        num_train_timesteps: int = 2000, detail_factor: float | None = None, conversion: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_config(base_channels, channel_mults, res_blocks, norm_groups, attention_levels, resampling, fusion)
        check_detail(detail_factor, in_channels - out_channels)
        self.gradient_checkpointing = False
        base, levels = base_channels, len(channel_mults)
        self.time_proj = SinusoidalTime(base)
        self.time_mlp = nn.Sequential(nn.Linear(base, 4 * base), nn.SiLU(), nn.Linear(4 * base, base))
        self._input_channels, self._detail_factor = in_channels, detail_factor
        extra = 0 if detail_factor is None else in_channels - out_channels
        self.conv_in = nn.Conv2d(in_channels + extra, base, 3, padding=1)

        def block(width: int, out: int, level: int, fuse: nn.Module | None = None) -> ResBlock:
            return ResBlock(width, out, base, norm_groups, dropout, fuse, level in attention_levels)

        width, skips = base, [base]
        self.encoder = nn.ModuleList()
        for level, mult in enumerate(channel_mults):
            out = base * mult
            blocks = [block(out if i else width, out, level) for i in range(res_blocks)]
            width, down = out, None
            skips += [width] * res_blocks
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
                skip, make = skips.pop(), FUSIONS[fusion]
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
    ) -> SRUNetOutput | tuple[Tensor]:
        """Predict the noise (or what the scheduler's prediction type says), ``(B, 3, H, W)``.

        Args:
            sample: x_t, ``(B, 3, H, W)``, H and W multiples of `size_multiple`.
            timestep: Scalar or ``(B,)``, in steps of the training schedule; a batch may mix them.
            condition: The upscaled LR image, ``(B, 3, H, W)``, in the value range of the training images.
            return_dict: Return an `SRUNetOutput` rather than a tuple.
        """
        self._check_input(sample, condition)
        if not isinstance(timestep, Tensor):
            most = self.config["num_train_timesteps"]
            if not 0 <= timestep <= most:
                raise BinarizeError(
                    f"SRUNet: timestep {timestep} is outside the 0..{most - 1} that it was trained for."
                )
            timestep = torch.as_tensor(timestep, device=sample.device)
        precise = torch.float64 if sample.dtype == torch.float64 else torch.float32
        if timestep.numel() not in (1, sample.shape[0]):
            raise BinarizeError(
                f"SRUNet: timestep must be a scalar or hold one value for each of the {sample.shape[0]} samples; "
                f"got shape {tuple(timestep.shape)}."
            )
        timesteps = timestep.to(device=sample.device, dtype=precise).reshape(-1).expand(sample.shape[0])
        time = self.time_mlp(self.time_proj(timesteps).to(self.time_mlp[0].weight.dtype))
        # Compute all time biases first. Between large convolutions, these small products would run with cold caches.
        active = F.silu(time)
        biases = iter([block.time(active) for block in self._blocks()])

        conditions = [condition]
        if self._detail_factor is not None:
            conditions.append(fine_detail(condition, self._detail_factor))
        x = torch.cat([*conditions, sample], dim=1)
        if x.device.type == "cpu":  # all that follows keeps this layout, and is faster in it
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.conv_in(x)
        skips = [x]
        for level in cast(Iterable[EncoderLevel], self.encoder):
            for block in level.blocks:
                x = self._run(block, x, time, None, next(biases))
                skips.append(x)
            if level.down is not None:
                x = self._run(level.down, x)
                skips.append(x)
        for block in self.middle:
            x = self._run(block, x, time, None, next(biases))
        for up_level in reversed(cast(Sequence[DecoderLevel], self.decoder)):
            for block in up_level.blocks:
                x = self._run(block, x, time, skips.pop(), next(biases))
            if up_level.up is not None:
                x = self._run(up_level.up, x)
        if isinstance(block, PackedBlock) and not needs_gradient(x, self.norm_out, self.conv_out):
            x = norm_silu_conv(self.norm_out, self.conv_out, x)
        else:
            x = self.conv_out(norm_silu(x, self.norm_out))
        return SRUNetOutput(sample=x) if return_dict else (x,)

    def _blocks(self) -> list[Any]:
        """Return the ResBlocks in the order of their calls."""
        encoder = [block for level in cast(Iterable[EncoderLevel], self.encoder) for block in level.blocks]
        levels = reversed(cast(Sequence[DecoderLevel], self.decoder))
        return [*encoder, *self.middle, *(block for level in levels for block in level.blocks)]

    def _run(self, block: nn.Module, *inputs: Tensor | None) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            out: Tensor = self._gradient_checkpointing_func(block, *inputs)
        else:
            out = block(*inputs)
        return out

    def _check_input(self, sample: Tensor, condition: Tensor) -> None:
        shapes = f"{tuple(sample.shape)} and {tuple(condition.shape)}."
        if sample.dim() != 4 or condition.dim() != 4 or sample.shape[0::2] != condition.shape[0::2]:
            raise BinarizeError(f"SRUNet: sample and condition must be (B, 3, H, W) of equal size; got {shapes}")
        if sample.shape[3] != condition.shape[3]:
            raise BinarizeError(f"SRUNet: sample and condition differ in width: {shapes}")
        if sample.shape[1] + condition.shape[1] != self._input_channels:
            got = f"got {sample.shape[1]} of sample and {condition.shape[1]} of condition."
            raise BinarizeError(f"SRUNet: expects {self._input_channels} channels in all; {got}")
        multiple = self.size_multiple
        if sample.shape[2] % multiple or sample.shape[3] % multiple:
            raise BinarizeError(
                f"SRUNet: height and width must be multiples of {multiple}; got {tuple(sample.shape[2:])}. "
                "SuperResolutionPipeline pads and crops for you."
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> Any:
        """Load as diffusers does, but raise an error for missing weights.

        A packed model's ``.safetensors`` file can be given by itself. Half precision in it becomes float32, unless
        ``dtype`` (``torch_dtype`` in older versions of diffusers) selects another dtype.
        """
        packed = find_packed(pretrained_model_name_or_path, kwargs)
        if packed is not None:
            if kwargs.get("quantization_config") is not None:
                raise BinarizeError(f"{packed} is packed, so it is converted already; leave quantization_config out.")
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
        except _UNBUILDABLE as error:
            raise BinarizeError(f"{path}: its configuration builds no {cls.__name__}: {error}.") from error
        read_packed(model, path, dtype)
        return model

    def save_pretrained(  # diffusers' pipelines read these names from the signature
        self, save_directory: str | PathLike[str], is_main_process: bool = True,
        save_function: Callable[..., Any] | None = None, safe_serialization: bool = True, variant: str | None = None,
        max_shard_size: int | str = "10GB", push_to_hub: bool = False, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Save as diffusers does; a converted network keeps its method and options in config.json."""
        check_saveable(self)
        if is_packed(self):
            if is_main_process:
                text = self.to_json_string()
                write_packed_folder(self, Path(save_directory), WEIGHTS, text, json.loads(text))
            return
        super().save_pretrained(
            save_directory, is_main_process, save_function, safe_serialization, variant, max_shard_size, push_to_hub,
            **kwargs,
        )  # fmt: skip
