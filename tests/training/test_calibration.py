"""The learned steps of k-bit activations are set from the first images of a run."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from errors_case import assert_error
from generation_case import CONDITIONAL, tiny, write_images
from torch import nn
from torch.utils.data import default_collate
from training_case import RESUME, assert_same

from binarize.layers.multibit import LearnedStep, learned_steps
from binarize.recipes import build_model, build_scheduler
from binarize.training import initial, loop, train
from binarize.training.calibration import calibrate_steps
from binarize.training.objective import Objective
from binarize.training.samples import BatchPlan

LSQ = 'method={"name": "binarydm", "activation": {"name": "lsq", "bits": 4}}'


@pytest.fixture(scope="module")
def symbols(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("symbols"))


def first_steps(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """Return a list that gets the steps of each network that a run starts with, after their initialization."""
    found: list[dict[str, float]] = []
    real = loop.build_optimizer

    def spy(recipe: Any, network: nn.Module) -> Any:
        found.append({name: module.step.item() for name, module in learned_steps(network).items()})
        return real(recipe, network)

    monkeypatch.setattr(loop, "build_optimizer", spy)
    return found


@pytest.mark.slow
def test_steps_are_those_of_the_first_batch(symbols: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    recipe = tiny(symbols, tmp_path / "run", CONDITIONAL, LSQ)
    steps = first_steps(monkeypatch)
    run = train(recipe)
    assert f"the steps of {len(steps[0])} k-bit activations are initialized from 4 images" in capsys.readouterr().out
    # The same network, and what its first k-bit activation sees of the first four samples.
    torch.manual_seed(loop.torch_seed(recipe.seed, "weights"))
    network = build_model(recipe).eval()
    name, activation = next(iter(learned_steps(network).items()))
    seen: list[torch.Tensor] = []
    activation.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    samples = loop.open_task(recipe, BatchPlan(4)).samples
    batch = default_collate([samples[i] for i in range(4)])
    with torch.no_grad():
        Objective(recipe, build_scheduler(recipe))(network, batch)
    assert steps[0][name] == pytest.approx(2 * float(seen[0].abs().mean()) / math.sqrt(7))
    start = LearnedStep(4).step.item()
    assert all(step != start for step in steps[0].values())

    shutil.copytree(run.output_dir / "checkpoint-3", tmp_path / "cut" / "checkpoint-3")
    resumed = train(tiny(symbols, tmp_path / "cut", CONDITIONAL, LSQ, RESUME), progress=False)
    assert_same(resumed.checkpoint, run.checkpoint)
    further = ("max_train_steps=1", f"init_from={run.output_dir}")
    train(tiny(symbols, tmp_path / "next", CONDITIONAL, LSQ, *further), progress=False)
    learned = learned_steps(initial.read_trained("init_from", run.output_dir, recipe).network)
    assert steps[2] == {name: module.step.item() for name, module in learned.items()}


def test_steps_of_a_full_precision_twin_and_of_stages(symbols: Path, tmp_path: Path, monkeypatch) -> None:
    twin = train(tiny(symbols, tmp_path / "twin", "method=null", "structure=auto", "max_train_steps=1"), progress=False)
    steps = first_steps(monkeypatch)
    stages = ("two_stage=0.3", "progressive={blocks: ['down_blocks.*', '*'], until: 0.6}")
    train(
        tiny(symbols, tmp_path / "run", LSQ, "max_train_steps=1", *stages, f"init_from={twin.output_dir}"),
        progress=False,
    )
    start = LearnedStep(4).step.item()
    assert steps[0]
    assert all(step != start for step in steps[0].values())


def test_every_process_gets_the_same_steps(recipe: Any) -> None:
    whole = recipe(LSQ, "structure=keep", "gradient_accumulation_steps=2")
    found = []
    for plan in (BatchPlan(2, 2), BatchPlan(2, 1, processes=2, rank=1)):
        torch.manual_seed(0)
        network = build_model(whole).train()
        samples = loop.open_task(whole, plan).samples
        calibrate_steps(whole, network, samples, plan.total, torch.device("cpu"))
        assert network.training
        found.append([module.step.item() for module in learned_steps(network).values()])
    assert found[0] == found[1]


def test_what_cannot_be_initialized(symbols: Path, tmp_path: Path) -> None:
    recipe = tiny(symbols, tmp_path, LSQ)
    network = build_model(recipe)
    samples = loop.open_task(recipe, BatchPlan(4)).samples
    spare = learned_steps(network)
    network.spare = LearnedStep(4)
    device = torch.device("cpu")
    line = calibrate_steps(recipe, network, samples, 4, device)
    assert line.startswith(f"the steps of {len(spare)} k-bit activations are initialized from 4 images; ")
    assert line.endswith("the network does not reach spare")
    nn.init.zeros_(network.conv_in.weight)
    nn.init.zeros_(network.conv_in.bias)
    name = next(iter(spare))
    message = rf"steps of the k-bit activations cannot be initialized. calibrate: the mean .* of {name!r} is 0.0"
    network.down_blocks[0].resnets[0].norm1.bias.data.zero_()
    assert_error(message, calibrate_steps, recipe, network, samples, 4, device)
    assert calibrate_steps(recipe, build_model(tiny(symbols, tmp_path)), samples, 4, device) == ""
