"""Tiny networks of every family that `binarize.convert` supports, and helpers of their tests."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo.adm import ADMUNet
from zoo.sr3 import SR3UNet

from binarize.layers import BinaryConv2d, BinaryLinear

SIZE = 16
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class ZooHost:
    """One family, by a function that builds its network and one that makes inputs of a batch size."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    timed: bool = True  # its forward takes a timestep
    kept: tuple[str, ...] = ("conv_in", "conv_out")  # full precision by default, besides attention
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of `convert`
    form: str | None = None  # that the structure pass gives it, or None if it cannot be rewired
    library: str = "torch"


def _image(batch: int, channels: int = 3, size: int = SIZE) -> Tensor:
    return torch.randn(batch, channels, size, size)


def _timesteps(batch: int) -> Tensor:
    return torch.linspace(3, 990, batch).long()


def _timed(batch: int) -> Inputs:
    return (_image(batch), _timesteps(batch)), {}


def _labelled(batch: int) -> Inputs:
    return (_image(batch), _timesteps(batch)), {"y": torch.arange(batch) % 3}


def _conditioned(batch: int) -> Inputs:
    return (_image(batch, 4), _timesteps(batch)), {"encoder_hidden_states": torch.randn(batch, 5, 8)}


def _classified(size: int) -> Callable[[int], Inputs]:
    return lambda batch: ((_image(batch, size=size),), {})


def _unet(name: str, widths: tuple[int, ...], down: list[str], **options: Any) -> nn.Module:
    import diffusers

    up = [block.replace("Down", "Up") for block in reversed(down)]
    settings: dict[str, Any] = {"sample_size": SIZE, "block_out_channels": widths, "layers_per_block": 1}
    settings |= {"norm_num_groups": 4, "attention_head_dim": 4, "down_block_types": down, "up_block_types": up}
    return getattr(diffusers, name)(**{**settings, **options})


def unet2d(widths: tuple[int, ...], attention: tuple[int, ...] = (), **options: Any) -> nn.Module:
    """Return a UNet2DModel; ``attention`` lists the levels that have it."""
    down = ["AttnDownBlock2D" if i in attention else "DownBlock2D" for i in range(len(widths))]
    return _unet("UNet2DModel", widths, down, **options)


def unet2d_condition(widths: tuple[int, ...] = (8, 16), **options: Any) -> nn.Module:
    """Return a UNet2DConditionModel with Stable Diffusion's blocks: cross-attention everywhere but in the coarsest."""
    down = [*["CrossAttnDownBlock2D"] * (len(widths) - 1), "DownBlock2D"]
    return _unet("UNet2DConditionModel", widths, down, **{"cross_attention_dim": 8, **options})


def srunet() -> nn.Module:
    """Return SRUNet in SR3's structure."""
    from binarize.models import SRUNet

    options: dict[str, Any] = {"base_channels": 8, "channel_mults": (1, 2), "res_blocks": 1, "norm_groups": 4}
    return SRUNet(resampling="conv", fusion="wide", dropout=0.0, num_train_timesteps=1000, **options)


def resnet18() -> nn.Module:
    """Return torchvision's ResNet-18 for five classes without its last stage, which holds three quarters of it."""
    import torchvision

    model = torchvision.models.resnet18(weights=None)
    model.layer4, model.fc = nn.Identity(), nn.Linear(256, 5)
    return model


def _timm(name: str, **options: Any) -> nn.Module:
    """Return timm's network, made narrower and shallower by the options."""
    import timm

    return timm.create_model(name, pretrained=False, num_classes=5, **options)


convnext = partial(_timm, "convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
vit = partial(_timm, "vit_tiny_patch16_224", img_size=SIZE, patch_size=4, depth=2, embed_dim=24, num_heads=3)
RESNETS = {"downsample_type": "resnet", "upsample_type": "resnet"}
HOSTS: dict[str, ZooHost] = {
    "srunet": ZooHost(srunet, lambda batch: ((_image(batch), _timesteps(batch), _image(batch)), {}), form="published"),
    "ddpm_cifar": ZooHost(lambda: unet2d((8, 16, 16), (1,)), _timed, form="contract"),
    "unet2d_attention": ZooHost(lambda: unet2d((8, 16), (0, 1)), _timed, form="published"),
    "unet2d_odd_widths": ZooHost(lambda: unet2d((8, 20)), _timed, form="contract"),
    "unet2d_resnet_sampling": ZooHost(partial(unet2d, (8, 16), (0, 1), **RESNETS), _timed, form="contract"),
    "stable_diffusion": ZooHost(unet2d_condition, _conditioned, form="published", options={"linear": True}),
    "adm": ZooHost(ADMUNet, _labelled, kept=("input_blocks.0.0", "out.2")),
    "sr3": ZooHost(SR3UNet, _timed, kept=("downs.0", "final_conv.2")),
    "resnet18": ZooHost(resnet18, _classified(32), timed=False, kept=("conv1",), library="torchvision"),
    "convnext": ZooHost(convnext, _classified(32), False, ("stem.0",), library="timm"),
    "vit": ZooHost(vit, _classified(SIZE), False, ("patch_embed.proj",), {"linear": True}, library="timm"),
}


def output_of(model: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    """Run a host and return its prediction."""
    out = model(*inputs[0], **inputs[1])
    return out if isinstance(out, Tensor) else out.sample


def built(name: str) -> tuple[ZooHost, nn.Module]:
    """Return a host of the zoo and a new network, or skip the test if its library is not installed."""
    pytest.importorskip(HOSTS[name].library)
    return HOSTS[name], HOSTS[name].build()


def recorded(model: nn.Module, inputs: Inputs) -> tuple[dict[str, tuple[int, ...]], Tensor]:
    """Run a host and return the shape of every module's output by name ("" for the model's own), and its output."""
    shapes: dict[str, tuple[int, ...]] = {}

    def record(name: str, module: nn.Module, args: Any, out: Any) -> None:
        out = out[0] if isinstance(out, tuple) else getattr(out, "sample", out)
        if isinstance(out, Tensor):
            shapes[name] = tuple(out.shape)

    handles = [module.register_forward_hook(partial(record, name)) for name, module in model.named_modules()]
    out = output_of(model, inputs)
    for handle in handles:
        handle.remove()
    return shapes, out


def shapes_of(model: nn.Module, inputs: Inputs) -> dict[str, tuple[int, ...]]:
    with torch.no_grad():
        return recorded(model, inputs)[0]


def is_block(module: nn.Module) -> bool:
    return any(module.children()) and not isinstance(module, BinaryConv2d | BinaryLinear)


def state_of(model: nn.Module) -> tuple[Any, ...]:
    """Return everything that a failed conversion must not change."""
    modules = {name: (id(m), m.training) for name, m in model.named_modules(remove_duplicate=False)}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    parameters = {name: (id(p), p._version) for name, p in model.named_parameters(remove_duplicate=False)}
    config = dict(model.config) if hasattr(model, "config") else None  # type: ignore[arg-type]
    return modules, hooks, parameters, list(model.state_dict()), config, sorted(vars(model))
