"""BI-DiffSR: Chen et al. 2024, "Binarized Diffusion Model for Image Super-Resolution" (NeurIPS)."""

from dataclasses import dataclass
from typing import ClassVar

from binarize.layers.method import Method, option, register_method
from binarize.layers.parts import Part


@register_method("bidiffsr")
@dataclass(frozen=True, kw_only=True)
class BiDiffSR(Method):
    """x + RPReLU_g(alpha sign(w) * ApproxSign(x + b_g)), b_g and RPReLU_g chosen by the timestep's group g.

    TaR (timestep-aware redistribution) is the shift b_g, TaA (timestep-aware activation) the RPReLU. The group is
    clamp(floor(t K / T), 0, K - 1) for each sample; the released code uses the first sample's for the whole batch.

    Attributes:
        tar: One shift per timestep group; False shares one shift over time (``pre=None`` removes it).
        taa: One RPReLU per timestep group; False shares one over time (``post=None`` removes it).
        groups: K.
        fp_decoder_levels: As in `Method`. None, the default, keeps levels (0, 1) on SRUNet, as released, and none on
            other hosts.
    """

    default_structure: ClassVar[str] = "cp_cs"

    activation: Part = "approx_sign"
    pre: Part = "tar"
    post: Part = "taa"
    shortcut: Part | bool = True
    groups: int = 5
    tar: bool = option(True, {"pre.tar": "shift"}, when=False)
    taa: bool = option(True, {"post.taa": "rprelu"}, when=False)
    fp_decoder_levels: tuple[int, ...] | None = None
