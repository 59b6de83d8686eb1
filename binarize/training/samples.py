"""The stream of training samples: the image, timestep and noise of the n-th sample of a run."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from binarize.errors import BinarizeError
from binarize.randomness import generator
from binarize.recipes import TrainingRecipe, build_scheduler
from binarize.training.inputs import inputs_of


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
    """Training images with their timestep and noise, each a function of the sample's global index.

    An item of ``data`` is a dict; its entry ``clean`` is the image that gets the noise. Timesteps are uniform in
    0..``num_train_timesteps`` - 1, except that with probability ``favoured_share`` they are uniform in ``favoured``.
    ``share_timestep`` consecutive samples have the same timestep.
    """

    data: Dataset[dict[str, Any]]
    clean: str
    num_train_timesteps: int
    seed: int
    share_timestep: int = 1
    favoured: Sequence[int] = ()
    favoured_share: float = 0.0

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the image's entries, its ``noise``, float32 of its shape, and its ``timestep``."""
        item = self.data[index]
        noise = generator(self.seed, "noise", index).standard_normal(tuple(item[self.clean].shape), dtype="float32")
        return {**item, "noise": torch.from_numpy(noise), "timestep": self._timestep(index // self.share_timestep)}

    def _timestep(self, index: int) -> int:
        draw = generator(self.seed, "timestep", index)
        uniform = int(draw.integers(self.num_train_timesteps))
        if self.favoured_share > draw.random():
            return self.favoured[int(draw.integers(len(self.favoured)))]
        return uniform


def noisy_samples(recipe: TrainingRecipe, plan: BatchPlan, data: Dataset[dict[str, Any]]) -> NoisySamples:
    """Return the stream of samples of a recipe's training images."""
    share = plan.total if recipe.timesteps_per == "batch" else 1
    timesteps, visited = recipe.scheduler.num_train_timesteps, list[int]()
    if recipe.sampling_timesteps_share > 0:
        visited = _visited(recipe, timesteps)
    clean = inputs_of(recipe).tensors[0]
    return NoisySamples(data, clean, timesteps, recipe.seed, share, visited, recipe.sampling_timesteps_share)


def _visited(recipe: TrainingRecipe, timesteps: int) -> list[int]:
    scheduler = build_scheduler(recipe)
    scheduler.set_timesteps(min(recipe.num_inference_steps, timesteps))
    visited = sorted(set(scheduler.timesteps.tolist()))
    if any(timestep != int(timestep) for timestep in visited):
        between = f"{type(scheduler).__name__} samples between training timesteps"
        raise BinarizeError(f"sampling_timesteps_share: {between}; use a scheduler such as DDIMScheduler, or 0.")
    return [int(timestep) for timestep in visited]


def batch_loader(
    samples: NoisySamples, plan: BatchPlan, steps: range, *, workers: int, pin_memory: bool
) -> DataLoader[dict[str, Any]]:
    """Return this process's batches for a range of optimiser steps, in order; 0 workers load in this process."""
    order, start = plan.batches(steps), _ignore_signals
    return DataLoader(samples, batch_sampler=order, num_workers=workers, pin_memory=pin_memory, worker_init_fn=start)


def to_device(
    batch: dict[str, Any], tensors: Sequence[str], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the named tensors of a batch with its noise and timesteps on a device, and floats in the given dtype."""
    found = {name: batch[name] for name in (*tensors, "noise", "timestep")}
    dtypes = {name: dtype if tensor.is_floating_point() else tensor.dtype for name, tensor in found.items()}
    return {name: tensor.to(device, dtypes[name], non_blocking=True) for name, tensor in found.items()}


def close(batches: Iterator[dict[str, Any]]) -> None:
    """Stop the workers of an iterator over `batch_loader`; they ignore the signal by which Python ends its children."""
    stop = getattr(batches, "_shutdown_workers", None)  # PyTorch only calls it when the iterator is garbage-collected
    if stop is not None:
        stop()


def _ignore_signals(worker: int) -> None:
    # Ctrl-C and a cluster's SIGTERM reach every process of a run, and the current step still needs its batch.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
