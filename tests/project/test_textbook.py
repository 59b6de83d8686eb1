"""Compare SRUNet with its textbook implementation: outputs, gradients, and losses of a training run."""

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


def network(zero: str = "zero") -> SRUNet:
    """Return a small network in which all parameters are random."""
    widths = {"base_channels": 8, "channel_mults": (1, 2, 4), "res_blocks": 1, "norm_groups": 4}
    unet = SRUNet(**widths, dropout=0.0, num_train_timesteps=T)
    binarize.convert(unet, {"name": "bidiffsr", "sign_zero": zero})
    return perturb(unet.double())


def perturb(unet: SRUNet) -> SRUNet:
    """Move shifts and slopes away from 0: the textbook network rounds a dot product of 0 to either side of the kink."""
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
    unet = network(zero)
    textbook = textbook_twin(unet)
    sample, condition, target = batch()
    steps = torch.full((2,), step)
    out, expected = unet(sample, steps, condition).sample, textbook(sample, steps, condition)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    (out - target).abs().mean().backward()
    (expected - target).abs().mean().backward()
    expected_grads = {name: parameter.grad for name, parameter in textbook.named_parameters()}
    grads = {name: parameter.grad for name, parameter in unet.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    pairs = [pair for tensors in textbook_names(grads).values() for pair in tensors]
    assert {name for name, _ in pairs} == set(expected_grads)
    for name, grad in pairs:
        if expected_grads[name] is None:  # a timestep group that the batch did not select
            assert not grad.any(), name
        else:
            torch.testing.assert_close(grad, expected_grads[name], rtol=0, atol=1e-12, msg=name)


def test_the_textbook_network_of_the_released_configuration_has_the_same_parameters():
    with torch.device("meta"):
        unet = binarize.convert(SRUNet(), "bidiffsr")
        textbook = TextbookSRUNet()
    shapes = {name: value.shape for name, value in textbook_state(unet.state_dict()).items()}
    assert shapes == {name: value.shape for name, value in textbook.state_dict().items()}


STEPS = 50  # of a training run


def train(
    net: torch.nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, *, fill_grads: bool = False
) -> list[float]:
    """Return the loss of every step on fixed images; ``fill_grads`` gives parameters without a gradient one of zero."""
    scheduler, losses = build_scheduler(recipe), []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        clean, condition, noise = torch.rand(3, 2, 3, 16, 16, generator=generator, dtype=torch.float64)
        steps = torch.randint(T, (1,), generator=generator).expand(2)
        out = net(scheduler.add_noise(clean, noise, steps), steps, condition)
        prediction = out if isinstance(out, Tensor) else out.sample
        loss = sample_losses(recipe.loss, prediction, prediction_target(scheduler, clean, noise, steps)).mean()
        optimizer.zero_grad()
        loss.backward()
        for parameter in net.parameters() if fill_grads else ():
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
            "model.dropout=0",  # the masks depend on the memory format, which differs
        ),
    )  # fmt: skip
    torch.manual_seed(0)
    unet = perturb(build_model(recipe).double())
    return unet, textbook_twin(unet), recipe


def adam(net: torch.nn.Module, recipe: Recipe) -> torch.optim.Adam:
    return torch.optim.Adam(net.parameters(), recipe.learning_rate, (recipe.adam_beta1, recipe.adam_beta2))


@pytest.mark.long
@pytest.mark.parametrize(
    ("optimizer", "fill_grads"),
    [(adam, True), (lambda net, recipe: torch.optim.SGD(net.parameters(), 0.05), False)],
    ids=["adam", "sgd"],  # without momentum, gradients of None and of zero are the same
)
def test_losses_agree_with_the_textbook_networks_over_a_run(optimizer, fill_grads):
    unet, textbook, recipe = pair()
    losses = train(unet, optimizer(unet, recipe), recipe)
    expected = train(textbook, optimizer(textbook, recipe), recipe, fill_grads=fill_grads)
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-5
    assert sum(losses[-10:]) < sum(losses[:10])


def test_momentum_moves_rows_that_no_sample_selected_but_not_the_textbooks_modules():
    unet, textbook, recipe = pair()
    sample, condition, _ = batch()
    networks = (unet, adam(unet, recipe)), (textbook, adam(textbook, recipe))
    history: list[tuple[Tensor, Tensor]] = []
    for step in (0, T - 1):  # the first timestep group, then the last one
        for net, optimizer in networks:
            out = net(sample, torch.full((2,), step), condition)
            optimizer.zero_grad()
            (out if isinstance(out, Tensor) else out.sample).abs().mean().backward()
            optimizer.step()
        row = unet.encoder[0].blocks[0].conv1.pre.bias[0]
        module = textbook.encoder[0].blocks[0].conv1.shifts[0].bias.flatten()
        history.append((row.detach().clone(), module.detach().clone()))
    (row_before, module_before), (row_after, module_after) = history
    assert (row_after != row_before).any()
    assert torch.equal(module_after, module_before)
