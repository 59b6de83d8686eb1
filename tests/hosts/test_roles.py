"""Input and output layers by role, embeddings of every block, attention without its feed-forward layers, adapters."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from errors_case import assert_error
from torch import Tensor, nn
from zoo.parts import sinusoid

import binarize
from binarize.hosts import find_host
from binarize.layers import BinaryConv2d, BinaryLinear


def conv(channels: int, out: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(channels, out, kernel, padding=kernel // 2)


class OutFirst(nn.Module):
    """Registers its output layer first."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_out, self.proj_in, self.body = conv(16, 3), conv(3, 16), conv(16, 16)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        out: Tensor = self.proj_out(F.silu(self.body(self.proj_in(x))))
        return out


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("example", [False, True])
def test_roles_do_not_depend_on_the_mode_of_gradients(mode, example) -> None:
    inputs = (torch.zeros(1, 3, 8, 8), torch.ones(1)) if example else None
    expected = binarize.plan(OutFirst(), "bnn", example_inputs=inputs)
    assert [row.name for row in expected.replaced] == ["body"]
    with mode():
        assert binarize.plan(OutFirst(), "bnn", example_inputs=inputs) == expected
        assert binarize.report(binarize.convert(OutFirst(), "bnn", example_inputs=inputs)) == expected


class Unguessable(OutFirst):
    """Needs an argument that nothing tells."""

    def forward(self, x: Tensor, time: Tensor, context: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(x + context["shift"], time)


class Crossed(Unguessable):
    """Also has an image with the channels of its features, so that only order is left."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_out, self.proj_in = conv(16, 16), conv(16, 16)


class KDiffusionBlock(nn.Module):
    """k-diffusion's adaptive group norm: its linear layer is called with the output of the mapping network."""

    def __init__(self, width: int, cond: int) -> None:
        super().__init__()
        self.scale, self.main = nn.Linear(cond, 2 * width), conv(width, width)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        scale, shift = self.scale(cond)[:, :, None, None].chunk(2, 1)
        return x + self.main(F.silu(x * (1 + scale) + shift))


class KDiffusionUNet(nn.Module):
    """k-diffusion's image model: both projections come before the blocks, and the noise level is mapped."""

    def __init__(self) -> None:
        super().__init__()
        self.mapping = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 12))
        self.proj_in, self.proj_out = conv(3, 16, 1), conv(16, 3, 1)
        self.blocks = nn.ModuleList(KDiffusionBlock(16, 12) for _ in range(2))

    def forward(self, input: Tensor, sigma: Tensor) -> Tensor:
        cond = self.mapping(sinusoid(sigma.log() / 4, 8))
        x = self.proj_in(input)
        for block in self.blocks:
            x = block(x, cond)
        out: Tensor = self.proj_out(x)
        return out


class NAFNet(nn.Module):
    """NAFNet: `ending` is registered second, and a channel attention squeezes its features to one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.intro, self.ending = conv(3, 16), conv(16, 3)
        self.block = nn.Sequential(conv(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16), conv(16, 16, 1))
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(16, 1, 1), nn.ReLU(), conv(1, 16, 1))

    def forward(self, inp: Tensor) -> Tensor:
        x = self.intro(inp)
        x = x + self.block(x) * self.sca(x)
        out: Tensor = self.ending(x)
        return out + inp


class UnguessableNAFNet(NAFNet):
    def forward(self, inp: Tensor, context: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(inp + context["shift"])


class ParallelInputs(nn.Module):
    """Imagen: convolutions of three sizes read the image, and their outputs are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.final_conv, self.body = conv(16, 3), conv(16, 16)
        self.init_conv = nn.ModuleList([conv(3, 8, 3), conv(3, 4, 7), conv(3, 4, 15)])

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        out: Tensor = self.final_conv(F.silu(self.body(torch.cat([layer(x) for layer in self.init_conv], 1))))
        return out


class OwnConv(nn.Module):
    """EDM's convolution: a class with a weight of its own."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, channels, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=1)


class OwnHeads(nn.Module):
    """Reads its input and gives its output by layers of a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.tail = conv(16, 16), conv(16, 16)
        self.enter, self.leave = OwnConv(3, 16), OwnConv(16, 3)

    def forward(self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None) -> Tensor:
        out: Tensor = self.leave(self.tail(F.silu(self.body(self.enter(x)))))
        return out


