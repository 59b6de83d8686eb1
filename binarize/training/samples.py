"""The stream of training samples: the patch, timestep and noise of the n-th sample of a run."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from binarize.errors import BinarizeError
from binarize.recipes import Recipe, build_scheduler
from binarize.training.data import RESIDUAL_PATCHES, PairedPatches
from binarize.training.randomness import generator


@dataclass(frozen=True)
class BatchPlan:
    """The split of an optimiser step's samples into processes, forward passes, and samples per process and pass."""

    size: int
    accumulation: int = 1
    processes: int = 1
    rank: int = 0

    @property
    def total(self) -> int:
        """Samples per optimiser step."""
        return self.size * self.accumulation * self.processes

    def indices(self, step: int, forward: int) -> list[int]:
        """Return the global indices of this process's samples in a forward pass of the step after ``step`` steps.

        A step has the same samples, and so the same mean gradient, for every split.
        """
        first = step * self.total + (forward * self.processes + self.rank) * self.size
        return list(range(first, first + self.size))

    def batches(self, steps: range) -> Iterator[list[int]]:
        """Yield the indices of every forward pass of the given steps."""
        return (self.indices(step, forward) for step in steps for forward in range(self.accumulation))


@dataclass
class NoisySamples(Dataset[dict[str, Any]]):
    """Training patches with their timestep and noise, each a function of the sample's global index.

    Timesteps are uniform in 0..``num_train_timesteps`` - 1, except that with probability ``favoured_share`` they are
    uniform in ``favoured``. ``share_timestep`` consecutive samples have the same timestep.
    """

    patches: PairedPatches
    num_train_timesteps: int
    seed: int
    share_timestep: int = 1
    favoured: Sequence[int] = ()
    favoured_share: float = 0.0

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the patch's entries, its ``noise`` (3, P, P) float32 and its ``timestep``."""
        patch = self.patches[index]
        noise = generator(self.seed, "noise", index).standard_normal(tuple(patch["hr"].shape), dtype="float32")
        return {**patch, "noise": torch.from_numpy(noise), "timestep": self._timestep(index // self.share_timestep)}

    def _timestep(self, index: int) -> int:
        draw = generator(self.seed, "timestep", index)
        uniform = int(draw.integers(self.num_train_timesteps))
        if self.favoured_share > draw.random():
            return self.favoured[int(draw.integers(len(self.favoured)))]
        return uniform


def training_samples(recipe: Recipe, plan: BatchPlan) -> NoisySamples:
    """Return the stream of samples of a recipe, or raise an error if its training images cannot be used."""
    if recipe.train_data_dir is None:
        raise BinarizeError("train_data_dir: missing; name the folder of high-resolution training images.")
    length = max(recipe.max_train_steps * plan.total, RESIDUAL_PATCHES)
    options: dict[str, Any] = {"scale": recipe.scale, "augment": recipe.augment, "seed": recipe.seed, "length": length}
    options |= {"patch_size": recipe.resolution, "candidates": recipe.patch_candidates}
    patches = PairedPatches(recipe.train_data_dir, recipe.train_lr_data_dir, **options)
    share = plan.total if recipe.timesteps_per == "batch" else 1
    timesteps = recipe.scheduler.num_train_timesteps
    scheduler = build_scheduler(recipe)
    scheduler.set_timesteps(min(recipe.num_inference_steps, timesteps))
    visited = sorted(set(scheduler.timesteps.tolist()))
    return NoisySamples(patches, timesteps, recipe.seed, share, visited, recipe.sampling_timesteps_share)


def batch_loader(
    samples: NoisySamples, plan: BatchPlan, steps: range, *, workers: int, pin_memory: bool
) -> DataLoader[dict[str, Any]]:
    """Return this process's batches for a range of optimiser steps, in order; 0 workers load in this process."""
    order, start = plan.batches(steps), _ignore_signals
    return DataLoader(samples, batch_sampler=order, num_workers=workers, pin_memory=pin_memory, worker_init_fn=start)


def close(batches: Iterator[dict[str, Any]]) -> None:
    """Stop the workers of an iterator over `batch_loader`; they ignore the signal by which Python ends its children."""
    stop = getattr(batches, "_shutdown_workers", None)  # PyTorch only calls it when the iterator is garbage-collected
    if stop is not None:
        stop()


def _ignore_signals(worker: int) -> None:
    # Ctrl-C and a cluster's SIGTERM reach every process of a run, and the current step still needs its batch.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
