"""GroupNorm's factors, SiLU and CS-Fusion's shuffle, against torch's own operators and float64."""

from typing import Any

import pytest
import torch
from torch import nn

from binarize.kernels import backends
from binarize.kernels.ops import norm_factors, norm_silu, shuffle

EITHER = ("numba", "torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", EITHER)
def test_norm_and_shuffle_equal_the_modules(backend: Any, dtype: torch.dtype) -> None:
    norm = nn.GroupNorm(4, 32)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x, bias = (3 * torch.randn(2, 32, 9, 7) + 1).to(dtype), torch.randn(2, 32)
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 3e-2}
    with torch.no_grad(), backends.use(backend):
        for shift in (None, bias):
            factors = norm_factors(x, shift, 4, norm.weight, norm.bias, norm.eps)
            wide = x.float() if shift is None else x.float() + shift[:, :, None, None]
            affine = x.float() * factors[0][..., None, None] + factors[1][..., None, None]
            torch.testing.assert_close(affine, norm(wide), **close)
            torch.testing.assert_close(norm_silu(x, factors).float(), nn.functional.silu(norm(wide)), **close)
        bare = norm_factors(x, None, 4, None, None, norm.eps)
        affine = x.float() * bare[0][..., None, None] + bare[1][..., None, None]
        torch.testing.assert_close(affine, nn.functional.group_norm(x.float(), 4), **close)
        for widths in ((32, 32), (64, 32), (6, 10)):
            hidden, skip = (torch.randn(2, width, 5, 19).to(dtype) for width in widths)
            joined = torch.cat([skip, hidden], 1).to(memory_format=torch.channels_last)
            slices = joined[:, widths[1] :], joined[:, : widths[1]]
            for given in ((hidden, skip), slices, (hidden, skip.double()), (hidden[:0], skip[:0])):
                first, second = shuffle(*given)
                assert torch.equal(first, torch.cat([given[0][:, 1::2], given[1][:, ::2]], 1))
                assert torch.equal(second, torch.cat([given[0][:, ::2], given[1][:, 1::2]], 1))


@pytest.mark.parametrize(("channels", "groups"), [(8, 2), (24, 3), (40, 40)])
@pytest.mark.parametrize("mean", [0, 100])
def test_a_norms_factors_are_those_of_float64(mean: float, channels: int, groups: int) -> None:
    x = torch.randn(2, channels, 33, 5) + mean
    with torch.no_grad():
        factors, offsets = norm_factors(x, None, groups, None, None, 1e-5)
    affine = x.double() * factors[..., None, None] + offsets[..., None, None]
    expected = nn.functional.group_norm(x.double(), groups)
    torch.testing.assert_close(affine, expected, rtol=0, atol=1e-5 if mean == 0 else 2e-2)


def test_silu_is_exact_to_a_few_units_in_the_last_place() -> None:
    x = torch.cat([torch.linspace(-80, 80, 2**14), torch.linspace(-1, 1, 2**14 - 16), torch.zeros(16)])
    image, still = x.view(1, 32, 32, 32), torch.stack([torch.ones(1, 32), torch.zeros(1, 32)])
    with torch.no_grad():
        found = norm_silu(image, still)
        torch.testing.assert_close(found.double(), nn.functional.silu(image.double()), rtol=5e-7, atol=0)
        ends = norm_silu(torch.tensor([torch.nan, torch.inf, 1e30, -1e30] * 8).view(1, 32, 1, 1), still)
    limits = torch.tensor([torch.nan, torch.inf, 1e30, 0.0])
    torch.testing.assert_close(ends.flatten()[:4], limits, rtol=0, atol=1e-6, equal_nan=True)
