"""Threads that share a packed network, or a pipeline, get the images that one thread gets."""

import threading
from collections.abc import Callable

import diffusers
import pytest
import torch
from packed_case import SMALL
from torch import Tensor

import binarize
from binarize.models import SRUNet, SuperResolutionPipeline

THREADS, SIZES = 8, (16, 24, 32, 40, 48, 56, 64, 72, 80, 88)  # more sizes than a layer keeps the parameters of


def in_threads(call: Callable[[int], Tensor], cases: int, rounds: int) -> list[int]:
    """Return the cases for which a thread got another result than the first call in this one."""
    expected, wrong, failures = [call(case) for case in range(cases)], [], []

    def work(first: int) -> None:
        try:
            for turn in range(rounds):
                case = (3 * turn + first) % cases
                if not torch.equal(call(case), expected[case]):
                    wrong.append(case)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(first,)) for first in range(THREADS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bidiffsr", "bbcu"])
def test_a_network_is_shared(method: str) -> None:
    network = binarize.pack(binarize.convert(SRUNet(**SMALL), method))
    images = [torch.randn(1, 3, size, size) for size in SIZES]

    def call(case: int) -> Tensor:
        with torch.inference_mode():
            output: Tensor = network(images[case], 3 * case, images[case]).sample
            return output

    assert not in_threads(call, len(SIZES), 12)


@pytest.mark.slow
def test_a_pipeline_is_shared() -> None:
    network = binarize.pack(binarize.convert(SRUNet(**SMALL), "bbcu"))
    scheduler = diffusers.DPMSolverMultistepScheduler(num_train_timesteps=2000, beta_start=1e-6, beta_end=1e-2)
    pipe = SuperResolutionPipeline(network, scheduler, scale=2)
    pipe.set_progress_bar_config(disable=True)
    images = [torch.rand(1, 3, size, size) for size in SIZES[:3]]

    def call(case: int) -> Tensor:
        noise = torch.Generator().manual_seed(case)
        options = {"num_inference_steps": 2 + case, "generator": noise, "output_type": "pt", "return_dict": False}
        output: Tensor = pipe(images[case], **options)[0]
        return output

    assert not in_threads(call, 3, 4)
