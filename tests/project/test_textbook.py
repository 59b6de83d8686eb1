"""Our network against the same one written the textbook way: outputs, gradients, and losses over a training run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import binarize
from binarize.models import SRUNet
from binarize.recipes import Recipe, build_model, build_scheduler, load_recipe
from binarize.training.objective import prediction_target, sample_losses

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from textbook import TextbookSRUNet, textbook_names, textbook_state, textbook_twin

T = 100


def network(zero: str = "zero", dropout: float = 0.0) -> SRUNet:
    """A small network whose every parameter is random, so that no shift is zero and no slope another's."""
    unet = SRUNet(
        base_channels=8, channel_mults=(1, 2, 4), res_blocks=1, norm_groups=4, dropout=dropout, num_train_timesteps=T
    )
    binarize.convert(unet, {"name": "bidiffsr", "sign_zero": zero})
    return roughen(unet.double())


def roughen(unet: SRUNet) -> SRUNet:
    """Move shifts and slopes away from where they start.

    With a first shift of 0, a dot product of 0 sits on the kink of the RPReLU. Ours are exactly 0 there, and take the
    slope; the textbook's, whose scale is inside the weights, are rounding errors of either sign, and take either side.
    """
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


# -- a training run ----------------------------------------------------------------------------------------------------

STEPS = 50


def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, *, fill: bool = False) -> list[float]:
    """Train on fixed random pictures, one timestep a batch, and return the loss of every step.

    With ``fill``, parameters that a step did not reach get a gradient of zero rather than None.
    """
    scheduler, losses = build_scheduler(recipe), []
    for step in range(STEPS):
        draw = torch.Generator().manual_seed(step)
        clean, condition, noise = torch.rand(3, 2, 3, 16, 16, generator=draw, dtype=torch.float64)
        steps = torch.randint(T, (1,), generator=draw).expand(2)
        noisy = scheduler.add_noise(clean, noise, steps)
        out = net(noisy, steps, condition)
        prediction = out if isinstance(out, Tensor) else out.sample
        loss = sample_losses(recipe.loss, prediction, prediction_target(scheduler, clean, noise, steps)).mean()
        optimizer.zero_grad()
        loss.backward()
        for parameter in net.parameters() if fill else ():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        losses.append(loss.item())
    return losses


def pair() -> tuple[SRUNet, TextbookSRUNet, Recipe]:
    recipe = load_recipe(
        "bidiffsr_x2",
        (
            "timesteps_per=batch", f"scheduler.num_train_timesteps={T}", "model.base_channels=8",
            "model.channel_mults=[1,2]", "model.res_blocks=1", "model.norm_groups=4", "method.sign_zero=zero",
            "method.fp_decoder_levels=[0]", "resolution=16", "train_batch_size=2",
            "model.dropout=0",  # whose masks follow the order of memory, which differs
        ),
    )  # fmt: skip
    torch.manual_seed(0)
    ours = roughen(build_model(recipe).double())
    return ours, textbook_twin(ours), recipe


def adam(net: torch.nn.Module, recipe: Recipe) -> torch.optim.Adam:
    return torch.optim.Adam(net.parameters(), recipe.learning_rate, (recipe.adam_beta1, recipe.adam_beta2))


def test_losses_agree_with_the_textbook_networks_over_a_run_with_adam():
    ours, textbook, recipe = pair()
    mine = train(ours, adam(ours, recipe), recipe)
    theirs = train(textbook, adam(textbook, recipe), recipe, fill=True)
    assert max(abs(a - b) for a, b in zip(mine, theirs, strict=True)) < 1e-5
    assert sum(mine[-10:]) < sum(mine[:10])


def test_losses_agree_as_they_are_where_the_optimizer_has_no_memory():
    ours, textbook, recipe = pair()
    mine = train(ours, torch.optim.SGD(ours.parameters(), 0.05), recipe)
    theirs = train(textbook, torch.optim.SGD(textbook.parameters(), 0.05), recipe)
    assert max(abs(a - b) for a, b in zip(mine, theirs, strict=True)) < 1e-5


def test_momentum_moves_rows_that_no_sample_selected_and_leaves_the_textbooks_modules():
    ours, textbook, recipe = pair()
    sample, condition, _ = batch()
    optimizers = adam(ours, recipe), adam(textbook, recipe)
    history: list[tuple[Tensor, Tensor]] = []
    for step in (0, T - 1):  # the first group, then the last one
        steps = torch.full((2,), step)
        for net, optimizer in zip((ours, textbook), optimizers, strict=True):
            out = net(sample, steps, condition)
            optimizer.zero_grad()
            (out if isinstance(out, Tensor) else out.sample).abs().mean().backward()
            optimizer.step()
        row = ours.encoder[0].blocks[0].conv1.pre.bias[0]
        module = textbook.encoder[0].blocks[0].conv1.shifts[0].bias.flatten()
        history.append((row.detach().clone(), module.detach().clone()))
    (row_before, module_before), (row_after, module_after) = history
    assert (row_after != row_before).any()
    assert torch.equal(module_after, module_before)
