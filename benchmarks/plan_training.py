"""Estimate the memory and the time of training the released recipes on GPUs.

Nothing is measured. Operations come from `binarize.summary`. Memory and traffic are counted during a forward and a
backward pass of one sample on the CPU in plain PyTorch, as on a GPU. Speeds are assumptions, set by the options.

    python benchmarks/plan_training.py                        # about a minute
    python benchmarks/plan_training.py --gpu a100 --tf32 --compute-share 0.5
    python benchmarks/plan_training.py --write                # also into docs/benchmarks.md
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
from tables import numbers, replace_between
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import binarize
from binarize.kernels import backends
from binarize.recipes import load_recipe
from binarize.tables import Table

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
RECIPES = ("bidiffsr_x2", "bidiffsr_x4")
# Image sizes at which a sample is counted. The part per pixel and the constant part follow from the two counts.
SIDES = (32, 64)
MODES: tuple[Literal["exact", "compact"], ...] = ("exact", "compact")
# Temporary feature maps of the finest level (64 channels) during a step: a gradient and what is computed from it.
MAPS, WIDTH = 4, 64
# Plain PyTorch saves what a GPU saves; the compiled training kernels run on CPUs only.
BACKENDS: tuple[backends.Backend, ...] = ("torch", "auto")
SHAPES = ((128, 1), (128, 4), (128, 16), (256, 16))


class Card(NamedTuple):
    """A GPU according to its data sheet.

    Attributes:
        name: Its name.
        float32: Dense TFLOP/s.
        tf32: Dense TFLOP/s in tensor cores.
        memory: Memory bandwidth in GB/s.
        link: Bandwidth to the other GPUs of its machine in GB/s, each way.
    """

    name: str
    float32: float
    tf32: float
    memory: float
    link: float


CARDS = {
    "h100": Card("H100 SXM", 67, 494, 3350, 450),
    "a100": Card("A100 SXM 80 GB", 19.5, 156, 2039, 300),
}
PRODUCTS = ("convolution", "convolution_backward", "addmm", "mm", "bmm", "scaled_dot_product")


@dataclass(frozen=True)
class Line:
    """A count that is linear in the number of pixels."""

    pixel: float
    fixed: float

    @classmethod
    def through(cls, counts: list[float]) -> Line:
        """Return the line through the counts at `SIDES`."""
        small, large = (side**2 for side in SIDES)
        pixel = (counts[1] - counts[0]) / (large - small)
        return cls(pixel, max(0.0, counts[0] - pixel * small))

    def at(self, side: int, batch: int = 1) -> float:
        """Return the count for a batch."""
        return self.pixel * side**2 * batch + self.fixed


class Traffic(TorchDispatchMode):
    """Counts operator calls, and the bytes read and written by operators other than matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count it."""
        out = func(*args, **(kwargs or {}))
        if func.is_view or func.namespace != "aten" or "empty" in func.__name__:
            return out
        self.calls += 1
        if not any(product in func.__name__ for product in PRODUCTS):
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return out


@dataclass(frozen=True)
class Counts:
    """The counts of a training step of one sample.

    Attributes:
        saved: Bytes saved for backward, by backend and memory mode.
        moved: Bytes read and written by operators other than matrix products.
        calls: Number of operator calls, independent of the batch size.
        weights: Bytes of the weights.
    """

    saved: dict[tuple[str, str], Line]
    moved: Line
    calls: int
    weights: int


def count(unet: nn.Module) -> Counts:
    """Count a network's forward and backward."""
    saved: dict[tuple[str, str], list[float]] = {(backend, mode): [] for backend in BACKENDS for mode in MODES}
    moved, calls = [], 0
    for side in SIDES:
        for backend, mode in saved:
            binarize.memory_mode(unet, mode)
            with backends.use(backend):
                kept, traffic = _step(unet, side)
            saved[backend, mode].append(kept)
            if (backend, mode) == ("torch", "exact"):
                moved.append(float(traffic.bytes))
                calls = traffic.calls
    weights = sum(p.numel() * p.element_size() for p in unet.parameters())
    return Counts({key: Line.through(kept) for key, kept in saved.items()}, Line.through(moved), calls, weights)


def _step(unet: nn.Module, side: int) -> tuple[float, Traffic]:
    own = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    sample, condition = torch.rand(2, 1, 3, side, side)
    # Layers take another path under a dispatch mode, which is not the one of training.
    with Traffic() as traffic, patch.object(_python_dispatch, "is_in_torch_dispatch_mode", lambda: False):
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = unet(sample, torch.tensor([700]), condition).sample.abs().mean()
        loss.backward()
    unet.zero_grad()
    return float(sum(storages.values())), traffic


def macs(unet: nn.Module, side: int) -> float:
    """Return the multiply-accumulates of one forward pass; binary ones count as float ones, as computed in training."""
    image = torch.empty(1, 3, side, side, device="meta")
    steps = torch.zeros(1, dtype=torch.long, device="meta")
    return float(sum(binarize.summary(unet, (image, steps, image)).macs_by_bits.values()))


def memory(counts: Counts, side: int, batch: int, backend: str, mode: str) -> float:
    """Return the bytes of a step: weights, gradients, Adam's moments, saved tensors and temporary maps."""
    temporary = MAPS * WIDTH * 4 * side**2 * batch
    return 4 * counts.weights + counts.saved[backend, mode].at(side, batch) + temporary


