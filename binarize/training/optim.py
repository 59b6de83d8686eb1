"""The optimiser and its learning-rate schedule."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from binarize.conversion.export import param_groups
from binarize.errors import BinarizeError, did_you_mean
from binarize.recipes import TrainingRecipe

_OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
_TIMM = "timm/"


class TimmSchedule:
    """Gives a schedule of timm, which does not count updates, the interface of torch's `LRScheduler`.

    The loop's step cannot be the count, because a loss scaler skips updates.
    """

    def __init__(self, schedule: Any) -> None:
        self.schedule, self.updates = schedule, 0
        schedule.step_update(0)

    def step(self) -> None:
        """Set the rate of the next optimiser step."""
        self.load_state_dict({"updates": self.updates + 1})

    def state_dict(self) -> dict[str, int]:
        """Return the number of updates."""
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue from a number of updates."""
        self.updates = state_dict["updates"]
        self.schedule.step_update(self.updates)


def build_optimizer(recipe: TrainingRecipe, model: nn.Module) -> Optimizer:
    """Return the recipe's optimiser, with weight decay only for the parameters that `param_groups` gives it."""
    groups = param_groups(model, weight_decay=recipe.adam_weight_decay)
    betas, options = (recipe.adam_beta1, recipe.adam_beta2), recipe.optimizer_options
    try:
        arguments = {"lr": recipe.learning_rate, "betas": betas, "eps": recipe.adam_epsilon, **options}
        if recipe.optimizer.startswith(_TIMM):
            return _timm_optimizer(recipe, groups, arguments)
        return _OPTIMIZERS[recipe.optimizer](groups, **arguments)
    except BinarizeError:
        raise
    except (TypeError, ValueError, AssertionError) as error:
        given = f"optimizer_options {options}"
        raise BinarizeError(f"optimizer: {recipe.optimizer} cannot be built with {given}: {error}.") from error


def _timm_optimizer(recipe: TrainingRecipe, groups: list[dict[str, Any]], options: dict[str, Any]) -> Optimizer:
    _require_timm("optimizer", recipe.optimizer)
    from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers

    name = recipe.optimizer.removeprefix(_TIMM)
    plain = name.lower().removeprefix("lookahead_")
    known = [str(one) for one in list_optimizers()]
    if plain not in known:
        hint = did_you_mean(plain, known)
        raise BinarizeError(f"optimizer: timm has no optimiser {name!r}; it has {', '.join(known)}.{hint}")
    info = get_optimizer_info(plain)
    if info.second_order:
        raise BinarizeError(f"optimizer: {recipe.optimizer} needs second-order gradients; choose another.")
    if info.has_betas and info.num_betas != 2 and "betas" not in recipe.optimizer_options:
        options.pop("betas")  # the optimiser has defaults for another number of them
    # Some optimisers fail on empty groups.
    return create_optimizer_v2([group for group in groups if group["params"]], name, **options)


def build_lr_scheduler(recipe: TrainingRecipe, optimizer: Optimizer) -> LRScheduler | TimmSchedule:
    """Return the recipe's learning-rate schedule, to be stepped once per optimiser step."""
    if not recipe.lr_scheduler.startswith(_TIMM):
        steps = {"num_warmup_steps": recipe.lr_warmup_steps, "num_training_steps": recipe.max_train_steps}
        shape: dict[str, Any] = {"num_cycles": recipe.lr_num_cycles, "power": recipe.lr_power}
        return get_scheduler(recipe.lr_scheduler, optimizer, **steps, **shape)
    _require_timm("lr_scheduler", recipe.lr_scheduler)
    from timm.scheduler import create_scheduler_v2

    # With one update per epoch, timm counts every length in optimiser steps.
    units = {"step_on_epochs": False, "updates_per_epoch": 1}
    lengths = {"num_epochs": recipe.max_train_steps, "warmup_epochs": recipe.lr_warmup_steps}
    arguments = {**lengths, "warmup_lr": 0.0, "noise_seed": recipe.seed, **recipe.lr_scheduler_options, **units}
    try:
        schedule, _ = create_scheduler_v2(optimizer, recipe.lr_scheduler.removeprefix(_TIMM), **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        given = f"lr_scheduler_options {recipe.lr_scheduler_options}"
        raise BinarizeError(f"lr_scheduler: {recipe.lr_scheduler} cannot be built with {given}: {error}.") from error
    return TimmSchedule(schedule)


def _require_timm(key: str, value: str) -> None:
    if importlib.util.find_spec("timm") is None:
        raise BinarizeError(f"{key}: {value} needs timm: pip install 'binarize-diffusion[train]'.")
