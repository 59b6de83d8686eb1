"""The options of SRUNet: the blocks that they select, and the checks of their combinations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from torch import nn

from binarize.errors import BinarizeError, did_you_mean
from binarize.layers import structure

Resampler = Callable[[int], nn.Module]
DOWN: dict[str, Resampler] = {"conv": structure.ConvDown, "pixel": structure.PixelDown, "cp": structure.CPDown}
UP: dict[str, Resampler] = {"conv": structure.ConvUp, "pixel": structure.PixelUp, "cp": structure.CPUp}
FUSIONS: dict[str, Callable[[int, int, int], nn.Module] | None] = {
    "wide": None, "concat": structure.ConcatFusion, "add": structure.AddFusion, "split": structure.SplitFusion,
    "cs": structure.CSFusion,
}  # fmt: skip
# A configuration with more would keep the constructor busy for hours.
_MOST_LEVELS, _MOST_BLOCKS = 12, 64


def check_detail(factor: float | None, condition_channels: int) -> None:
    """Raise BinarizeError unless ``detail_factor`` fits a condition of so many channels."""
    if factor is None:
        return
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor < math.inf:
        raise BinarizeError(
            "SRUNet: detail_factor multiplies the condition's fine detail and must be a positive number such as 30; "
            f"got {factor!r}. None leaves the detail out."
        )
    if condition_channels < 1:
        raise BinarizeError(
            f"SRUNet: detail_factor={factor:g} needs a condition; in_channels must be larger "
            "than out_channels by the condition's channels."
        )


def check_config(
    base_channels: int, channel_mults: Sequence[int], res_blocks: int, norm_groups: int,
    attention_levels: Sequence[int], resampling: str, fusion: str,
) -> None:  # fmt: skip
    """Raise BinarizeError unless the options can be built together."""
    for key, value, allowed in (("resampling", resampling, DOWN), ("fusion", fusion, FUSIONS)):
        if value not in allowed:
            raise BinarizeError(
                f"SRUNet: unknown {key} {value!r}; allowed: {', '.join(allowed)}.{did_you_mean(str(value), allowed)}"
            )
    if any(isinstance(number, bool) for number in (base_channels, res_blocks, norm_groups, *channel_mults)):
        raise BinarizeError("SRUNet: the options are numbers; got true or false for one of them.")
    levels, mults = len(channel_mults), tuple(channel_mults)
    if levels > _MOST_LEVELS or res_blocks > _MOST_BLOCKS:
        raise BinarizeError(
            f"SRUNet: at most {_MOST_LEVELS} levels of {_MOST_BLOCKS} ResBlocks; got {levels} of {res_blocks}."
        )
    if not mults or any(mult < 1 for mult in mults) or res_blocks < 1:
        got = f"got channel_mults={mults}, res_blocks={res_blocks}."
        raise BinarizeError(f"SRUNet: needs at least one level and one ResBlock; {got}")
    if base_channels < 1 or norm_groups < 1:
        got = f"got {base_channels} and {norm_groups}."
        raise BinarizeError(f"SRUNet: base_channels and norm_groups must be at least 1; {got}")
    widths = [base_channels * mult for mult in mults]
    outside = [level for level in attention_levels if not 0 <= level < levels]
    for wrong, message in (
        (
            base_channels % 2 or any(width % norm_groups for width in widths),
            f"base_channels must be even and every level's width a multiple of norm_groups={norm_groups}; "
            f"got widths {widths}.",
        ),
        (
            resampling == "conv" and fusion != "wide",
            f"resampling='conv' goes with fusion='wide' only, since its skips differ in width; got {fusion!r}. "
            "Use resampling='pixel' or 'cp'.",
        ),
        (
            resampling != "conv" and any(b != 2 * a for a, b in itertools.pairwise(widths)),
            f"resampling={resampling!r} doubles the width at each level; got channel_mults={mults}. Use multipliers "
            "such as (1, 2, 4, 8), or resampling='conv'.",
        ),
        (outside, f"attention_levels are indices from 0 (the finest) to {levels - 1}; got {outside}."),
    ):
        if wrong:
            raise BinarizeError(f"SRUNet: {message}")
