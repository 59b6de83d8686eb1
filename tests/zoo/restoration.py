"""Networks in the manner of image restoration models: NAFNet, SRDiff, Imagen's parallel inputs, Swin windows."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.parts import sinusoid


class NAFBlock(nn.Module):
    """NAFNet's block with a time MLP: depthwise convolution, product gate, channel attention."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * channels))
        self.conv1 = nn.Conv2d(channels, 2 * channels, 1)
        self.conv2 = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels)
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1))
        self.conv3 = nn.Conv2d(channels, channels, 1)
        self.norm = nn.GroupNorm(1, channels)
        self.beta = nn.Parameter(torch.full((1, channels, 1, 1), 0.5))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        scale, shift = self.mlp(t)[:, :, None, None].chunk(2, dim=1)
        a, b = self.conv2(self.conv1(self.norm(x) * (1 + scale) + shift)).chunk(2, dim=1)
        return x + self.beta * self.conv3(a * b * self.sca(a * b))


class ConditionalNAFNet(nn.Module):
    """IR-SDE's network: ``ending``, the last convolution, is registered second."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.time_mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, 2 * width))
        self.intro = nn.Conv2d(6, width, 3, padding=1)
        self.ending = nn.Conv2d(width, 3, 3, padding=1)
        self.encoders, self.decoders = nn.ModuleList([NAFBlock(width, 2 * width)]), nn.ModuleList([])
        self.downs = nn.ModuleList([nn.Conv2d(width, 2 * width, 2, 2)])
        self.middle_blks = nn.ModuleList([NAFBlock(2 * width, 2 * width)])
        self.ups = nn.ModuleList([nn.Sequential(nn.Conv2d(2 * width, 4 * width, 1, bias=False), nn.PixelShuffle(2))])
        self.decoders.append(NAFBlock(width, 2 * width))

    def forward(self, inp: Tensor, cond: Tensor, time: Tensor) -> Tensor:
        t = self.time_mlp(sinusoid(time, self.width).to(inp.dtype))
        skip = self.encoders[0](self.intro(torch.cat([inp - cond, cond], dim=1)), t)
        h = self.middle_blks[0](self.downs[0](skip), t)
        return self.ending(self.decoders[0](self.ups[0](h) + skip, t))


class SRDiffUNet(nn.Module):
    """SRDiff's network: features of the small image enter by a transposed convolution, ``cond_proj``, not an image."""

    def __init__(self, width: int = 8, features: int = 12) -> None:
        super().__init__()
        self.width = width
        self.cond_proj = nn.ConvTranspose2d(features, width, 4, 2, 1)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width))
        self.final_conv = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.Mish(), nn.Conv2d(width, 3, 1))
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.down, self.up = nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ConvTranspose2d(2 * width, width, 4, 2, 1)
        self.mid = nn.Conv2d(2 * width, 2 * width, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor, cond: Tensor) -> Tensor:
        t = self.mlp(sinusoid(time, self.width).to(x.dtype))[:, :, None, None]
        h = F.mish(self.first(x)) + self.cond_proj(cond) + t
        return self.final_conv(h + self.up(F.mish(self.mid(self.down(h)))))


class CrossEmbedLayer(nn.Module):
    """Imagen's input layer: parallel convolutions of several sizes, concatenated."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        widths = (out // 2, out // 4, out // 4)
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, width, size, padding=size // 2) for width, size in zip(widths, (3, 7, 15), strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([conv(x) for conv in self.convs], dim=1)


class ImagenUnet(nn.Module):
    """Imagen's U-Net in miniature: three parallel input layers; ``time`` is a log-SNR in ``(B,)``."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.init_conv = CrossEmbedLayer(3, width)
        self.to_time_hiddens = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU())
        self.to_time_cond = nn.Linear(4 * width, width)
        self.downs = nn.ModuleList([nn.Conv2d(width, 2 * width, 4, 2, 1)])
        self.mid_block1 = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.ups = nn.ModuleList([nn.Conv2d(2 * width, 4 * width, 1)])
        self.final_conv = nn.Conv2d(2 * width, 3, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        t = self.to_time_cond(self.to_time_hiddens(sinusoid(time, self.width).to(x.dtype)))[:, :, None, None]
        skip = self.init_conv(x) + t
        h = F.pixel_shuffle(self.ups[0](F.silu(self.mid_block1(F.silu(self.downs[0](skip))))), 2)
        return self.final_conv(torch.cat([h, skip], dim=1))


class WindowMixer(nn.Module):
    """Swin's window attention with convolutions: 4x4 windows are folded into the batch."""

    def __init__(self, channels: int, window: int = 4) -> None:
        super().__init__()
        self.window = window
        self.qkv, self.proj = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)
        self.mlp = nn.Sequential(nn.Conv2d(channels, 2 * channels, 1), nn.GELU(), nn.Conv2d(2 * channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        n = self.window
        windows = x.reshape(b, c, h // n, n, w // n, n).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, n, n)
        q, k, v = self.qkv(windows).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0].transpose(1, 2)
        windows = windows + self.proj(mixed.reshape(windows.shape))
        windows = windows + self.mlp(windows)
        return windows.reshape(b, h // n, w // n, c, n, n).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


class SwinUNet(nn.Module):
    """ResShift's U-Net in miniature: window attention between residual convolutions."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.time_embed = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
        self.input_blocks = nn.ModuleList([nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, 2, 1)])
        self.middle_block = WindowMixer(width)
        self.output_blocks = nn.ModuleList([nn.Conv2d(2 * width, width, 3, padding=1)])
        self.out = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        emb = self.time_embed(sinusoid(timesteps, self.width).to(x.dtype))[:, :, None, None]
        skip = self.input_blocks[0](x) + emb
        h = F.interpolate(self.middle_block(self.input_blocks[1](skip)), scale_factor=2)
        return self.out(self.output_blocks[0](torch.cat([h, skip], dim=1)))
