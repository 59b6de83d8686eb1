"""What training the released recipes takes, on paper: memory by size and batch, operations, and steps a second by GPUs.

Nothing that this prints was measured. Operations come from `binarize.summary`; memory and traffic are counted while one
sample goes through the network on this CPU, forward and backward, in plain PyTorch as it would on a GPU; speeds are
assumptions, which the options change.

    python benchmarks/plan_training.py                        # about a minute
    python benchmarks/plan_training.py --gpu a100 --tf32 --compute-share 0.5
    python benchmarks/plan_training.py --write                # also into docs/scaling.md
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tables import replace_between, rows_to_markdown
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import binarize
from binarize.kernels import backends
from binarize.kernels.autograd import Memory
from binarize.recipes import load_recipe

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
RECIPES = ("bidiffsr_x2", "bidiffsr_x4")
# Sides at which a sample is counted; what grows with pixels and what does not follow from the two.
SIDES = (32, 64)
MODES: tuple[Memory, ...] = ("exact", "compact")
# Maps of the finest level that are alive at once in the middle of a step: a gradient, and what is made from it.
MAPS, WIDTH = 4, 64
# Where a picture is kept in memory: what plain PyTorch does is what a GPU does; the compiled steps run on CPUs alone.
BACKENDS: tuple[backends.Backend, ...] = ("torch", "auto")
SHAPES = ((64, 16), (128, 1), (128, 4), (128, 16), (256, 1), (256, 4), (256, 16))


class Card(NamedTuple):
    """What a vendor's data sheet says of a GPU.

    Attributes:
        name: What it is called.
        float32: Dense TFLOP/s.
        tf32: Dense TFLOP/s in tensor cores.
        memory: GB/s of its memory.
        link: GB/s each way to the other GPUs of its machine.
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
    """A count that has one part for each pixel of a sample and one that does not depend on it."""

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
    """Counts calls of PyTorch's operators that compute, and the bytes that those beside products read and write."""

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
    """What a step of one sample keeps and moves.

    Attributes:
        saved: Bytes that autograd keeps between forward and backward, by backend and memory mode.
        moved: Bytes that operators beside products read and write, each being a pass over memory of its own.
        calls: Operators that are run, however large the batch.
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
    with Traffic() as traffic:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = unet(sample, torch.tensor([700]), condition).sample.abs().mean()
        loss.backward()
    unet.zero_grad()
    return float(sum(storages.values())), traffic


def macs(unet: nn.Module, side: int) -> float:
    """Return the multiply-accumulates of one sample's forward; binary ones count whole, being float products here."""
    picture = torch.empty(1, 3, side, side, device="meta")
    steps = torch.zeros(1, dtype=torch.long, device="meta")
    return float(sum(binarize.summary(unet, (picture, steps, picture)).macs_by_bits.values()))


def memory(counts: Counts, side: int, batch: int, backend: str, mode: str) -> float:
    """Return bytes of a step: weights, gradients and Adam's two moments, what autograd keeps, and maps in passing."""
    passing = MAPS * WIDTH * 4 * side**2 * batch
    return 4 * counts.weights + counts.saved[backend, mode].at(side, batch) + passing


class Step(NamedTuple):
    """What a step takes, in seconds, and how many samples one GPU has of it."""

    each: int
    products: float
    passes: float
    launches: float
    exchange: float

    @property
    def seconds(self) -> float:
        """Of the whole step: GPU and launches overlap, and the exchange with the backward, two thirds of the step."""
        busy = max(self.products + self.passes, self.launches)
        return busy + max(0.0, self.exchange - busy * 2 / 3)

    @property
    def limit(self) -> str:
        """What takes longest."""
        on_the_gpu = self.products + self.passes
        if self.exchange > max(on_the_gpu, self.launches) * 2 / 3:
            return "gradient exchange"
        if self.launches > on_the_gpu:
            return "kernel launches"
        return "products" if self.products > self.passes else "memory bandwidth"


def plan(counts: Counts, forward: float, side: int, gpus: int, batch: int, given: argparse.Namespace) -> Step:
    """Return what a step of ``batch`` samples takes on ``gpus`` of a kind, each of which has the same number of them.

    Args:
        counts: Of the network.
        forward: MACs of a sample.
        side: Of a patch.
        gpus: How many.
        batch: Samples of a step.
        given: Assumptions, from the command line.
    """
    card, each = CARDS[given.gpu], batch // gpus
    peak = card.tf32 if given.tf32 else card.float32
    flops = 2 * 3 * forward * each  # the backward is two products of the forward's size
    adam = 7 * counts.weights  # reads weights, gradients and both moments, writes all but the gradients
    link = card.link if gpus <= given.gpus_a_machine else given.network
    return Step(
        each,
        flops / (peak * 1e12 * given.compute_share),
        (counts.moved.at(side, each) + adam) / (card.memory * 1e9 * given.bandwidth_share),
        counts.calls * given.launch_us * 1e-6,
        2 * (gpus - 1) / gpus * counts.weights / (link * 1e9 * given.bandwidth_share),
    )


