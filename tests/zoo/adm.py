"""A network in the manner of guided-diffusion (ADM): its module names, argument names and conventions."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.parts import norm, sinusoid, zeroed


class Recomputed(torch.autograd.Function):
    """Gradient checkpointing by an autograd function of one's own, which keeps inputs and runs the block again."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], count: int, *tensors: Tensor) -> Tensor:
        ctx.run, ctx.count = run, count
        ctx.save_for_backward(*tensors)
        with torch.no_grad():
            return run(*tensors[:count])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        saved = ctx.saved_tensors
        inputs = [tensor.detach().requires_grad_() for tensor in saved[: ctx.count]]
        with torch.enable_grad():
            out = ctx.run(*inputs)
        wanted = (*inputs, *saved[ctx.count :])
        return None, None, *torch.autograd.grad(out, wanted, gradient, allow_unused=True)


class TimestepEmbedSequential(nn.Sequential):
    """Passes the time embedding to its residual blocks."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ADMResBlock) else layer(x)
        return x


class ADMResBlock(nn.Module):
    """guided-diffusion's residual block: scale-shift norm, zero-initialized last convolution, resampling inside."""

    def __init__(self, channels: int, out: int, emb: int, up: bool = False, down: bool = False) -> None:
        super().__init__()
        self.recomputes = False
        self.in_layers = nn.Sequential(norm(channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * out))
        last = zeroed(nn.Conv2d(out, out, 3, padding=1))
        self.out_layers = nn.Sequential(norm(out), nn.SiLU(), nn.Dropout(0.0), last)
        self.skip_connection = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)
        self.resample: nn.Module = nn.Upsample(scale_factor=2) if up else nn.AvgPool2d(2) if down else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.recomputes and torch.is_grad_enabled():
            return Recomputed.apply(self.transform, 2, x, emb, *self.parameters())  # type: ignore[no-any-return, no-untyped-call]
        return self.transform(x, emb)

    def transform(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[2](self.resample(self.in_layers[:2](x)))
        scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        return self.skip_connection(self.resample(x)) + h


class AttentionBlock(nn.Module):
    """guided-diffusion's self-attention: 1-D convolutions of kernel size 1 over the flattened image, recomputed."""

    def __init__(self, channels: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.recomputes = False
        self.norm = norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.recomputes and torch.is_grad_enabled():
            return Recomputed.apply(self.attend, 1, x, *self.parameters())  # type: ignore[no-any-return, no-untyped-call]
        return self.attend(x)

    def attend(self, x: Tensor) -> Tensor:
        batch, channels, *spatial = x.shape
        flat = x.reshape(batch, channels, -1)
        q, k, v = self.qkv(self.norm(flat)).reshape(batch * self.heads, -1, flat.shape[2]).chunk(3, dim=1)
        weight = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(q.shape[1]), dim=-1)
        h = (v @ weight.transpose(1, 2)).reshape(batch, channels, -1)
        return (flat + self.proj_out(h)).reshape(batch, channels, *spatial)


class ADMUNet(nn.Module):
    """A U-Net in guided-diffusion's style; ``attention`` lists the levels that have it, 0 being the finest."""

    def __init__(
        self, width: int = 8, mults: tuple[int, ...] = (1, 2), blocks: int = 1, attention: tuple[int, ...] = (1,),
        classes: int = 3, head_width: int = 8,
    ) -> None:  # fmt: skip
        super().__init__()
        emb = 4 * width
        self.width = width
        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label_emb = nn.Embedding(classes, emb)
        widths = [width * mult for mult in mults]

        def block(channels: int, out: int, level: int) -> list[nn.Module]:
            layers: list[nn.Module] = [ADMResBlock(channels, out, emb)]
            return [*layers, AttentionBlock(out, out // head_width)] if level in attention else layers

        down: list[list[nn.Module]] = [[nn.Conv2d(3, width, 3, padding=1)]]
        skips, channels = [width], width
        for level, out in enumerate(widths):
            for _ in range(blocks):
                down.append(block(channels, out, level))
                channels = out
                skips.append(channels)
            if level < len(widths) - 1:
                down.append([ADMResBlock(channels, channels, emb, down=True)])
                skips.append(channels)
        middle = [*block(channels, channels, min(attention)), ADMResBlock(channels, channels, emb)]
        up: list[list[nn.Module]] = []
        for level, out in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                up.append(block(channels + skips.pop(), out, level))
                channels = out
            if level:
                up[-1].append(ADMResBlock(channels, channels, emb, up=True))
        self.input_blocks = nn.ModuleList(TimestepEmbedSequential(*layers) for layers in down)
        self.middle_block = TimestepEmbedSequential(*middle)
        self.output_blocks = nn.ModuleList(TimestepEmbedSequential(*layers) for layers in up)
        self.out = nn.Sequential(norm(width), nn.SiLU(), zeroed(nn.Conv2d(width, 3, 3, padding=1)))

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        emb = self.time_embed(sinusoid(timesteps, self.width).to(x.dtype))
        if y is not None:
            emb = emb + self.label_emb(y)
        skips = []
        for block in self.input_blocks:
            x = block(x, emb)
            skips.append(x)
        x = self.middle_block(x, emb)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), emb)
        return self.out(x)
