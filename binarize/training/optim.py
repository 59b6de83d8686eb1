"""The optimiser and the course of its learning rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from binarize import param_groups

if TYPE_CHECKING:
    from binarize.recipes import Recipe

_OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def build_optimizer(recipe: Recipe, model: nn.Module) -> Optimizer:
    """Return the recipe's optimiser over the model's parameters, without weight decay where it would do harm."""
    return _OPTIMIZERS[recipe.optimizer](
        param_groups(model, weight_decay=recipe.adam_weight_decay),
        lr=recipe.learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
    )


def build_lr_scheduler(recipe: Recipe, optimizer: Optimizer) -> LRScheduler:
    """Return the recipe's learning-rate schedule, to be stepped once per optimiser step."""
    return get_scheduler(
        recipe.lr_scheduler,
        optimizer,
        num_warmup_steps=recipe.lr_warmup_steps,
        num_training_steps=recipe.max_train_steps,
        num_cycles=recipe.lr_num_cycles,
        power=recipe.lr_power,
    )
