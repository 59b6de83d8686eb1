"""The zoo: for each family a tiny network, its inputs, and what a conversion has to make of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo import libraries
from zoo.adm import ADMUNet
from zoo.edm import EDMPrecond
from zoo.kdiffusion import KDenoiser
from zoo.ncsnpp import NCSNpp
from zoo.restoration import ConditionalNAFNet, ImagenUnet, SRDiffUNet, SwinUNet
from zoo.sr3 import PaletteUNet, SR3UNet

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
GROUPS = (0, 4, 1, 3, 2)  # of the samples of a batch, out of five groups
POSITIONS = torch.tensor([0.05, 0.95, 0.25, 0.65, 0.45], dtype=torch.float64)  # of the samples in training's range
STEPS = (1000 * POSITIONS).long()


@dataclass(frozen=True)
class Row:
    """One family of networks.

    Attributes:
        build: Makes a tiny network with random weights.
        inputs: Makes inputs of `len(GROUPS)` samples whose timesteps are `POSITIONS`, in float64.
        kept: Patterns of the layers that stay full precision, with ``linear=True`` as well.
        binary: Patterns of layers that become binary by default.
        linear: Patterns of layers that ``linear=True`` makes binary.
        options: Further arguments of `convert`.
        refused: The error that says why nothing is converted by default, or, without `binary` and `linear`, at all.
        timed: Its forward takes a timestep.
        library: The package that it needs.
        slow: Whether `make test-fast` leaves it out; other rows test the same.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    kept: tuple[str, ...] = ()
    binary: tuple[str, ...] = ()
    linear: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    refused: str = ""
    timed: bool = True
    library: str = "torch"
    slow: bool = False

    @property
    def convertible(self) -> bool:
        """Whether `convert` can make something of it."""
        return bool(self.binary or self.linear)


def noise(*shape: int) -> Tensor:
    """Return ``(B, *shape)`` normal numbers in float64."""
    return torch.randn(len(GROUPS), *shape, dtype=torch.float64)


def given(
    *shape: int, time: Tensor = STEPS, more: Callable[[], tuple[Any, ...]] = tuple, **extra: Callable[[], Any]
) -> Callable[[], Inputs]:
    """Return a function that makes the arguments ``noise(*shape), time, *more()`` and ``extra`` by name."""
    return lambda: ((noise(*shape), time, *more()), {name: make() for name, make in extra.items()})


def text() -> tuple[Tensor]:
    return (noise(5, 8),)


def geometric(low: float, high: float) -> Tensor:
    """Return the noise levels at `POSITIONS` between two levels, evenly spaced in the logarithm."""
    return low * (high / low) ** POSITIONS


SR3_LEVELS = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0).sqrt()
"""sqrt(alpha_bar) of 1000 steps of a linear schedule."""


def declared(argument: str, kind: str, **more: Any) -> dict[str, Any]:
    """Return the option of `convert` that says what a network's timestep is."""
    return {"timestep": {"argument": argument, "kind": kind, **more}}


def added() -> dict[str, Tensor]:
    return {"text_embeds": noise(8), "time_ids": noise(6)}


def classes() -> tuple[Tensor]:
    return (torch.arange(len(GROUPS)) % 3,)


