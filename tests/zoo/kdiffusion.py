"""A network in the manner of k-diffusion: ``proj_out`` before the blocks, a mapping network, adaptive group norm."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.parts import FourierFeatures, zeroed


class AdaGN(nn.Module):
    """Group normalization whose scale and shift are a linear function of the conditioning."""

    def __init__(self, features: int, channels: int) -> None:
        super().__init__()
        self.mapper = zeroed(nn.Linear(features, 2 * channels))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        scale, shift = self.mapper(cond)[:, :, None, None].chunk(2, dim=1)
        return F.group_norm(x, 4) * (1 + scale) + shift


class ResConvBlock(nn.Module):
    def __init__(self, features: int, channels: int, out: int) -> None:
        super().__init__()
        self.norm0, self.conv0 = AdaGN(features, channels), nn.Conv2d(channels, out, 3, padding=1)
        self.norm1, self.conv1 = AdaGN(features, out), nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1, bias=False)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        h = self.conv0(F.gelu(self.norm0(x, cond)))
        return self.conv1(F.gelu(self.norm1(h, cond))) + self.skip(x)


class SelfAttention2d(nn.Module):
    def __init__(self, features: int, channels: int) -> None:
        super().__init__()
        self.norm_in = AdaGN(features, channels)
        self.qkv_proj, self.out_proj = nn.Conv2d(channels, 3 * channels, 1), zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(self.norm_in(x, cond)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.out_proj(h.transpose(1, 2).reshape(x.shape))


class KUNet(nn.Module):
    """The inner model: ``sigma`` is ``(B,)``, its logarithm the conditioning; ``proj_out`` is registered early."""

    def __init__(self, channels: int = 3, width: int = 8) -> None:
        super().__init__()
        features, wide = 4 * width, 2 * width
        self.timestep_embed = FourierFeatures(features)
        self.mapping = nn.Sequential(nn.Linear(features, features), nn.GELU(), nn.Linear(features, features), nn.GELU())
        self.proj_in = nn.Conv2d(channels, width, 1)
        self.proj_out = zeroed(nn.Conv2d(width, channels, 1))
        self.d_blocks = nn.ModuleList([ResConvBlock(features, width, width), ResConvBlock(features, width, wide)])
        self.attention = SelfAttention2d(features, wide)
        self.u_blocks = nn.ModuleList([ResConvBlock(features, wide, wide), ResConvBlock(features, wide + width, width)])

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        c_noise = (sigma.log() / 4).to(x.dtype)
        cond = self.mapping(self.timestep_embed(c_noise))
        skip = self.d_blocks[0](self.proj_in(x), cond)
        h = self.attention(self.d_blocks[1](F.avg_pool2d(skip, 2), cond), cond)
        h = F.interpolate(self.u_blocks[0](h, cond), scale_factor=2)
        return self.proj_out(self.u_blocks[1](torch.cat([h, skip], 1), cond))


class KDenoiser(nn.Module):
    """k-diffusion's wrapper: scales by ``sigma`` around the inner model."""

    def __init__(self, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.inner_model, self.sigma_data = KUNet(), sigma_data

    def forward(self, input: Tensor, sigma: Tensor) -> Tensor:
        s = sigma.reshape(-1, 1, 1, 1)
        total = s**2 + self.sigma_data**2
        inner = self.inner_model(input / total.sqrt(), sigma)
        return inner * s * self.sigma_data / total.sqrt() + input * self.sigma_data**2 / total
