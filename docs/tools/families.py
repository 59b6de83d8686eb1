"""Write the table of families into docs/howto/hosts.md: what `binarize.convert` makes of networks at their real size.

    python docs/tools/families.py

builds each network on the meta device, without weights, converts it, and replaces the text between the markers
``<!-- families:begin -->`` and ``<!-- families:end -->``. Networks whose library is not installed are left out, with an
error at the end.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

import binarize
from binarize.conversion.record import conversion
from binarize.tables import Column, Table
from binarize.timestep import TimestepContext
from binarize.timestep_argument import find_source

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "howto" / "hosts.md"
sys.path.append(str(ROOT / "tests"))  # for ``zoo``, which has ADM, SR3 and EDM

CONTROLNET = {"attention_head_dim": 8, "cross_attention_dim": 768}
SD_1_5 = {**CONTROLNET, "sample_size": 64}
SVD = {"num_attention_heads": (5, 10, 20, 20)}
DIT = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "sample_size": 32}
SD3 = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
ADM = {
    "width": 256,
    "mults": (1, 1, 2, 2, 4, 4),
    "blocks": 2,
    "attention": (3, 4, 5),
    "classes": 1000,
    "head_width": 64,
}
SR3 = {"width": 64, "mults": (1, 2, 4, 8, 8), "blocks": 2, "attention": (3,), "channels": 6}
EDM = {"width": 128, "mults": (2, 2, 2), "blocks": 4, "size": 32}
SDXL = {
    "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10), "sample_size": 128,
    "attention_head_dim": (5, 10, 20),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 2048,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}  # fmt: skip
CIFAR10 = {
    "block_out_channels": (128, 256, 256, 256), "sample_size": 32, "attention_head_dim": None, "flip_sin_to_cos": False,
    "freq_shift": 1, "downsample_padding": 0, "norm_eps": 1e-6,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
PIXART = {
    "attention_head_dim": 72, "num_attention_heads": 16, "num_layers": 28, "caption_channels": 4096, "out_channels": 8,
    "cross_attention_dim": 1152, "sample_size": 64,
}  # fmt: skip
HOPPER = {
    "in_channels": 14, "out_channels": 14, "block_out_channels": (32, 128, 256), "time_embedding_type": "positional",
    "use_timestep_embedding": True, "flip_sin_to_cos": False, "freq_shift": 1.0, "act_fn": "mish",
    "down_block_types": ("DownResnetBlock1D",) * 3, "up_block_types": ("UpResnetBlock1D",) * 2, "layers_per_block": 1,
    "mid_block_type": "MidResTemporalBlock1D", "out_block_type": "OutConv1DBlock", "norm_num_groups": 8,
}  # fmt: skip
SD_VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
MONAI_3D = {
    "spatial_dims": 3, "in_channels": 1, "out_channels": 1, "channels": (256, 256, 512), "num_res_blocks": 2,
    "attention_levels": (False, False, True), "num_head_channels": (0, 0, 512),
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A published network: its name in the table, the module and name of its class, and their arguments."""

    name: str
    module: str
    cls: str
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)  # of `binarize.convert`
    slow: bool = False  # takes many seconds

    def build(self) -> nn.Module:
        """Return the network on the meta device."""
        module = __import__(self.module, fromlist=[self.cls])
        with torch.device("meta"):
            return getattr(module, self.cls)(**self.config)  # type: ignore[no-any-return]