NO_CONVOLUTION = "would replace nothing.*linear=True"
UNSIZED = {"resolution": None, "aspect_ratio": None}
TIME = ("time_embedding.*", "*time_emb_proj")
ENDS = ("conv_in", "conv_out")
MONAI_KEPT = ("conv_in.conv", "out.2.conv", "time_embed.*", "*.time_emb_proj")
LUCID_KEPT = ("init_conv", "final_conv", "time_mlp.*", "*.mlp.1")
PLAIN: dict[str, Row] = {
    "adm": Row(
        ADMUNet, given(3, 8, 8, more=classes), ("input_blocks.0.0", "out.2", "time_embed.*", "*.emb_layers.1"),
        ("*.in_layers.2", "*.out_layers.3"),
    ),
    "sr3": Row(
        SR3UNet, lambda: ((noise(3, 8, 8), SR3_LEVELS[STEPS, None]), {}),
        ("downs.0", "final_conv.2", "noise_level_mlp.*", "*.noise_func"), ("downs.2", "*.block?.2"),
        options=declared("time", "noise_level", schedule=SR3_LEVELS.tolist()),
    ),
    "palette": Row(
        PaletteUNet, lambda: ((noise(6, 8, 8), SR3_LEVELS[STEPS] ** 2), {}),
        ("input_blocks.0", "out.2", "cond_embed.*", "*.emb_layers.1"), ("*.in_layers.2", "*.out_layers.2"),
        options=declared("gammas", "alpha_bar", schedule=SR3_LEVELS.square().tolist()),
    ),
    "edm": Row(
        EDMPrecond, given(3, 8, 8, time=geometric(0.002, 80)),
        ("model.enc.8x8_conv", "model.out_conv", "model.map_*", "*.affine"), ("*.conv1",),
    ),
    "k_diffusion": Row(
        KDenoiser, given(3, 8, 8, time=geometric(0.01, 80)),
        ("inner_model.proj_in", "inner_model.proj_out", "*.mapping.*", "*.mapper"), ("*.conv0", "*.conv1"),
        options=declared("sigma", "sigma", range=(0.01, 80)),
    ),
    "ncsnpp": Row(
        NCSNpp, given(3, 8, 8, time=geometric(0.01, 50)),
        (*(f"all_modules.{i}" for i in (1, 2, 3, 5, 10, 14)), "*.Dense_0"), ("*.Conv_0", "*.Conv_1"),
        options=declared("time_cond", "sigma", range=(0.01, 50)),
    ),
    "nafnet": Row(
        ConditionalNAFNet, lambda: ((noise(3, 8, 8), noise(3, 8, 8), STEPS), {}),
        ("intro", "ending", "time_mlp.*", "*.mlp.1"), ("*.conv1", "*.conv3", "downs.0"),
    ),
    "srdiff": Row(
        SRDiffUNet, given(3, 8, 8, more=lambda: (noise(12, 4, 4),)),
        ("cond_proj", "first", "final_conv.2", "mlp.*"), ("mid", "down"),
    ),
    "imagen": Row(
        ImagenUnet, given(3, 8, 8, time=20 - 35 * POSITIONS),
        ("init_conv.convs.?", "final_conv", "to_time_*"), ("mid_block1", "downs.0", "ups.0"),
        options=declared("time", "log_snr", range=(20, -15)),
    ),
    "swin": Row(
        SwinUNet, given(3, 8, 8), ("input_blocks.0", "out.2", "time_embed.*"), ("*.mlp.0", "*.mlp.2", "output_blocks.0")
    ),
}  # fmt: skip
DIFFUSERS: dict[str, Row] = {
    "unet2d": Row(libraries.unet2d, given(3, 8, 8), (*ENDS, *TIME, "*.to_?"), ("mid_block.*conv1",)),
    "unet2d_fourier": Row(
        partial(libraries.unet2d, time_embedding_type="fourier"), given(3, 8, 8, time=geometric(0.01, 1348)),
        (*ENDS, *TIME), ("mid_block.*conv1",),
    ),
    "condition": Row(
        libraries.condition, given(4, 8, 8, more=text), (*ENDS, *TIME, "*.to_?"), ("mid_block.*conv1",), ("*.ff.net.2",)
    ),
    "condition_xl": Row(
        partial(libraries.condition, **libraries.ADDED), given(4, 8, 8, more=text, added_cond_kwargs=added),
        (*ENDS, *TIME, "add_embedding.*"), ("mid_block.*conv1",), ("*.ff.net.2",), slow=True,
    ),
    "controlnet": Row(
        libraries.controlnet, given(4, 8, 8, more=lambda: (*text(), noise(3, 16, 16))),
        ("conv_in", "controlnet_*", *TIME), ("mid_block.*conv1",), ("*.ff.net.2",),
    ),
    "unet3d": Row(
        libraries.unet3d, given(4, 2, 8, 8, more=text), (*ENDS, *TIME), ("mid_block.resnets.*conv1",), ("*.ff.net.2",)
    ),
    "motion": Row(
        libraries.motion, given(4, 2, 8, 8, more=lambda: (text()[0].repeat_interleave(2, 0),)),
        (*ENDS, *TIME), ("mid_block.*conv1",), ("*.ff.net.2",), slow=True,
    ),
    "svd": Row(
        libraries.svd,
        lambda: ((noise(2, 8, 8, 8), geometric(0.002, 700).log() / 4, noise(1, 8), noise(3).abs()), {}),
        (*ENDS, *TIME, "add_embedding.*"), ("mid_block.*spatial_res_block.conv1",), ("*.ff.net.2", "*.ff_in.net.2"),
    ),
    "unet1d": Row(
        libraries.unet1d, given(4, 16), ("time_mlp.*", "*.time_emb", "out_block.final_conv1d_2"),
        ("mid_block.*.conv1d",),
    ),
    "dit": Row(
        libraries.dit, lambda: ((noise(4, 8, 8), STEPS, *classes()), {}),
        ("pos_embed.proj", "proj_out_?", "*norm1.emb.*", "*.norm1.linear"),
        linear=("*.ff.net.2",), refused=NO_CONVOLUTION,
    ),
    "pixart": Row(
        libraries.pixart, lambda: ((noise(4, 8, 8), *text(), STEPS), {"added_cond_kwargs": UNSIZED}),
        ("pos_embed.proj", "proj_out", "adaln_single.*"), linear=("*.ff.net.2",), refused=NO_CONVOLUTION,
    ),
    "sd3": Row(
        libraries.sd3, lambda: ((noise(4, 8, 8), *text(), noise(8), STEPS), {}),
        ("pos_embed.proj", "proj_out", "time_text_embed.*", "*.norm1*.linear", "norm_out.linear"),
        linear=("*.ff.net.2",), refused=NO_CONVOLUTION,
    ),
    "flux": Row(
        libraries.flux,
        lambda: ((noise(16, 4), *text(), noise(8), POSITIONS, torch.zeros(16, 3), torch.zeros(5, 3)), {}),
        ("x_embedder", "proj_out", "time_text_embed.*", "*.norm*.linear", "norm_out.linear"),
        linear=("*.ff.net.2",), refused=NO_CONVOLUTION,
    ),
    "autoencoder": Row(
        libraries.autoencoder, lambda: ((noise(3, 16, 16),), {}), ("encoder.conv_in", "decoder.conv_out"),
        ("*mid_block.*conv1",), timed=False,
    ),
}  # fmt: skip
LUCIDRAINS: dict[str, Row] = {
    "lucidrains": Row(
        libraries.lucidrains, given(3, 8, 8, time=STEPS.double()), LUCID_KEPT, ("*.block?.proj",)
    ),
    "lucidrains_1d": Row(
        libraries.lucidrains_1d, given(3, 16, time=STEPS.double()), LUCID_KEPT, ("*.block?.proj",), slow=True
    ),
    "karras": Row(
        libraries.karras, given(3, 16, 16, time=POSITIONS), refused="Conv2d, a class .* binarize.register_layer"
    ),
}  # fmt: skip
MONAI: dict[str, Row] = {
    "monai_2d": Row(partial(libraries.monai_unet, 2), given(3, 8, 8), MONAI_KEPT, ("*.conv1.conv", "*.conv2.conv")),
    "monai_3d": Row(
        partial(libraries.monai_unet, 3), given(3, 8, 8, 8), MONAI_KEPT, ("*.conv1.conv", "*.conv2.conv"), slow=True
    ),
}
ROWS = {
    **PLAIN,
    **{name: Row(**{**vars(row), "library": "diffusers"}) for name, row in DIFFUSERS.items()},
    **{name: Row(**{**vars(row), "library": "denoising_diffusion_pytorch"}) for name, row in LUCIDRAINS.items()},
    **{name: Row(**{**vars(row), "library": "monai"}) for name, row in MONAI.items()},
}