def memory_table(unet: nn.Module, counts: Counts) -> str:
    """Return memory and operations by size and batch."""
    head = ["pixels, batch", "TMAC forward", "with backward"]
    names = {"torch": "GPU", "auto": "CPU"}
    head += [f"{names[backend]}, {mode}, GB" for backend in BACKENDS for mode in MODES]
    rows = []
    for side, batch in SHAPES:
        forward = macs(unet, side) * batch / 1e12
        held = (memory(counts, side, batch, *key) / 1e9 for key in counts.saved)
        rows.append([f"{side}x{side}, {batch}", f"{forward:.2f}", f"{3 * forward:.2f}", *(f"{gb:.1f}" for gb in held)])
    return rows_to_markdown(head, rows)


def plan_table(unet: nn.Module, counts: Counts, name: str, given: argparse.Namespace) -> str:
    """Return the plan of a recipe on several numbers of GPUs."""
    recipe = load_recipe(name)
    side, batch, steps = recipe.resolution, recipe.train_batch_size, recipe.max_train_steps
    forward = macs(unet, side)
    head = [
        "GPUs, batch",
        "steps",
        "samples each",
        "products, ms",
        "passes",
        "launches",
        "exchange",
        "step, ms",
        "days",
    ]
    head += ["GB a GPU", "cores to decode", "limited by"]
    rows = []
    for gpus in given.gpus:
        larger = batch * math.ceil(gpus / batch)
        while larger % gpus:
            larger += batch
        step = plan(counts, forward, side, gpus, larger, given)
        count_of_steps = steps * batch // larger
        held = memory(counts, side, step.each, "torch", "exact") + (counts.weights if gpus > 1 else 0)  # buckets
        rows.append(
            [
                f"{gpus}, {larger}",
                f"{count_of_steps:,}",
                step.each,
                *(f"{1e3 * part:.1f}" for part in step[1:]),
                f"{1e3 * step.seconds:.0f}",
                f"{count_of_steps * step.seconds / 86400:.1f}",
                f"{held / 1e9:.1f}",
                f"{larger / step.seconds * given.decode_ms / 1e3:.0f}",
                step.limit,
            ]
        )
    return f"`{name}`: patches of {side}, {steps:,} steps of {batch}\n\n{rows_to_markdown(head, rows)}"


def assumptions(given: argparse.Namespace) -> str:
    """Return what the plan takes for granted, as one paragraph."""
    card = CARDS[given.gpu]
    peak, kind = (card.tf32, "TF32") if given.tf32 else (card.float32, "float32")
    return (
        f"Computed, not measured. Assumed: {card.name}, {peak:g} TFLOP/s in {kind} of which {given.compute_share:.0%} "
        f"are reached, {card.memory:g} GB/s of memory, {card.link:g} GB/s between the {given.gpus_a_machine} GPUs of a "
        f"machine and {given.network:g} GB/s to others, of each of which {given.bandwidth_share:.0%} are reached, "
        f"{given.launch_us:g} µs to launch an operator, {given.decode_ms:g} ms to decode a training picture."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=CARDS, default="h100")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 4, 8, 16, 64], help="numbers of GPUs to plan for")
    parser.add_argument("--gpus-a-machine", type=int, default=8)
    parser.add_argument("--tf32", action="store_true", help="products in TF32 (allow_tf32 in a recipe)")
    parser.add_argument("--compute-share", type=float, default=0.4, help="of the peak that convolutions reach")
    parser.add_argument("--bandwidth-share", type=float, default=0.7, help="of the peak that memory and links reach")
    parser.add_argument("--network", type=float, default=50, help="GB/s each way and GPU between machines")
    parser.add_argument("--launch-us", type=float, default=6, help="microseconds to launch an operator")
    parser.add_argument("--decode-ms", type=float, default=100, help="milliseconds to decode a training picture")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/scaling.md")
    given = parser.parse_args()
    torch.manual_seed(0)
    unet: Any = binarize.build(RECIPES[0]).train()
    counts = count(unet)
    plans = "\n\n".join(plan_table(unet, counts, name, given) for name in RECIPES)
    made = {"memory": memory_table(unet, counts), "plan": f"{assumptions(given)}\n\n{plans}"}
    print("\n\n".join(made.values()))
    if given.write:
        text = PAGE.read_text(encoding="utf-8")
        for name, body in made.items():
            text = replace_between(text, name, body)
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
