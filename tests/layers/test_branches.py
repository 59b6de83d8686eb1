"""The low-rank and sparse branches of BiMaCoSR: their share of the weights, where they read, and the way back."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from errors_case import assert_error
from torch import Tensor, nn

import binarize
from binarize.layers import BinaryConv1d, BinaryConv2d, BinaryConv3d, BinaryLinear
from binarize.methods import get_method

METHOD = get_method("bimacosr", rank=2, density=1.0)
PLAIN: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "3x3": (lambda: nn.Conv2d(6, 8, 3, padding=1), (7, 6)),
    "1x1": (lambda: nn.Conv2d(6, 4, 1), (3, 3)),
    "stride": (lambda: nn.Conv2d(6, 6, 3, stride=2, padding=1), (7, 8)),
    "valid": (lambda: nn.Conv2d(4, 6, (3, 5), stride=(1, 2), dilation=(2, 1)), (9, 9)),
    "even": (lambda: nn.Conv2d(4, 4, 4, stride=4), (8, 12)),
    "wide padding": (lambda: nn.Conv2d(4, 4, 3, stride=2, padding=3), (5, 5)),
    "grouped": (lambda: nn.Conv2d(6, 8, 3, padding=1, groups=2), (5, 5)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), (5, 5)),
    "circular": (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), (5, 5)),
    "1-D": (lambda: nn.Conv1d(4, 6, 5, stride=2, padding=2), (11,)),
    "3-D": (lambda: nn.Conv3d(4, 6, 3, stride=(1, 2, 2), padding=1), (3, 5, 6)),
    "linear": (lambda: nn.Linear(6, 10), (5,)),
}
BINARY: dict[type[nn.Module], Any] = {
    nn.Conv1d: BinaryConv1d, nn.Conv2d: BinaryConv2d, nn.Conv3d: BinaryConv3d, nn.Linear: BinaryLinear
}  # fmt: skip
every_geometry = pytest.mark.parametrize("name", PLAIN)


def built(name: str) -> tuple[Any, Tensor, Any]:
    """Return a plain layer in float64, an input, and its binary form."""
    make, size = PLAIN[name]
    plain = make().double()
    x = torch.randn(2, *size, plain.in_features) if name == "linear" else torch.randn(2, plain.in_channels, *size)
    return plain, x.double(), BINARY[type(plain)].from_float(plain, METHOD).eval()


def central(plain: Any, matrix: Tensor, x: Tensor) -> Tensor:
    """Convolve with a matrix at the central tap of an otherwise empty filter, which torch's own layer does."""
    if isinstance(plain, nn.Linear):
        return F.linear(x, matrix)
    twin = type(plain)(
        plain.in_channels,
        plain.out_channels,
        plain.kernel_size,
        plain.stride,
        plain.padding,
        plain.dilation,
        bias=False,
    ).double()
    with torch.no_grad():
        twin.weight.zero_()
        twin.weight[(slice(None), slice(None), *(k // 2 for k in plain.kernel_size))] = matrix
    return twin(x)


@every_geometry
@torch.no_grad()
def test_a_branch_adds_its_matrix_at_the_central_tap(name: str) -> None:
    plain, x, layer = built(name)
    branch = layer.branch
    image = x.unsqueeze(2) if name == "1-D" else x
    y = layer(x)
    without = torch.zeros_like(y.unsqueeze(2) if name == "1-D" else y)
    dense = torch.zeros(branch.widths[1] * branch.widths[0], dtype=torch.float64)
    dense[branch.indices.long()] = branch.values
    matrix = dense.view(branch.widths[1], branch.widths[0]) + branch.up @ branch.down
    found = branch(without, image)
    torch.testing.assert_close(found.squeeze(2) if name == "1-D" else found, central(plain, matrix, x))
    alone = type(layer).from_float(plain, METHOD, parts={**parts_of(layer), "branch": None})
    alone.weight = layer.weight
    torch.testing.assert_close(y, alone.eval()(x) + central(plain, matrix, x))


def parts_of(layer: Any) -> dict[Any, Any]:
    names = ("pre", "activation", "scale", "norm", "post", "shortcut", "branch")
    return {**{name: getattr(layer, name) for name in names}, "weight": layer.weight_binarizer}


@every_geometry
@torch.no_grad()
def test_the_branch_and_the_latents_add_up_to_the_weights(name: str) -> None:
    plain, _, layer = built(name)
    weight = plain.weight.clone()
    torch.testing.assert_close(layer.to_float().weight, weight)
    assert layer.weight is not plain.weight
    torch.testing.assert_close(plain.weight, weight, rtol=0, atol=0)

    matrix = weight.flatten(2).mean(2).numpy() if weight.dim() > 2 else weight.numpy()
    groups = getattr(plain, "groups", 1)
    entries = max(layer.widths)
    cut = np.sort(np.abs(matrix).ravel())[::-1][min(entries, matrix.size) - 1]
    sparse = np.where(np.abs(matrix) >= cut, matrix, 0)
    rest = matrix - sparse / max(1, weight[0, 0].numel())
    whole = np.zeros((layer.widths[1], layer.widths[0]))
    rows, columns = layer.widths[1] // groups, layer.widths[0] // groups
    for g in range(groups):
        whole[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] = rest[g * rows : (g + 1) * rows]
    u, s, vh = np.linalg.svd(whole, full_matrices=False)
    low_rank = (u[:, :2] * s[:2]) @ vh[:2]
    np.testing.assert_allclose(layer.branch.up @ layer.branch.down, low_rank, atol=1e-12)
    np.testing.assert_allclose(np.sort(layer.branch.values), np.sort(sparse[sparse != 0]), atol=1e-12)
    for factor in (layer.branch.up.T @ layer.branch.up, layer.branch.down @ layer.branch.down.T):
        np.testing.assert_allclose(factor, np.diag(s[:2]), atol=1e-12)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = (nn.Conv2d(*c, 3, padding=1) for c in ((3, 8), (8, 8), (8, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


def test_a_reverted_network_has_its_weights_back_and_a_failed_conversion_changes_none() -> None:
    net, x = Net().double(), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    before = {name: (id(p), p.clone()) for name, p in net.named_parameters()}
    broken = {"middle": {"name": "bimacosr", "post": {"name": "relu", "nothing": 1}}}
    assert_error("unknown option 'nothing'", binarize.convert, net, "bimacosr", overrides=broken, keep="first")
    assert all(id(p) == before[name][0] and torch.equal(p, before[name][1]) for name, p in net.named_parameters())
    expected = net(x)
    binarize.convert(net, "bimacosr")
    assert not torch.allclose(net(x), expected)
    torch.testing.assert_close(binarize.revert(net)(x), expected)


def test_the_summary_counts_a_branch_in_full_precision() -> None:
    net, x = Net(), torch.randn(1, 3, 8, 8)
    usual = binarize.summary(binarize.convert(Net(), get_method("bimacosr", branch=None)), x)
    counted = binarize.summary(binarize.convert(net, METHOD), x)
    extra, pixels = 2 * (8 + 8) + 8, 64
    assert counted.raw_params - usual.raw_params == extra
    assert counted.bytes - usual.bytes == 4 * extra + 4 * 8  # and an index for each of the 8 entries
    assert counted.macs_by_bits[32] - usual.macs_by_bits[32] == extra * pixels
    assert counted.macs_by_bits[1] == usual.macs_by_bits[1] == 8 * 8 * 9 * pixels


@pytest.mark.parametrize(("options", "message"), [({"rank": -1}, "got -1 and 2.0"), ({"rank": 1.5}, "1.5 and 2.0")])
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    assert_error(message, binarize.convert, Net(), get_method("bimacosr", **options))


@pytest.mark.parametrize("options", [{"rank": 0}, {"density": 0}, {"rank": 0, "density": 0}, {"rank": 99}])
def test_each_branch_can_be_left_out(options: dict[str, Any]) -> None:
    net, x = Net().double(), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    net = binarize.convert(net, get_method("bimacosr", **options)).eval()
    net(x).sum().backward()
    with torch.no_grad():
        expected = net(x)
        torch.testing.assert_close(binarize.pack(net)(x), expected)
