"""A network in the manner of NCSN++: NIN layers, Dense time layers, image heads, everything in one ModuleList."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.parts import FourierFeatures, zeroed


class NIN(nn.Module):
    """A linear layer over channels, ``(B, in, H, W)`` to ``(B, out, H, W)``; the weight ``W`` is (in, out)."""

    def __init__(self, channels: int, out: int, scale: float = 0.1) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(channels, out) * scale)
        self.b = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tensordot(x.permute(0, 2, 3, 1), self.W, dims=1) + self.b
        return y.permute(0, 3, 1, 2)


class AttnBlockpp(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.GroupNorm_0 = nn.GroupNorm(4, channels)
        self.NIN_0, self.NIN_1, self.NIN_2 = (NIN(channels, channels) for _ in range(3))
        self.NIN_3 = NIN(channels, channels, scale=0.0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.GroupNorm_0(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (self.NIN_0, self.NIN_1, self.NIN_2))
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return (x + self.NIN_3(h.transpose(1, 2).reshape(x.shape))) / 2**0.5


class ResnetBlockDDPMpp(nn.Module):
    def __init__(self, channels: int, out: int, temb: int) -> None:
        super().__init__()
        self.GroupNorm_0, self.Conv_0 = nn.GroupNorm(4, channels), nn.Conv2d(channels, out, 3, padding=1)
        self.Dense_0 = nn.Linear(temb, out)
        self.GroupNorm_1, self.Conv_1 = nn.GroupNorm(4, out), zeroed(nn.Conv2d(out, out, 3, padding=1))
        self.NIN_0 = NIN(channels, out) if channels != out else None

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.Conv_0(F.silu(self.GroupNorm_0(x))) + self.Dense_0(F.silu(temb))[:, :, None, None]
        h = self.Conv_1(F.silu(self.GroupNorm_1(h)))
        return ((x if self.NIN_0 is None else self.NIN_0(x)) + h) / 2**0.5


class NCSNpp(nn.Module):
    """score_sde's ``NCSNpp(x, time_cond)``: ``time_cond`` is sigma in ``(B,)``; each level reads and writes images.

    All layers are ``all_modules.0`` to ``all_modules.14``, without names: Fourier features, two Dense layers, the
    first convolution, a block, a from-image head of the halved input (combiner), a block with attention, the middle,
    a to-image head at half size, two up blocks, and the last norm and to-image head.
    """

    def __init__(self, channels: int = 3, width: int = 8) -> None:
        super().__init__()
        temb, wide = 4 * width, 2 * width
        self.all_modules = nn.ModuleList(
            [
                FourierFeatures(width),
                nn.Linear(width, temb),
                nn.Linear(temb, temb),
                nn.Conv2d(channels, width, 3, padding=1),
                ResnetBlockDDPMpp(width, width, temb),
                nn.Conv2d(channels, width, 1),
                ResnetBlockDDPMpp(width, wide, temb),
                AttnBlockpp(wide),
                ResnetBlockDDPMpp(wide, wide, temb),
                nn.GroupNorm(4, wide),
                nn.Conv2d(wide, channels, 3, padding=1),
                ResnetBlockDDPMpp(2 * wide, wide, temb),
                ResnetBlockDDPMpp(wide + width, width, temb),
                nn.GroupNorm(4, width),
                nn.Conv2d(width, channels, 3, padding=1),
            ]
        )

    def forward(self, x: Tensor, time_cond: Tensor) -> Tensor:
        m = self.all_modules
        temb = m[2](F.silu(m[1](m[0](time_cond.log().to(x.dtype)))))
        skip = m[4](m[3](x), temb)
        low = m[7](m[6](F.avg_pool2d(skip, 2) + m[5](F.avg_pool2d(x, 2)), temb))
        h = m[8](low, temb)
        small = m[10](F.silu(m[9](h)))
        h = F.interpolate(m[11](torch.cat([h, low], 1), temb), scale_factor=2)
        h = m[12](torch.cat([h, skip], 1), temb)
        return F.interpolate(small, scale_factor=2) + m[14](F.silu(m[13](h)))
