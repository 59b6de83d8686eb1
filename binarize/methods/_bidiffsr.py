"""BI-DiffSR: Chen et al. 2024, "Binarized Diffusion Model for Image Super-Resolution" (NeurIPS)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from binarize.errors import BinarizeError
from binarize.layers.method import Method, register_method
from binarize.layers.parts import Part, PartKind


@register_method("bidiffsr")
@dataclass(frozen=True, kw_only=True)
class BiDiffSR(Method):
    """x + RPReLU_g(alpha sign(w) * ApproxSign(x + b_g)), b_g and RPReLU_g chosen by the timestep's group g.

    TaR (timestep-aware redistribution) is the shift b_g, TaA (timestep-aware activation) the RPReLU. The group is
    clamp(floor(t K / T), 0, K - 1), gathered per sample; the released code uses sample 0's for the whole batch.

    Attributes:
        tar: Shift per timestep group; False shares one shift over time (``pre=None`` removes it).
        taa: RPReLU per timestep group; False shares one over time (``post=None`` removes it).
        groups: K.
        fp_decoder_levels: Decoder levels (0 the finest) whose fusions and ResBlocks stay full precision; None means
            (0, 1) on SRUNet, as released, and none on other hosts.
    """

    default_structure: ClassVar[str] = "cp_cs"

    activation: Part = "approx_sign"
    pre: Part = "tar"
    post: Part = "taa"
    shortcut: Part | bool = True
    groups: int = 5
    tar: bool = True
    taa: bool = True
    fp_decoder_levels: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = self.fp_decoder_levels
        valid = levels is None or (
            isinstance(levels, tuple) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in levels)
        )
        if not valid:
            raise BinarizeError(f"{self.name}: fp_decoder_levels are level indices, 0 the finest; got {levels!r}.")

    def part(self, kind: PartKind) -> Part:
        """Return the part that serves one stage; without TaR or TaA its form with a single group."""
        if kind == "pre" and self.pre == "tar" and not self.tar:
            return "shift"
        if kind == "post" and self.post == "taa" and not self.taa:
            return "rprelu"
        return super().part(kind)
