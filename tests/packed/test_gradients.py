"""A packed network has no gradient, and says so instead of training nothing."""

from typing import Any

import pytest
import torch
from packed_case import SMALL
from torch import nn

import binarize
from binarize.errors import BinarizeError
from binarize.models import SRUNet

MESSAGE = "packed layers have no gradient; train the model that it was packed from"
SHAPES: dict[Any, tuple[int, ...]] = {
    nn.Conv1d: (1, 16, 9), nn.Conv2d: (1, 16, 7, 7), nn.Conv3d: (1, 16, 7, 7, 7), nn.Linear: (2, 16)
}  # fmt: skip


WEIGHT_ONLY = {"name": "reactnet", "activation": "none"}
W1A4 = {"name": "reactnet", "activation": {"name": "lsq", "bits": 4}}


@pytest.mark.parametrize("method", ["reactnet", "bnn", "binarydm", WEIGHT_ONLY, W1A4])
@pytest.mark.parametrize("kind", SHAPES)
def test_training_says_that_there_is_no_gradient(kind: Any, method: Any) -> None:
    layers = [kind(16, 16) if kind is nn.Linear else kind(16, 16, 3, padding=1) for _ in range(4)]
    model = binarize.pack(binarize.convert(nn.Sequential(*layers), method, linear=True))
    x = torch.randn(SHAPES[kind])
    assert not model(x).requires_grad  # in evaluation mode: for inference
    expected = model(x)
    model.train()
    with torch.no_grad():
        assert not model(x).requires_grad
    trained = model(x)
    torch.testing.assert_close(trained.detach(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(BinarizeError, match=MESSAGE):
        nn.functional.mse_loss(trained, torch.zeros_like(trained)).backward()
    model.eval()
    assert not model(x).requires_grad


def test_parameters_that_require_a_gradient_are_not_left_out_in_silence() -> None:
    model = binarize.pack(binarize.convert(SRUNet(**SMALL), "bidiffsr"))
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([10])
    shift = next(p for name, p in model.named_parameters() if ".pre." in name or ".post." in name)
    for parameters in ([shift], [*model.conv_out.parameters(), shift], model.parameters()):
        model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        with pytest.raises(BinarizeError, match=MESSAGE):
            model(x, t, x).sample.mean().backward()
    model.requires_grad_(False)
    model.conv_out.requires_grad_(True)  # behind all packed layers
    model(x, t, x).sample.mean().backward()
    assert model.conv_out.weight.grad is not None
    with torch.inference_mode():
        inside = torch.randn(1, 3, 16, 16)
    model.requires_grad_(False).train()
    with torch.no_grad():
        model(inside, t, inside)