class Pyramid(nn.Module):
    """NCSN++ with image pyramids: every level reads the image and gives a part of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.Dense_0 = nn.Linear(8, 16)
        self.to_image = nn.ModuleList(conv(16, 3) for _ in range(2))
        self.from_image = nn.ModuleList(conv(3, 16, 1) for _ in range(2))
        self.down, self.up = nn.Conv2d(16, 16, 3, 2, 1), conv(16, 16)
        self.mix = conv(16, 16)

    def forward(self, x: Tensor, time_cond: Tensor) -> Tensor:
        h = self.from_image[0](x)
        h = self.down(h) + self.from_image[1](F.avg_pool2d(x, 2))
        h = self.mix(F.silu(h + self.Dense_0(sinusoid(time_cond, 8))[:, :, None, None]))
        pyramid = F.interpolate(self.to_image[0](h), scale_factor=2)
        out: Tensor = pyramid + self.to_image[1](self.up(F.interpolate(h, scale_factor=2)))
        return out


class LucidBlock(nn.Module):
    """denoising-diffusion-pytorch's ResnetBlock: `mlp.1` is called with the time embedding."""

    def __init__(self, width: int, time: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(time, 2 * width))
        self.block1, self.block2 = conv(width, width), conv(width, width)
        self.squeeze = nn.Sequential(nn.Linear(width, width), nn.Sigmoid())

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.mlp(time)[:, :, None, None].chunk(2, 1)
        h = self.block2(F.silu(self.block1(x) * (1 + scale) + shift))
        return x + h * self.squeeze(h.mean((2, 3)))[:, :, None, None]


class LucidUNet(nn.Module):
    """In the style of denoising-diffusion-pytorch."""

    def __init__(self) -> None:
        super().__init__()
        self.init_conv = conv(3, 16, 7)
        self.time_mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 32))
        self.blocks = nn.ModuleList(LucidBlock(16, 32) for _ in range(2))
        self.final_conv = conv(16, 3, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        t, h = self.time_mlp(sinusoid(time, 8)), self.init_conv(x)
        for block in self.blocks:
            h = block(h, t)
        out: Tensor = self.final_conv(h)
        return out


class UnguessableLucidUNet(LucidUNet):
    def forward(self, x: Tensor, time: Tensor, context: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(x + context["shift"], time)


def autoencoder() -> nn.Module:
    from diffusers import AutoencoderKL

    blocks: Any = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, **blocks)


def controlnet() -> nn.Module:
    from diffusers import ControlNetModel

    options: Any = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 8}
    options |= {"conditioning_embedding_out_channels": (4, 8), "attention_head_dim": 4, "layers_per_block": 1}
    return ControlNetModel(block_out_channels=(8, 16), norm_num_groups=4, **options)


def video_unet() -> nn.Module:
    from diffusers import UNetSpatioTemporalConditionModel

    options: Any = {"down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal")}
    options |= {"up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), "layers_per_block": 1}
    options |= {
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24,
        "num_attention_heads": (2, 4),
    }
    return UNetSpatioTemporalConditionModel(block_out_channels=(32, 64), cross_attention_dim=8, **options)


def frames_unet() -> nn.Module:
    from diffusers import UNet3DConditionModel

    options: Any = {"down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"), "layers_per_block": 1}
    options |= {"up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"), "attention_head_dim": 4}
    return UNet3DConditionModel(block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=8, **options)


def kept_as(model: nn.Module, reason: str, **options: Any) -> set[str]:
    report = binarize.plan(model, {"name": "bidiffsr", "groups": 1}, **options)
    assert not any("registered first and last" in note for note in report.notes)
    return {row.name for row in report.kept if reason in row.detail}


