"""A network in the manner of EDM: layers of classes of its own, and preconditioning by sigma."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.parts import norm, sinusoid


class Linear(nn.Module):
    """A linear layer with its own parameters: ``(B, in)`` to ``(B, out)``."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / in_features**0.5)
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.to(x.dtype).t() + self.bias.to(x.dtype)


class Conv2d(nn.Module):
    """A convolution that is not ``nn.Conv2d``, with resampling by a filter; ``kernel=0`` has only the filter."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        up: bool = False,
        down: bool = False,
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.up, self.down, self.fused_resample = up, down, fused
        scale = (in_channels * max(kernel, 1) ** 2) ** -0.5
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel, kernel) * scale) if kernel else None
        self.bias = nn.Parameter(torch.zeros(out_channels)) if kernel else None
        self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25) if up or down else None)

    def forward(self, x: Tensor) -> Tensor:
        late = self.down and self.fused_resample and self.weight is not None
        if self.up:
            x = F.conv_transpose2d(x, self._filters(x, 4.0), groups=x.shape[1], stride=2)
        if self.down and not late:
            x = F.conv2d(x, self._filters(x, 1.0), groups=x.shape[1], stride=2)
        if self.weight is not None:
            x = F.conv2d(x, self.weight.to(x.dtype), padding=self.weight.shape[-1] // 2)
        if late:
            x = F.conv2d(x, self._filters(x, 1.0), groups=x.shape[1], stride=2)
        return x if self.bias is None else x + self.bias.to(x.dtype)[:, None, None]

    def _filters(self, x: Tensor, gain: float) -> Tensor:
        return (self.resample_filter * gain).to(x.dtype).expand(x.shape[1], 1, 2, 2)


class UNetBlock(nn.Module):
    """EDM's residual block: an affine embedding, resampling in the first convolution and the skip, and attention."""

    def __init__(
        self, channels: int, out: int, emb: int, up: bool = False, down: bool = False, attention: bool = False
    ) -> None:
        super().__init__()
        self.norm0, self.norm1 = norm(channels), norm(out)
        self.conv0 = Conv2d(channels, out, 3, up, down)
        self.affine = Linear(emb, out)
        self.conv1 = Conv2d(out, out, 3)
        resampled = up or down
        kernel = 1 if channels != out else 0
        self.skip = Conv2d(channels, out, kernel, up, down) if kernel or resampled else None
        self.norm2 = norm(out) if attention else None
        self.qkv = Conv2d(out, 3 * out, 1) if attention else None
        self.proj = Conv2d(out, out, 1) if attention else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        h = self.conv1(F.silu(self.norm1(h + self.affine(emb)[:, :, None, None])))
        h = (h + (x if self.skip is None else self.skip(x))) * 0.5**0.5
        if self.qkv is not None and self.proj is not None and self.norm2 is not None:
            q, k, v = self.qkv(self.norm2(h)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
            attended = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
            h = (h + self.proj(attended.transpose(1, 2).reshape(h.shape))) * 0.5**0.5
        return h


class SongUNet(nn.Module):
    """The inner network: ``noise_labels`` is c_noise = ln(sigma) / 4, ``(B,)``."""

    def __init__(
        self, width: int = 8, mults: tuple[int, ...] = (1, 2), blocks: int = 1, attention: tuple[int, ...] = (1,),
        classes: int = 0, size: int = 8,
    ) -> None:  # fmt: skip
        super().__init__()
        self.width, emb = width, 4 * width
        self.map_label = Linear(classes, width) if classes else None
        self.map_layer0, self.map_layer1 = Linear(width, emb), Linear(emb, emb)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        sizes = [f"{size >> level}x{size >> level}" for level in range(len(mults))]
        here, skips = width, []
        for level, (name, mult) in enumerate(zip(sizes, mults, strict=True)):
            if level:
                self.enc[f"{name}_down"] = UNetBlock(here, here, emb, down=True)
            else:
                self.enc[f"{name}_conv"] = Conv2d(3, width, 3)
            skips.append(here)
            for i in range(blocks):
                self.enc[f"{name}_block{i}"] = UNetBlock(here, width * mult, emb, attention=level in attention)
                here = width * mult
                skips.append(here)
        for level, (name, mult) in reversed(list(enumerate(zip(sizes, mults, strict=True)))):
            if level == len(mults) - 1:
                self.dec[f"{name}_in0"] = UNetBlock(here, here, emb, attention=True)
                self.dec[f"{name}_in1"] = UNetBlock(here, here, emb)
            else:
                self.dec[f"{name}_up"] = UNetBlock(here, here, emb, up=True)
            for i in range(blocks + 1):
                self.dec[f"{name}_block{i}"] = UNetBlock(
                    here + skips.pop(), width * mult, emb, attention=level in attention and i == blocks
                )
                here = width * mult
        self.out_norm, self.out_conv = norm(here), Conv2d(here, 3, 3)

    def forward(self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None = None) -> Tensor:
        emb = sinusoid(noise_labels, self.width).to(x.dtype)
        if self.map_label is not None and class_labels is not None:
            emb = emb + self.map_label(class_labels)
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
        skips = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            x = layer(torch.cat([x, skips.pop()], dim=1) if "block" in name else x, emb)
        return self.out_conv(F.silu(self.out_norm(x)))


class EDMPrecond(nn.Module):
    """EDM's denoiser: ``sigma`` in ``(B,)`` scales input, skip and output; ``options`` are those of `SongUNet`."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.sigma_data = 0.5
        self.model = SongUNet(**options)

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        sigma = sigma.to(x.dtype).reshape(-1, 1, 1, 1)
        variance = sigma**2 + self.sigma_data**2
        c_skip, c_out = self.sigma_data**2 / variance, sigma * self.sigma_data / variance.sqrt()
        inner = self.model(x / variance.sqrt(), (sigma.log() / 4).flatten(), class_labels)
        return c_skip * x + c_out * inner
