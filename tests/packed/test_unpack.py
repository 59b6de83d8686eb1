"""binarize.unpack with random latent weights, beside what tests/methods checks for every method."""

import pytest
import torch
from packed_case import SMALL, network

import binarize
from binarize.conversion.export import binary_layers, packed_layers
from binarize.errors import BinarizeError


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_random_latents_in_half_precision(dtype: torch.dtype) -> None:
    packed = binarize.pack(network("bidiffsr", **SMALL)).to(dtype)
    expected = {name: (layer.codes(), layer.weight_scales()) for name, layer in packed_layers(packed)}
    for name, layer in binary_layers(binarize.unpack(packed, latents="random")):
        weight = layer.binary_weight()
        assert torch.equal(weight.codes.to(torch.int8), expected[name][0])
        torch.testing.assert_close(weight.scales, expected[name][1], rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_latents_of_an_unknown_kind() -> None:
    packed = binarize.pack(network("bidiffsr", **SMALL))
    with pytest.raises(BinarizeError, match=r"unpack: latents='ones'; allowed: 'signs' and 'random'\."):
        binarize.unpack(packed, latents="ones")
    assert binarize.is_packed(packed)
