"""Networks in the manner of SR3 and of Palette, which are conditioned on a noise level instead of a step."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.parts import norm, sinusoid, zeroed


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
    """SR3's residual block: a linear layer for the noise level, and on request self-attention."""

    def __init__(self, channels: int, out: int, level: int, attention: bool = False) -> None:
        super().__init__()
        self.noise_func = nn.Linear(level, out)
        self.block1 = nn.Sequential(norm(channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.block2 = nn.Sequential(norm(out), nn.SiLU(), nn.Conv2d(out, out, 3, padding=1))
        self.res_conv = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)
        self.attn = SelfAttention(out) if attention else nn.Identity()

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        h = self.block1(x) + self.noise_func(level)[:, :, None, None]
        return self.attn(self.block2(h) + self.res_conv(x))


class SR3UNet(nn.Module):
    """A U-Net in SR3's style. ``time`` is the noise level sqrt(alpha_bar), ``(B, 1)``."""

    def __init__(
        self, width: int = 8, mults: tuple[int, ...] = (1, 2), blocks: int = 1, attention: tuple[int, ...] = (1,),
        channels: int = 3,
    ) -> None:  # fmt: skip
        super().__init__()
        self.width = width
        self.noise_level_mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
        downs: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1)]
        skips, here = [width], width
        for level, out in enumerate(width * mult for mult in mults):
            for _ in range(blocks):
                downs.append(ResnetBlocWithAttn(here, out, width, level in attention))
                here = out
                skips.append(here)
            if level < len(mults) - 1:
                downs.append(nn.Conv2d(here, here, 3, 2, 1))
                skips.append(here)
        ups: list[nn.Module] = []
        for level, out in reversed(list(enumerate(width * mult for mult in mults))):
            for _ in range(blocks + 1):
                ups.append(ResnetBlocWithAttn(here + skips.pop(), out, width, level in attention))
                here = out
            if level:
                ups.append(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(here, here, 3, padding=1)))
        middle = width * mults[-1]
        self.downs = nn.ModuleList(downs)
        self.mid = nn.ModuleList(ResnetBlocWithAttn(middle, middle, width, attention) for attention in (True, False))
        self.ups = nn.ModuleList(ups)
        self.final_conv = nn.Sequential(norm(width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        level = self.noise_level_mlp(sinusoid(time, self.width).to(x.dtype))
        skips = []
        for layer in self.downs:
            x = layer(x, level) if isinstance(layer, ResnetBlocWithAttn) else layer(x)
            skips.append(x)
        for layer in self.mid:
            x = layer(x, level)
        for layer in self.ups:
            inner = isinstance(layer, ResnetBlocWithAttn)
            x = layer(torch.cat([x, skips.pop()], dim=1), level) if inner else layer(x)
        return self.final_conv(x)


class PaletteBlock(nn.Module):
    """Palette's residual block: a scale and a shift for each channel from the embedding of gamma."""

    def __init__(self, channels: int, out: int, embedding: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(norm(channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * out))
        self.out_layers = nn.Sequential(norm(out), nn.SiLU(), zeroed(nn.Conv2d(out, out, 3, padding=1)))
        self.skip_connection = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.emb_layers(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.out_layers[0](self.in_layers(x)) * (1 + scale) + shift
        return self.skip_connection(x) + self.out_layers[1:](h)


class PaletteUNet(nn.Module):
    """A U-Net in Palette's style: ``gammas`` (alpha_bar, ``(B,)``) go through ``cond_embed``."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.cond_embed = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))
        self.input_blocks = nn.ModuleList(
            [nn.Conv2d(6, width, 3, padding=1), PaletteBlock(width, 2 * width, 4 * width)]
        )
        self.middle_block = PaletteBlock(2 * width, 2 * width, 4 * width)
        self.output_blocks = nn.ModuleList([PaletteBlock(3 * width, width, 4 * width)])
        self.out = nn.Sequential(norm(width), nn.SiLU(), zeroed(nn.Conv2d(width, 3, 3, padding=1)))

    def forward(self, x: Tensor, gammas: Tensor) -> Tensor:
        embedding = self.cond_embed(sinusoid(gammas.view(-1), self.width).to(x.dtype))
        skip = self.input_blocks[0](x)
        h = F.avg_pool2d(self.input_blocks[1](skip, embedding), 2)
        h = F.interpolate(self.middle_block(h, embedding), scale_factor=2)
        return self.out(self.output_blocks[0](torch.cat([h, skip], 1), embedding))
