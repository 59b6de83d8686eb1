"""Passes that are replayed from graphs: the same images, and no graph where it would not give them."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from PIL import Image
from torch import Tensor

import binarize
from binarize.models import GenerationPipeline, SRUNet, SuperResolutionPipeline, graphs
from binarize.models.graphs import LEAST_CALLS, runs_alone, share_a_gpu
from binarize.models.loading import sample

Pass = Callable[..., Tensor]


class Recorder:
    """Stands for CUDA: keeps tensors that replays read, and what a pass read from Python as it was.

    With ``bakes``, the timestep is read from Python.
    """

    def __init__(self, *, bakes: bool = False, fails: bool = False) -> None:
        self.bakes, self.fails, self.recorded, self.replayed = bakes, fails, 0, 0

    def __call__(self, function: Pass, inputs: tuple[Tensor, ...]) -> Pass:
        function = copy.deepcopy(function)  # a graph does not see what is assigned to the network later
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.recorded += 1
        given = [each.clone() for each in inputs]

        def replay(*others: Tensor) -> Tensor:
            self.replayed += 1
            for place, each in zip(given[self.bakes :], others[self.bakes :], strict=True):
                place.copy_(each)
            return function(*given)

        return replay


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recorder]:
    def install(**options: bool) -> Recorder:
        made = Recorder(**options)
        monkeypatch.setattr(graphs, "record", made)
        monkeypatch.setattr(graphs, "share_a_gpu", lambda inputs: True)
        return made

    return install


def upscaler() -> SuperResolutionPipeline:
    torch.manual_seed(0)
    network = SRUNet(base_channels=8, channel_mults=(1, 2), res_blocks=1, norm_groups=4).eval()
    binarize.convert(network, "bidiffsr")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    pipe = SuperResolutionPipeline(binarize.pack(network), scale=2)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generator() -> GenerationPipeline:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    widths = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "num_class_embeds": 3}
    network = binarize.convert(UNet2DModel(8, 3, 3, add_attention=False, **blocks, **widths).eval(), "reactnet")
    pipe = GenerationPipeline(binarize.pack(network), DDIMScheduler(100), ["a", "b"], guidance_scale=2.0)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe: SuperResolutionPipeline | GenerationPipeline, **options: Any) -> Tensor:
    source = torch.Generator().manual_seed(1)
    if isinstance(pipe, GenerationPipeline):
        return pipe(4, generator=source, output_type="pt", **options).images
    low = torch.rand(3, 12, 14, generator=torch.Generator().manual_seed(2))
    return pipe(low, generator=source, output_type="pt", **options).images


CASES = [
    pytest.param({"num_inference_steps": 16}, 16, id="steps"),
    pytest.param({"num_inference_steps": 4, "tile": 16}, 16, id="tiles"),
    pytest.param({"num_inference_steps": 16, "tile": 16, "batch_size": 3}, 16, id="tiles of two shapes"),
    pytest.param({"num_inference_steps": 3, "tile": 16}, 12, id="few calls"),
]


@pytest.mark.parametrize(("options", "calls"), CASES)
def test_replays_give_the_same_images(options, calls, recorder) -> None:
    pipe = upscaler()
    expected = images(pipe, **options)
    seen = recorder()
    assert torch.equal(images(pipe, **options), expected)
    # All calls of a shape but the first, and three comparisons.
    assert (seen.recorded, seen.replayed) == ((1, calls - 1 + 3) if calls >= LEAST_CALLS else (0, 0))
    pipe.cuda_graphs = False
    assert torch.equal(images(pipe, **options), expected)
    assert seen.recorded == (calls >= LEAST_CALLS)


def test_large_batches_run_without_a_graph(recorder, monkeypatch) -> None:
    pipe, seen = upscaler(), recorder()
    monkeypatch.setattr(graphs, "MOST_PIXELS", 24 * 28)
    images(pipe, num_inference_steps=16)
    assert seen.recorded == 1
    monkeypatch.setattr(graphs, "MOST_PIXELS", 24 * 28 - 1)
    images(pipe, num_inference_steps=16)
    assert seen.recorded == 1


def test_each_call_records_the_network_of_now(recorder) -> None:
    pipe, seen = upscaler(), recorder()
    before = images(pipe, num_inference_steps=16)
    with torch.no_grad():
        pipe.unet.conv_out.bias.add_(0.01)
    after = images(pipe, num_inference_steps=16)
    assert seen.recorded == 2
    assert not torch.equal(after, before)


def test_callbacks_may_change_the_network(recorder) -> None:
    pipe, seen = upscaler(), recorder()
    images(pipe, num_inference_steps=16, callback_on_step_end=lambda *_: {})
    assert seen.recorded == 0


def test_replays_draw_the_same_images(recorder) -> None:
    pipe = generator()
    expected = images(pipe, num_inference_steps=16)
    seen = recorder()
    assert torch.equal(images(pipe, num_inference_steps=16), expected)
    assert (seen.recorded, seen.replayed) == (1, 15 + 3)


def test_replayed_passes_are_counted(recorder) -> None:
    seen, passes = recorder(), []
    low = Image.new("RGB", (14, 12), "teal")
    sample(upscaler(), low, steps=16, seed=0, on_pass=lambda: passes.append(None))
    assert len(passes) == 16 < seen.replayed


@pytest.mark.parametrize("fault", ["bakes", "fails"])
def test_graphs_that_differ_are_not_used(fault, recorder, caplog) -> None:
    pipe = upscaler()
    expected = images(pipe, num_inference_steps=16)
    seen = recorder(**{fault: True})
    with caplog.at_level(logging.WARNING, "binarize"):
        assert torch.equal(images(pipe, num_inference_steps=16), expected)
    assert ("gives other results in a CUDA graph" in caplog.text) == (fault == "bakes")
    assert seen.replayed <= 3  # comparisons alone


@pytest.mark.gpu
@pytest.mark.parametrize("build", [upscaler, generator])
def test_cuda_graphs_give_the_same_images(build, monkeypatch) -> None:
    pipe = build().to("cuda")
    pipe.cuda_graphs = False
    expected = images(pipe, num_inference_steps=16)
    pipe.cuda_graphs, recorded = True, []
    record = graphs.record
    monkeypatch.setattr(graphs, "record", lambda *args: recorded.append(None) or record(*args))
    assert torch.equal(images(pipe, num_inference_steps=16), expected)
    assert recorded == [None]


def test_what_runs_alone() -> None:
    network = upscaler().unet
    assert runs_alone(network)
    handle = network.conv_in.register_forward_hook(lambda *_: None)
    assert not runs_alone(network)
    handle.remove()
    assert runs_alone(network)
    assert not runs_alone(torch.compile(network))
    network.conv_in.compile()
    assert not runs_alone(network)
    network.conv_in._compiled_call_impl = None
    assert runs_alone(network)
    network.conv_in._hf_hook = None  # where accelerate keeps what it does around a call
    assert not runs_alone(network)
    assert not share_a_gpu([torch.zeros(1)])