@pytest.mark.parametrize(
    ("build", "first", "last"),
    [
        (OutFirst, {"proj_in"}, {"proj_out"}),
        (Unguessable, {"proj_in"}, {"proj_out"}),
        (KDiffusionUNet, {"proj_in"}, {"proj_out"}),
        (NAFNet, {"intro"}, {"ending"}),
        (UnguessableNAFNet, {"intro"}, {"ending"}),
        (ParallelInputs, {"init_conv.0", "init_conv.1", "init_conv.2"}, {"final_conv"}),
        (Pyramid, {"from_image.0", "from_image.1"}, {"to_image.0", "to_image.1"}),
        (autoencoder, {"encoder.conv_in"}, {"decoder.conv_out"}),
        (video_unet, {"conv_in"}, {"conv_out"}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_input_and_output_layers_are_found_by_role(build: Any, first: set[str], last: set[str]) -> None:
    model = build()
    assert kept_as(model, "first convolution") == first
    assert kept_as(model, "last convolution") == last


def test_layers_of_a_class_of_their_own_have_roles() -> None:
    roles = find_host(OwnHeads()).roles(OwnHeads())
    assert (roles.inputs, roles.outputs, roles.by) == (("enter",), ("leave",), "forward")
    replaced = {row.name for row in binarize.plan(OwnHeads(), "bidiffsr").replaced}
    assert replaced == {"body", "tail"}


def test_roles_do_not_depend_on_the_order_of_registration() -> None:
    model, turned = NAFNet(), NAFNet()
    turned._modules = dict(reversed(model._modules.items()))
    assert {r.name for r in binarize.plan(turned, "bnn").kept} == {r.name for r in binarize.plan(model, "bnn").kept}
    assert {r.name for r in binarize.plan(model, "bnn").kept} == {"intro", "ending"}


def test_where_only_order_can_decide_the_report_says_so() -> None:
    report = binarize.plan(Crossed(), "bidiffsr")
    assert any("registered first and last" in note for note in report.notes)
    inputs = {"x": torch.randn(1, 16, 8, 8), "time": torch.ones(1), "context": {"shift": torch.zeros(1)}}
    assert kept_as(Crossed(), "first convolution", example_inputs=inputs) == {"proj_in"}
    assert kept_as(Crossed(), "last convolution", example_inputs=inputs) == {"proj_out"}
    model = Crossed()
    binarize.convert(model, "bidiffsr", example_inputs=inputs)
    assert isinstance(model.body, BinaryConv2d)


def test_example_inputs_run_for_real_where_values_decide_and_must_fit() -> None:
    class Branches(OutFirst):
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return super().forward(x, time) if float(x.sum()) < 1e6 else x

    model = Branches()
    model.register_forward_hook(lambda *_: 1 / 0)  # type: ignore[arg-type, return-value]
    image = torch.randn(2, 3, 8, 8)
    assert kept_as(model, "first convolution", example_inputs=(image, torch.ones(2))) == {"proj_in"}
    before = copy.deepcopy(model.state_dict())
    message = r"Branches cannot run on example_inputs: RuntimeError.*Pass example_inputs that its forward accepts"
    assert_error(message, binarize.convert, model, "bnn", example_inputs=(torch.randn(2, 5, 8, 8), torch.ones(2)))
    assert_error(
        "must be a tensor, a tuple of arguments or a dict; got int", binarize.plan, model, "bnn", example_inputs=3
    )
    assert type(model.body) is nn.Conv2d
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_finding_roles_leaves_the_model_alone() -> None:
    model = LucidUNet().train()
    model.init_conv.weight.requires_grad_(False)
    state = torch.get_rng_state()
    assert find_host(model).roles(model).by == "forward"
    assert model.training
    assert not model.init_conv.weight.requires_grad
    assert model.time_mlp[0].weight.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("build", "embeddings", "binary"),
    [
        (LucidUNet, {"time_mlp.0", "time_mlp.2", "blocks.0.mlp.1", "blocks.1.mlp.1"}, "blocks.0.squeeze.0"),
        (UnguessableLucidUNet, {"time_mlp.0", "time_mlp.2", "blocks.0.mlp.1", "blocks.1.mlp.1"}, "blocks.0.squeeze.0"),
        (KDiffusionUNet, {"mapping.0", "mapping.2", "blocks.0.scale", "blocks.1.scale"}, None),
        (Pyramid, {"Dense_0"}, None),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_time_embeddings_of_every_block_stay_full_precision(build: Any, embeddings: set[str], binary: str) -> None:
    assert kept_as(build(), "time or class embedding", linear=True) == embeddings
    model = binarize.convert(build(), "reactnet", linear=True)
    assert binary is None or isinstance(model.get_submodule(binary), BinaryLinear)


@pytest.mark.parametrize("build", [controlnet, video_unet, frames_unet])
def test_feed_forward_layers_below_attentions_are_reachable(build: Any) -> None:
    report = binarize.plan(build(), "reactnet", linear=True)
    linear = {row.name for row in report.replaced if row.type.startswith("Linear")}
    assert linear
    assert all(".ff." in name or ".ff_in." in name for name in linear)
    projections = {row.name for row in report.kept if row.detail == "attention projection"}
    assert {name.rpartition(".")[2] for name in projections} >= {"to_q", "to_k", "to_v", "0", "proj_in", "proj_out"}
    assert not any(".ff" in row.name for row in report.kept)


@pytest.mark.slow
def test_adapters_and_latent_convolutions_are_kept() -> None:
    model = controlnet()
    zero = kept_as(model, "zero convolution")
    assert zero == {*(f"controlnet_down_blocks.{i}" for i in range(4)), "controlnet_mid_block"}
    condition = kept_as(model, "conditioning input")
    assert condition == {f"controlnet_cond_embedding.{n}" for n in ("conv_in", "blocks.0", "blocks.1", "conv_out")}
    assert kept_as(model, "first convolution") == {"conv_in"}
    latent = {"encoder.conv_out", "quant_conv", "post_quant_conv", "decoder.conv_in"}
    assert kept_as(autoencoder(), "latent code") == latent


def test_layers_that_do_not_run_are_noted() -> None:
    model = OutFirst()
    model.add_module("other", conv(3, 16))
    assert any("1 convolutions, such as other, took no part" in note for note in binarize.plan(model, "bnn").notes)
    assert not any("took no part" in note for note in binarize.plan(OutFirst(), "bnn").notes)


def test_zero_initialized_pointwise_convolutions_are_kept_in_plan_and_conversion() -> None:
    model = OutFirst()
    model.add_module("adapter", conv(16, 16, 1))
    assert "adapter" not in kept_as(copy.deepcopy(model), "")
    nn.init.zeros_(model.get_submodule("adapter").weight)  # type: ignore[arg-type]
    assert kept_as(model, "zero-initialized") == {"adapter"}
    assert type(binarize.convert(model, "bidiffsr").get_submodule("adapter")) is nn.Conv2d
