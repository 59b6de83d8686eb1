"""What a kernel computes for any combination of parts equals the parts called one after another."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import binarize
from binarize.layers import BinaryConv2d, RPReLU, Shift, delayed
from binarize.layers.lowering import lower
from binarize.layers.scales import BatchNorm2d, Hardtanh, ReLU
from binarize.packed.layers import PackedConv2d
from binarize.timestep import TimestepContext


class Doubled(Shift):
    def gather(self, parameter: Tensor) -> Tensor:
        return 2 * super().gather(parameter)


class OfInput(nn.Module):
    of_input = True

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return y * x.mean()


ORDERS: list[dict[str, Any]] = [
    {"norm": lambda s: RPReLU(32), "post": "rprelu"},
    {"norm": lambda s: Hardtanh(), "post": "rprelu"},
    {"norm": lambda s: ReLU(), "shortcut": "pool", "post": "rprelu", "post_after_shortcut": True},
    {"norm": lambda s: RPReLU(32), "post": lambda s: BatchNorm2d(32)},
    {"shortcut": "pool", "post": lambda s: BatchNorm2d(32), "post_after_shortcut": True},
    {"norm": lambda s: Hardtanh(-9, 9), "post": lambda s: ReLU(), "shortcut": "pool"},
    {"norm": "batch_norm", "shortcut": "pool", "post": "rprelu", "post_after_shortcut": True},
    {"pre": lambda s: Doubled(32), "post": "rprelu"},
    {"activation": delayed("approx_sign", 0.5)},
    {"pre": "shift", "scale": lambda s: OfInput()},
    {"pre": lambda s: Shift(32, 2, s.context), "post": "taa", "groups": 4},
    {"pre": lambda s: Shift(32, 4, s.context), "post": lambda s: RPReLU(32, 2, s.context), "groups": 4},
]


def layer_of(options: dict[str, Any], context: TimestepContext) -> BinaryConv2d:
    method = binarize.get_method("custom", **{"activation": "approx_sign", **options})
    layer = BinaryConv2d.from_float(nn.Conv2d(32, 32, 3, padding=1, bias=False), method, context).eval()
    binarize.training_step(layer, 1.0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


@pytest.mark.slow
@pytest.mark.parametrize("options", ORDERS, ids=lambda o: "-".join(o))
def test_any_order_of_parts_equals_its_modules(options: dict[str, Any]) -> None:
    context = TimestepContext(1000)
    layer, x = layer_of(options, context), torch.randn(4, 32, 6, 6)
    _, codes, scales = layer.binary_weight()
    dense = codes[0] * scales[0, :, None, None, None]
    with context.using(torch.tensor([0, 300, 600, 999])):
        shifted = layer.shifted(x)
        y = nn.functional.conv2d(torch.where(shifted >= 0, 1.0, -1.0), dense, padding=1)
        expected = layer.run_stages(layer.stages(), y, x, shifted)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-3)
        with torch.no_grad():
            torch._dynamo.reset()
            packed = PackedConv2d(layer)
            for run in (packed, torch.compile(packed, fullgraph=True, backend="eager")):
                torch.testing.assert_close(run(x), expected, rtol=1e-4, atol=1e-3)


def test_a_packed_layer_follows_hooks_modes_and_replaced_forwards() -> None:
    layer = layer_of({"norm": "batch_norm", "post": "rprelu"}, TimestepContext(1000))
    packed, x, calls = PackedConv2d(layer), torch.randn(2, 32, 6, 6), []
    with torch.no_grad():
        before = packed(x)
        handle = packed.post.register_forward_hook(lambda *_: calls.append(1))
        torch.testing.assert_close(packed(x), before, rtol=1e-4, atol=1e-3)
        assert calls == [1]
        handle.remove()
        packed.norm.train()
        assert not torch.allclose(packed(x), before)
        packed.norm.eval()
        packed.post.forward = lambda y: y * 0
        assert packed(x).abs().max() == 0


def test_only_parts_that_run_as_declared_are_lowered() -> None:
    for pre, fused in (("shift", True), (lambda s: Doubled(32), False)):
        lowered = lower(layer_of({"pre": pre, "post": "rprelu", "shortcut": "pool"}, TimestepContext(1000)))
        assert lowered is not None
        assert lowered.is_one_kernel == fused
