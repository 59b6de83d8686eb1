"""Passes that are replayed from graphs: the same images, and no graph where it would not give them."""

import logging
from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from PIL import Image
from torch import Tensor

import binarize
from binarize.models import GenerationPipeline, SRUNet, SuperResolutionPipeline, graphs
from binarize.models.graphs import LEAST_CALLS, can_record
from binarize.models.loading import sample

Pass = Callable[..., Tensor]


class Recorder:
    """Stands for CUDA: keeps tensors that replays read, and what a pass read from Python as it was.

    With ``bakes``, the timestep is read from Python.
    """

    def __init__(self, *, bakes: bool = False, fails: bool = False) -> None:
        self.bakes, self.fails, self.recorded, self.replayed = bakes, fails, 0, 0

    def __call__(self, function: Pass, inputs: tuple[Tensor, ...]) -> Pass:
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
        monkeypatch.setattr(graphs, "can_record", lambda network, inputs: True)
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


def images(pipe: SuperResolutionPipeline | GenerationPipeline, **options: int) -> Tensor:
    source = torch.Generator().manual_seed(1)
    if isinstance(pipe, GenerationPipeline):
        return pipe(4, generator=source, output_type="pt", **options).images
    low = torch.rand(3, 12, 14, generator=torch.Generator().manual_seed(2))
    return pipe(low, generator=source, output_type="pt", **options).images


CASES = [
    pytest.param({"num_inference_steps": 10}, 10, id="steps"),
    pytest.param({"num_inference_steps": 2, "tile": 16}, 8, id="tiles"),
    pytest.param({"num_inference_steps": 3, "tile": 16, "batch_size": 3}, 6, id="few calls"),
]


@pytest.mark.parametrize(("options", "calls"), CASES)
def test_replays_give_the_same_images(options, calls, recorder) -> None:
    pipe = upscaler()
    expected = images(pipe, **options)
    seen = recorder()
    assert torch.equal(images(pipe, **options), expected)
    # All calls but the first, and three comparisons.
    assert (seen.recorded, seen.replayed) == ((1, calls - 1 + 3) if calls >= LEAST_CALLS else (0, 0))
    pipe.cuda_graphs = False
    assert torch.equal(images(pipe, **options), expected)
    assert seen.recorded == (calls >= LEAST_CALLS)


def test_replays_draw_the_same_images(recorder) -> None:
    pipe = generator()
    expected = images(pipe, num_inference_steps=9)
    seen = recorder()
    assert torch.equal(images(pipe, num_inference_steps=9), expected)
    assert (seen.recorded, seen.replayed) == (1, 8 + 3)


def test_replayed_passes_are_counted(recorder) -> None:
    seen, passes = recorder(), []
    low = Image.new("RGB", (14, 12), "teal")
    sample(upscaler(), low, steps=10, seed=0, on_pass=lambda: passes.append(None))
    assert len(passes) == 10 < seen.replayed


@pytest.mark.parametrize("fault", ["bakes", "fails"])
def test_graphs_that_differ_are_not_used(fault, recorder, caplog) -> None:
    pipe = upscaler()
    expected = images(pipe, num_inference_steps=10)
    seen = recorder(**{fault: True})
    with caplog.at_level(logging.WARNING, "binarize"):
        assert torch.equal(images(pipe, num_inference_steps=10), expected)
    assert ("does not give the same results in a CUDA graph" in caplog.text) == (fault == "bakes")
    assert seen.replayed <= 3  # comparisons alone


@pytest.mark.gpu
@pytest.mark.parametrize("build", [upscaler, generator])
def test_cuda_graphs_give_the_same_images(build, monkeypatch) -> None:
    pipe = build().to("cuda")
    pipe.cuda_graphs = False
    expected = images(pipe, num_inference_steps=10)
    pipe.cuda_graphs, recorded = True, []
    record = graphs.record
    monkeypatch.setattr(graphs, "record", lambda *args: recorded.append(None) or record(*args))
    assert torch.equal(images(pipe, num_inference_steps=10), expected)
    assert recorded == [None]


@pytest.mark.gpu
def test_networks_with_hooks_are_not_recorded() -> None:
    network, images = upscaler().unet.cuda(), [torch.zeros(1, 3, 8, 8, device="cuda")]
    assert can_record(network, images)
    handle = network.conv_in.register_forward_hook(lambda *_: None)
    assert not can_record(network, images)
    handle.remove()
    assert can_record(network, images)
    assert not can_record(network, [*images, torch.zeros(1)])
