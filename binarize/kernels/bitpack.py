"""Where the bits of a filter are: dense in a file, in words of 32 input channels for 16 output channels in memory.

In a file, the weights of a layer are one run of bits in the order of the weight tensor ``(C_out, C_in / groups, kh,
kw)``, most significant bit first, 1 for +1. So a width that is no multiple of a word costs nothing.

In memory, a filter's word holds 32 input channels of one kernel tap, and words of 16 output channels stand side by
side: ``(groups * blocks, kh * kw * words, 16)`` int32. The product reads them as one vector and broadcasts the word of
a pixel against it. 32 bits rather than 64 since CP-Down convolves 32 channels, and half of a longer word would be idle;
vector instructions count both at the same speed. Layers that no kernel computes keep the form of the file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

WORD, LANES = 32, 16


@dataclass(frozen=True)
class FilterShape:
    """The shape of a layer's filters."""

    out_channels: int  # C_out
    in_channels: int  # C_in of one group
    kernel: tuple[int, int]  # (kh, kw)
    groups: int = 1  # of the convolution
    bases: int = 1  # how many scaled binary filters add up

    @property
    def weights(self) -> int:
        """How many weights a basis has."""
        return self.out_channels * self.in_channels * self.kernel[0] * self.kernel[1]

    @property
    def words(self) -> int:
        """Words of one kernel tap."""
        return math.ceil(self.in_channels / WORD)

    @property
    def blocks(self) -> int:
        """Blocks of 16 output channels of a group."""
        return math.ceil(self.out_channels // self.groups / LANES)

    @property
    def lanes(self) -> int:
        """Output channels in memory, padded to whole blocks."""
        return self.groups * self.blocks * LANES

    @property
    def dense(self) -> tuple[int, int]:
        """Shape of the bits in a file, uint8."""
        return self.bases, math.ceil(self.weights / 8)

    @property
    def memory(self) -> tuple[int, int, int, int]:
        """Shape of the words in memory, int32."""
        return self.bases, self.groups * self.blocks, self.kernel[0] * self.kernel[1] * self.words, LANES


def to_dense(words: Tensor, shape: FilterShape) -> Tensor:
    """Return the bits as a file has them, uint8 ``shape.dense``, of words as memory has them."""
    if words.is_meta:
        return torch.empty(shape.dense, dtype=torch.uint8, device="meta")
    return join_bytes(to_bits(words, shape))


def join_bytes(bits: Tensor) -> Tensor:
    """Return bits as a file has them, uint8 ``(bases, ceil(weights / 8))``, of uint8 bits ``(bases, ...)``."""
    flat = F.pad(bits.reshape(len(bits), -1), (0, -bits[0].numel() % 8))
    place = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=bits.device)
    return (flat.view(len(bits), -1, 8) * place).sum(-1, dtype=torch.uint8)


def from_dense(dense: Tensor, shape: FilterShape) -> Tensor:
    """Return the words as memory has them, int32 ``shape.memory``, of bits as a file has them."""
    if dense.is_meta:
        return torch.empty(shape.memory, dtype=torch.int32, device="meta")
    return from_bits(split_bytes(dense, shape), shape)


def split_bytes(dense: Tensor, shape: FilterShape) -> Tensor:
    """Return uint8 bits ``(bases, C_out, C_in / groups, kh, kw)`` of bits as a file has them."""
    place = torch.arange(7, -1, -1, dtype=torch.uint8, device=dense.device)
    bits = (dense.unsqueeze(-1) >> place & 1).reshape(shape.bases, -1)[:, : shape.weights]
    return bits.view(shape.bases, shape.out_channels, shape.in_channels, *shape.kernel)


def dense_codes(dense: Tensor, shape: FilterShape, dtype: torch.dtype) -> Tensor:
    """Return weights in {-1, +1}, ``(bases, C_out, C_in / groups, kh, kw)``, of bits as a file has them.

    A table of the 256 bytes makes it one pass over memory.
    """
    octets = torch.arange(256, dtype=torch.uint8, device=dense.device)
    table = 2 * split_bytes(octets.unsqueeze(0), FilterShape(256, 8, (1, 1))).view(256, 8).to(dtype) - 1
    codes = F.embedding(dense.int(), table).flatten(1)[:, : shape.weights]
    return codes.reshape(shape.bases, shape.out_channels, shape.in_channels, *shape.kernel)


def from_bits(bits: Tensor, shape: FilterShape) -> Tensor:
    """Return words, int32 ``shape.memory``, of uint8 bits ``(bases, C_out, C_in / groups, kh, kw)``; padding is 0."""
    n, group_out = shape.bases, shape.out_channels // shape.groups
    kh, kw = shape.kernel
    bits = bits.reshape(n, shape.groups, group_out, shape.in_channels, kh * kw)
    bits = F.pad(bits, (0, 0, 0, -shape.in_channels % WORD, 0, -group_out % LANES))
    bits = bits.view(n, shape.groups, shape.blocks, LANES, shape.words, WORD, kh * kw)
    bits = bits.permute(0, 1, 2, 6, 4, 3, 5).reshape(*shape.memory, WORD)
    return join_words(bits)


def to_bits(words: Tensor, shape: FilterShape) -> Tensor:
    """Return bits ``(bases, C_out, C_in / groups, kh, kw)`` uint8 of words: the inverse of `from_bits`."""
    kh, kw = shape.kernel
    place = torch.arange(WORD, dtype=torch.int32, device=words.device)
    bits = (words.unsqueeze(-1) >> place & 1).to(torch.uint8)
    bits = bits.view(shape.bases, shape.groups, shape.blocks, kh * kw, shape.words, LANES, WORD)
    bits = bits.permute(0, 1, 2, 5, 4, 6, 3)
    bits = bits.reshape(shape.bases, shape.groups, shape.blocks * LANES, shape.words * WORD, kh, kw)
    bits = bits[:, :, : shape.out_channels // shape.groups, : shape.in_channels]
    return bits.reshape(shape.bases, shape.out_channels, shape.in_channels, kh, kw)


def join_words(bits: Tensor) -> Tensor:
    """Return int32 ``(...)`` of bits ``(..., 32)`` uint8; element i becomes bit i."""
    place = torch.arange(8, dtype=torch.uint8, device=bits.device)
    octets = (bits.reshape(*bits.shape[:-1], 4, 8) << place).sum(-1, dtype=torch.uint8)
    return octets.contiguous().view(torch.int32).squeeze(-1)  # little-endian, as every machine torch runs on