class Step(NamedTuple):
    """The parts of a step in seconds, and the number of samples per GPU."""

    each: int
    products: float
    passes: float
    launches: float
    exchange: float

    @property
    def seconds(self) -> float:
        """The whole step. Launches overlap with the GPU, and the exchange with the backward (two thirds of a step)."""
        busy = max(self.products + self.passes, self.launches)
        return busy + max(0.0, self.exchange - busy * 2 / 3)

    @property
    def limit(self) -> str:
        """The part that takes longest."""
        compute = self.products + self.passes
        if self.exchange > max(compute, self.launches) * 2 / 3:
            return "gradient exchange"
        if self.launches > compute:
            return "kernel launches"
        return "products" if self.products > self.passes else "memory bandwidth"


def plan(counts: Counts, forward: float, side: int, gpus: int, batch: int, options: argparse.Namespace) -> Step:
    """Return the estimated step of ``batch`` samples, divided equally between ``gpus`` GPUs.

    Args:
        counts: Counts of the network.
        forward: MACs of a forward pass of one sample.
        side: Side of a patch in pixels.
        gpus: Number of GPUs.
        batch: Samples per step.
        options: Assumptions from the command line.
    """
    card, each = CARDS[options.gpu], batch // gpus
    peak = card.tf32 if options.tf32 else card.float32
    flops = 2 * 3 * forward * each  # the backward computes two products of the forward's size
    adam = 7 * counts.weights  # reads weights, gradients and both moments; writes weights and moments
    link = card.link if gpus <= options.gpus_per_machine else options.network
    return Step(
        each,
        flops / (peak * 1e12 * options.compute_share),
        (counts.moved.at(side, each) + adam) / (card.memory * 1e9 * options.bandwidth_share),
        counts.calls * options.launch_us * 1e-6,
        2 * (gpus - 1) / gpus * counts.weights / (link * 1e9 * options.bandwidth_share),
    )


def memory_table(counts: Counts) -> str:
    """Return the memory of a step in exact mode by image size and batch size."""
    names = {"torch": "GPU", "auto": "CPU"}
    memories = (numbers(f"{names[backend]}, GB", ".1f") for backend in BACKENDS)
    rows = []
    for side, batch in SHAPES:
        gigabytes = (memory(counts, side, batch, backend, "exact") / 1e9 for backend in BACKENDS)
        rows.append([f"{batch} x {side}x{side}", *gigabytes])
    return Table(["batch", *memories], rows).to_markdown()


def plan_table(unet: nn.Module, counts: Counts, options: argparse.Namespace) -> str:
    """Return the plan of every recipe on several numbers of GPUs."""
    rows = []
    for name in RECIPES:
        recipe = load_recipe(name)
        side, batch = recipe.resolution, recipe.train_batch_size
        forward = macs(unet, side)
        for gpus in options.gpus:
            larger = batch * math.ceil(gpus / batch)
            while larger % gpus:
                larger += batch
            step = plan(counts, forward, side, gpus, larger, options)
            steps = recipe.max_train_steps * batch // larger
            buckets = counts.weights if gpus > 1 else 0  # data parallelism copies the gradients
            gigabytes = (memory(counts, side, step.each, "torch", "exact") + buckets) / 1e9
            days = steps * step.seconds / 86400
            number = gpus if larger == batch else f"{gpus}, batch {larger}"
            rows.append([f"`{name}`", number, 1e3 * step.seconds, days, gigabytes, step.limit])
    columns = [numbers("step, ms", ".0f"), numbers("days", ".1f"), numbers("GB per GPU", ".1f")]
    return Table(["recipe", "GPUs", *columns, "limited by"], rows).to_markdown()


def assumptions(options: argparse.Namespace) -> str:
    """Return the assumptions of the plan as a paragraph."""
    card = CARDS[options.gpu]
    peak, kind = (card.tf32, "TF32") if options.tf32 else (card.float32, "float32")
    return (
        f"Assumptions: {card.name}; {options.compute_share:.0%} of {peak:g} TFLOP/s in {kind}; "
        f"{options.bandwidth_share:.0%} of {card.memory:g} GB/s memory bandwidth, of {card.link:g} GB/s between the "
        f"{options.gpus_per_machine} GPUs of a machine and of {options.network:g} GB/s between machines; "
        f"{options.launch_us:g} µs per kernel launch."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=CARDS, default="h100")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 4, 8], help="numbers of GPUs")
    parser.add_argument("--gpus-per-machine", type=int, default=8)
    parser.add_argument("--tf32", action="store_true", help="use TF32 (allow_tf32 in a recipe)")
    parser.add_argument("--compute-share", type=float, default=0.4, help="share of the peak that convolutions reach")
    parser.add_argument("--bandwidth-share", type=float, default=0.7, help="share of the peak bandwidths")
    parser.add_argument("--network", type=float, default=50, help="GB/s per GPU between machines, each way")
    parser.add_argument("--launch-us", type=float, default=6, help="microseconds per kernel launch")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/benchmarks.md")
    options = parser.parse_args()
    torch.manual_seed(0)
    unet: Any = binarize.build(RECIPES[0]).train()
    counts = count(unet)
    made = {
        "memory-estimate": memory_table(counts),
        "plan": f"{assumptions(options)}\n\n{plan_table(unet, counts, options)}",
    }
    print("\n\n".join(made.values()))
    if options.write:
        text = PAGE.read_text(encoding="utf-8")
        for name, body in made.items():
            text = replace_between(text, name, body)
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
