"""Our network against the same one written the textbook way: outputs, gradients, and losses over a training run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import binarize
from binarize.models import SRUNet

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from textbook import TextbookSRUNet, textbook_names, textbook_state, textbook_twin

T = 100


def network(zero: str = "zero", dropout: float = 0.0) -> SRUNet:
    """A small network whose every parameter is random, so that no shift is zero and no slope another's."""
    unet = SRUNet(
        base_channels=8, channel_mults=(1, 2, 4), res_blocks=1, norm_groups=4, dropout=dropout, num_train_timesteps=T
    )
    binarize.convert(unet, {"name": "bidiffsr", "sign_zero": zero})
    unet.double()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".pre." in name or ".post." in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return unet


def batch(size: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    sample, condition, target = torch.randn(3, 2, 3, size, size, dtype=torch.float64)
    return sample, condition, target


@pytest.mark.parametrize("zero", ["zero", "plus"])
@pytest.mark.parametrize("step", [0, 19, 20, 59, 99])
def test_outputs_and_gradients_equal_the_textbook_networks(zero, step):
    ours = network(zero)
    textbook = textbook_twin(ours)
    sample, condition, target = batch()
    steps = torch.full((2,), step)
    out, expected = ours(sample, steps, condition).sample, textbook(sample, steps, condition)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    (out - target).abs().mean().backward()
    (expected - target).abs().mean().backward()
    theirs = {name: parameter.grad for name, parameter in textbook.named_parameters()}
    grads = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    pairs = [pair for found in textbook_names(grads).values() for pair in found]
    assert {name for name, _ in pairs} == set(theirs)
    for name, grad in pairs:
        if theirs[name] is None:  # a group that the batch did not choose
            assert not grad.any(), name
        else:
            torch.testing.assert_close(grad, theirs[name], rtol=0, atol=1e-12, msg=name)


def test_the_textbook_network_of_the_released_configuration_has_our_parameters():
    with torch.device("meta"):
        ours = binarize.convert(SRUNet(), "bidiffsr")
        textbook = TextbookSRUNet()
    shapes = {name: value.shape for name, value in textbook_state(ours.state_dict()).items()}
    assert shapes == {name: value.shape for name, value in textbook.state_dict().items()}
