"""Whether a run may go on from a checkpoint: what of the recipe may have changed since, and what may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import TypeAdapter

from binarize.errors import BinarizeError
from binarize.layers.schedule import Scheduled
from binarize.recipes import Recipe, build_model

# Keys that leave the mathematics alone, or that a move to another machine asks for. The batch is compared as a whole.
_FREE = {
    "description", "published", "plugins", "output_dir", "init_from", "compile", "distillation.teacher",
    "train_data_dir", "train_lr_data_dir", "dataloader_num_workers", "train_batch_size",
    "gradient_accumulation_steps", "gradient_checkpointing", "memory_mode", "mixed_precision", "allow_tf32",
    "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "validation_data_dir",
    "validation_lr_data_dir", "residual_strength",
    "validation_steps", "num_validation_images", "num_inference_steps", "report_to", "logging_steps",
}  # fmt: skip


def check_resumable(recipe: Recipe, total: int, saved: str, saved_total: int, checkpoint: Path) -> None:
    """Refuse to go on from a checkpoint of a recipe that differs where it matters.

    ``max_train_steps`` may change while neither the learning rate nor the network's stages depend on it.

    Args:
        recipe: The recipe now.
        total: Samples per optimiser step now.
        saved: The checkpoint's recipe as YAML.
        saved_total: Samples per optimiser step then.
        checkpoint: Its folder, for the error.

    Raises:
        BinarizeError: Listing every difference that matters.
    """
    free = _FREE | (set() if _knows_the_end(recipe) else {"max_train_steps"})
    if recipe.sampling_timesteps_share > 0:
        free = free - {"num_inference_steps"}
    then, now = _flat(with_defaults(yaml.safe_load(saved))), _flat(yaml.safe_load(recipe.to_yaml()))
    changed = [
        f"  {key}: was {then.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(then.keys() | now.keys())
        if key not in free and key.split(".")[0] not in free and then.get(key) != now.get(key)
    ]
    if total != saved_total:
        changed.append(
            f"  samples per optimiser step: were {saved_total}, are {total}; they are train_batch_size * "
            "gradient_accumulation_steps * processes"
        )
    if changed:
        opening = f"cannot resume from {checkpoint}: the recipe differs in what decides the result:"
        closing = "Set these back, or start a new run in another output_dir."
        raise BinarizeError("\n".join([opening, *changed, closing]))


def with_defaults(saved: dict[str, Any]) -> dict[str, Any]:
    """Return a stored recipe with the top-level keys that its release did not have yet, as they do nothing."""
    fields = Recipe.model_fields.items()
    values = {name: f.get_default(call_default_factory=True) for name, f in fields if not f.is_required()}
    return {**TypeAdapter(Any).dump_python(values, mode="json"), **saved}


def _knows_the_end(recipe: Recipe) -> bool:
    """Say whether what a step does depends on how many there are: by learning rate, stages or a method's schedule."""
    if not recipe.lr_scheduler.startswith("constant") or recipe.two_stage or recipe.progressive:
        return True
    with torch.device("meta"):
        network = build_model(recipe)
    return any(isinstance(module, Scheduled) for module in network.modules())


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(data, dict):
        return {prefix: data}
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat.update(_flat(value, f"{prefix}.{key}" if prefix else key))
    return flat
