"""Networks in the style of guided-diffusion (ADM) and of SR3: their module names, argument names and conventions."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoid(timesteps: Tensor, width: int) -> Tensor:
    """Return ``(B, width)`` sines and cosines of the timesteps ``(B,)``."""
    rates = torch.exp(-math.log(10000) * torch.arange(width // 2, device=timesteps.device) / (width // 2))
    angles = timesteps.float().reshape(-1, 1) * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def zeroed(layer: nn.Module) -> nn.Module:
    """Set a layer's parameters to zero, as guided-diffusion does with the last layer of a branch."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


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
        self.in_layers = nn.Sequential(nn.GroupNorm(4, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * out))
        last = zeroed(nn.Conv2d(out, out, 3, padding=1))
        self.out_layers = nn.Sequential(nn.GroupNorm(4, out), nn.SiLU(), nn.Dropout(0.0), last)
        self.skip_connection = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)
        self.resample: nn.Module = nn.Upsample(scale_factor=2) if up else nn.AvgPool2d(2) if down else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[2](self.resample(self.in_layers[:2](x)))
        scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        return self.skip_connection(self.resample(x)) + h


class AttentionBlock(nn.Module):
    """guided-diffusion's self-attention: 1-D convolutions of kernel size 1 over the flattened image."""

    def __init__(self, channels: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(4, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, *spatial = x.shape
        flat = x.reshape(batch, channels, -1)
        q, k, v = self.qkv(self.norm(flat)).reshape(batch * self.heads, -1, flat.shape[2]).chunk(3, dim=1)
        weight = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(q.shape[1]), dim=-1)
        h = (v @ weight.transpose(1, 2)).reshape(batch, channels, -1)
        return (flat + self.proj_out(h)).reshape(batch, channels, *spatial)


class ADMUNet(nn.Module):
    """A U-Net in guided-diffusion's style: its module names, argument names and conventions."""

    def __init__(self, width: int = 8, classes: int = 3) -> None:
        super().__init__()
        emb, wide = 4 * width, 2 * width
        self.width = width
        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label_emb = nn.Embedding(classes, emb)
        down = [
            [nn.Conv2d(3, width, 3, padding=1)],
            [ADMResBlock(width, width, emb)],
            [ADMResBlock(width, width, emb, down=True)],
            [ADMResBlock(width, wide, emb), AttentionBlock(wide)],
        ]
        middle = [ADMResBlock(wide, wide, emb), AttentionBlock(wide), ADMResBlock(wide, wide, emb)]
        up = [
            [ADMResBlock(2 * wide, wide, emb), AttentionBlock(wide)],
            [ADMResBlock(wide + width, wide, emb), ADMResBlock(wide, wide, emb, up=True)],
            [ADMResBlock(wide + width, width, emb)],
            [ADMResBlock(width + width, width, emb)],
        ]
        self.input_blocks = nn.ModuleList(TimestepEmbedSequential(*layers) for layers in down)
        self.middle_block = TimestepEmbedSequential(*middle)
        self.output_blocks = nn.ModuleList(TimestepEmbedSequential(*layers) for layers in up)
        self.out = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), zeroed(nn.Conv2d(width, 3, 3, padding=1)))

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


class SelfAttention(nn.Module):
    """SR3's self-attention: 1x1 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)
        return x + self.out(y.transpose(1, 2).reshape(x.shape))


class ResnetBlocWithAttn(nn.Module):
    """SR3's residual block: a linear layer for the noise level, and self-attention."""

    def __init__(self, channels: int, out: int, level: int) -> None:
        super().__init__()
        self.noise_func = nn.Linear(level, out)
        self.block1, self.block2 = nn.Conv2d(channels, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.res_conv, self.attn = nn.Conv2d(channels, out, 1), SelfAttention(out)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        h = F.silu(self.block1(x) + self.noise_func(level)[:, :, None, None])
        return self.attn(self.block2(h) + self.res_conv(x))


class SR3UNet(nn.Module):
    """A U-Net of two levels in SR3's style."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.noise_level_mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
        self.downs = nn.ModuleList([nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, 2, 1)])
        self.mid = ResnetBlocWithAttn(width, 2 * width, width)
        self.ups = ResnetBlocWithAttn(3 * width, width, width)
        self.final_conv = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        level = self.noise_level_mlp(sinusoid(time, self.width).to(x.dtype))
        skip = self.downs[0](x)
        x = F.interpolate(self.mid(self.downs[1](skip), level), scale_factor=2)
        return self.final_conv(self.ups(torch.cat([x, skip], 1), level))
