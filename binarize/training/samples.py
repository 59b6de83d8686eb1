"""The stream of training samples: which patch, which timestep and which noise the n-th sample of a run has."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from binarize.errors import BinarizeError
from binarize.recipes import build_scheduler
from binarize.training.data import PairedPatches
from binarize.training.randomness import generator
from binarize.training.residual import PATCHES

if TYPE_CHECKING:
    from binarize.recipes import Recipe


@dataclass(frozen=True)
class BatchPlan:
    """How the samples of an optimiser step are dealt to processes and forward passes.

    Args:
        size: Samples per process and forward pass.
        accumulation: Forward passes per optimiser step.
        processes: Number of processes.
        rank: This process.
    """

    size: int
    accumulation: int = 1
    processes: int = 1
    rank: int = 0

    @property
    def total(self) -> int:
        """Samples per optimiser step."""
        return self.size * self.accumulation * self.processes

    def indices(self, step: int, forward: int) -> list[int]:
        """Return the global numbers of this process's samples.

        A step's samples are the same whatever the split, so their mean gradient is too.

        Args:
            step: Optimiser steps done before.
            forward: Which forward pass of the step, below ``accumulation``.
        """
        first = step * self.total + (forward * self.processes + self.rank) * self.size
        return list(range(first, first + self.size))


class _Batches(Sampler[list[int]]):
    def __init__(self, plan: BatchPlan, start: int, stop: int) -> None:
        self.plan, self.start, self.stop = plan, start, stop

    def __len__(self) -> int:
        return (self.stop - self.start) * self.plan.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.stop):
            for forward in range(self.plan.accumulation):
                yield self.plan.indices(step, forward)


class NoisySamples(Dataset[dict[str, Any]]):
    """Training patches with the timestep and the noise that they meet, all decided by the sample's global number.

    Args:
        patches: The patches; ``patches[n]`` is decided by its own seed and n alone.
        num_train_timesteps: T; timesteps are uniform in 0..T-1.
        seed: The run's seed.
        share_timestep: How many consecutive samples share one timestep: 1, or all of an optimiser step.
        favoured: Timesteps that are drawn more often than the others.
        favoured_share: The probability that one of these is drawn, each alike, instead of any.
    """

    def __init__(
        self,
        patches: PairedPatches,
        num_train_timesteps: int,
        seed: int,
        share_timestep: int = 1,
        favoured: Sequence[int] = (),
        favoured_share: float = 0.0,
    ) -> None:
        self.patches = patches
        self.num_train_timesteps = num_train_timesteps
        self.seed = seed
        self.share_timestep = share_timestep
        self.favoured = tuple(favoured)
        self.favoured_share = favoured_share

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the patch's entries, its ``noise`` (3, P, P) float32 and its ``timestep``."""
        patch = self.patches[index]
        noise = generator(self.seed, "noise", index).standard_normal(tuple(patch["hr"].shape), dtype="float32")
        return {**patch, "noise": torch.from_numpy(noise), "timestep": self._timestep(index // self.share_timestep)}

    def _timestep(self, index: int) -> int:
        draw = generator(self.seed, "timestep", index)
        anywhere = int(draw.integers(self.num_train_timesteps))
        if self.favoured_share > draw.random():
            return self.favoured[draw.integers(len(self.favoured))]
        return anywhere


def training_samples(recipe: Recipe, plan: BatchPlan) -> NoisySamples:
    """Return the stream of samples of a recipe.

    Args:
        recipe: What is run.
        plan: How many samples a step has.

    Raises:
        BinarizeError: If the recipe names no training pictures, or they cannot be read or used.
    """
    if recipe.train_data_dir is None:
        raise BinarizeError(
            "train_data_dir: missing; name the folder of high-resolution training pictures, such as "
            "train_data_dir=DF2K/HR."
        )
    patches = PairedPatches(
        recipe.train_data_dir,
        recipe.train_lr_data_dir,
        scale=recipe.scale,
        patch_size=recipe.resolution,
        augment=recipe.augment,
        seed=recipe.seed,
        candidates=recipe.patch_candidates,
        length=max(recipe.max_train_steps * plan.total, PATCHES),
    )
    share = plan.total if recipe.timesteps_per == "batch" else 1
    timesteps = recipe.scheduler.num_train_timesteps
    scheduler = build_scheduler(recipe)
    scheduler.set_timesteps(min(recipe.num_inference_steps, timesteps))
    visited = sorted(set(scheduler.timesteps.tolist()))
    return NoisySamples(patches, timesteps, recipe.seed, share, visited, recipe.sampling_timesteps_share)


def batch_loader(
    samples: NoisySamples, plan: BatchPlan, start: int, stop: int, *, workers: int, pin_memory: bool
) -> DataLoader[dict[str, Any]]:
    """Return this process's batches for the optimiser steps from ``start`` up to ``stop``, in order.

    Args:
        samples: The stream.
        plan: How it is dealt out.
        start: First step.
        stop: First step that is not wanted.
        workers: Processes that prepare batches; 0 prepares them in this one.
        pin_memory: Put batches into page-locked memory, from which CUDA copies asynchronously.
    """
    return DataLoader(
        samples,
        batch_sampler=_Batches(plan, start, stop),
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_outlive_signals,
    )


def close(batches: Iterator[dict[str, Any]]) -> None:
    """Stop the processes behind an iterator over `batch_loader`.

    They outlive the signal by which Python ends its children, so a program that left them would wait for ever.
    """
    stop = getattr(batches, "_shutdown_workers", None)  # PyTorch does it when the iterator is forgotten, and only then
    if stop is not None:
        stop()


def _outlive_signals(worker: int) -> None:
    # Ctrl-C and a cluster's SIGTERM reach every process of a run; the step that is under way needs its batch.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