LEVELS, UNIT = ({"timestep": {"argument": "time", "kind": kind}} for kind in ("noise_level", "unit"))
UNTIMED = {"method": {"name": "bidiffsr", "groups": 1}}
FAMILIES = (
    Family("DDPM, CIFAR-10", "diffusers", "UNet2DModel", CIFAR10),
    Family("Stable Diffusion 1.5", "diffusers", "UNet2DConditionModel", SD_1_5),
    Family("its ControlNet", "diffusers", "ControlNetModel", CONTROLNET),
    Family("Stable Diffusion XL", "diffusers", "UNet2DConditionModel", SDXL),
    Family("its autoencoder", "diffusers", "AutoencoderKL", SD_VAE, UNTIMED),
    Family("ModelScope text-to-video", "diffusers", "UNet3DConditionModel", {"attention_head_dim": 64}),
    Family("AnimateDiff", "diffusers", "UNetMotionModel", {"cross_attention_dim": 768}),
    Family("Stable Video Diffusion", "diffusers", "UNetSpatioTemporalConditionModel", SVD),
    Family("Diffuser, hopper", "diffusers", "UNet1DModel", HOPPER),
    Family("DiT-XL/2", "diffusers", "DiTTransformer2DModel", DIT),
    Family("PixArt-alpha", "diffusers", "PixArtTransformer2DModel", PIXART),
    Family("Stable Diffusion 3", "diffusers", "SD3Transformer2DModel", SD3),
    Family("FLUX.1", "diffusers", "FluxTransformer2DModel", {"guidance_embeds": True}),
    Family("ADM, ImageNet 256", "zoo.adm", "ADMUNet", ADM),
    Family("SR3, 16 to 128", "zoo.sr3", "SR3UNet", SR3, LEVELS),
    Family("EDM, CIFAR-10", "zoo.edm", "EDMPrecond", EDM),
    Family("denoising-diffusion-pytorch, 2-D", "denoising_diffusion_pytorch", "Unet", {"dim": 64}),
    Family("denoising-diffusion-pytorch, 1-D", "denoising_diffusion_pytorch", "Unet1D", {"dim": 64, "channels": 32}),
    Family("EDM2, ImageNet 64", "denoising_diffusion_pytorch", "KarrasUnet", {"image_size": 64}, UNIT, slow=True),
    Family("MONAI, 3-D", "monai.networks.nets", "DiffusionModelUNet", MONAI_3D),
)
# Reasons of layers that have no binary form, unlike those that stay full precision by choice.
NO_FORM = re.compile(r"transposed|parameters in|nn\.Multihead|its |it has |[A-Z]\w*(: | has | resamples)")


def row(family: Family) -> tuple[str, ...]:
    """Return a family's row of the table."""
    options = {"method": "bidiffsr", **family.options}
    model = family.build()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    name, size = family.name, f"{parameters / 1e6:,.1f}"
    try:
        report = binarize.plan(model, **options)
        share = report.binary_parameters / report.parameters
    except binarize.BinarizeError:  # nothing but linear layers
        options["linear"], share = True, 0.0
    try:
        done = conversion(binarize.convert(model, **options))
    except binarize.BinarizeError as error:
        reasons = str(error).split(": ", 1)[1].rsplit(". ", 1)[0]
        return name, size, "0%", "0%", "-", "; ".join(map(_brief, reasons.split("; ")))
    with_linear = done.report.with_linear / done.report.parameters
    source = _timestep(model, done.context)
    return name, size, f"{share:.0%}", f"{with_linear:.0%}", source, _without_form(done.report)


def _timestep(model: nn.Module, context: TimestepContext | None) -> str:
    if context is None:
        return "none"
    return f"`{find_source(model, context.timestep).name or 'time_proj'}`, {context.timestep.kind}"


def _without_form(report: binarize.ConversionReport) -> str:
    """Return why layers have no binary form, with their share of all parameters, the largest first."""
    weights: Counter[str] = Counter()
    for each in report.kept:
        if NO_FORM.match(each.detail):
            weights[_brief(each.detail)] += each.weights
    shares = {reason: count / report.parameters for reason, count in weights.most_common()}
    return "; ".join(f"{share:.1%} {reason}" for reason, share in shares.items() if share >= 0.0005)


def _brief(reason: str) -> str:
    return re.split(r": |, which|, a class| \(", reason)[0]


def table(families: tuple[Family, ...] = FAMILIES) -> str:
    """Return the table as Markdown."""
    columns = ["network", "parameters, M", "binary", "`linear=True`", "timestep", "without a binary form"]
    return Table([Column(name) for name in columns], [row(family) for family in families]).to_markdown()


def main() -> None:
    """Write the table into the page."""
    missing = sorted({f.module.split(".")[0] for f in FAMILIES if find_spec(f.module.split(".")[0]) is None})
    if missing:
        raise SystemExit(f"not installed: {', '.join(missing)}; pip install 'binarize-diffusion[zoo]'")
    text = PAGE.read_text(encoding="utf-8")
    pattern = re.compile("(?<=<!-- families:begin -->\n\n).*?(?=\n\n<!-- families:end -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"{PAGE} has no markers <!-- families:begin --> and <!-- families:end -->")
    PAGE.write_text(pattern.sub(lambda _: table(), text), encoding="utf-8")


if __name__ == "__main__":
    main()
