"""Check that a run may resume: which keys of the recipe may have changed since the checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from binarize.errors import BinarizeError, listing
from binarize.layers.schedule import Scheduled
from binarize.recipes import TrainingRecipe, build_model, recipe_class

# Keys that do not change the trained weights. Sampling steps do if `sampling_timesteps_share` is positive.
BOOKKEEPING = {
    "description", "published", "plugins", "output_dir", "dataloader_num_workers", "gradient_checkpointing",
    "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "validation_data_dir",
    "validation_lr_data_dir", "validation_steps", "num_validation_images", "num_inference_steps", "report_to",
    "logging_steps", "residual_strength", "guidance_scale", "overshoot",
}  # fmt: skip
# Keys that may change in addition when a run moves to another machine. The batch is compared as a whole.
_RESUMABLE = BOOKKEEPING | {
    "init_from", "compile", "distillation.teacher", "perceptual.backbone", "train_data_dir", "train_lr_data_dir",
    "train_batch_size", "vae", "gradient_accumulation_steps", "memory_mode", "mixed_precision", "allow_tf32",
}  # fmt: skip


def check_resumable(
    recipe: TrainingRecipe, total: int, saved: dict[str, Any], saved_total: int, checkpoint: Path
) -> None:
    """Check that the keys of a checkpoint's recipe differ only in keys that do not change the result.

    ``max_train_steps`` may change if nothing depends on it. The totals are samples per optimiser step.
    """
    free = _RESUMABLE | (set() if _depends_on_length(recipe) else {"max_train_steps"})
    if recipe.sampling_timesteps_share > 0:
        free = free - {"num_inference_steps"}
    changed = changes(with_defaults(saved), recipe.to_keys(), free)
    if total != saved_total:
        factors = "train_batch_size * gradient_accumulation_steps * processes"
        changed.append(f"samples per optimiser step: were {saved_total}, are {total}; they are {factors}")
    if changed:
        opening = f"cannot resume from {checkpoint}: the recipe differs in keys that change the result:"
        closing = "Set these back, or start a new run in another output_dir."
        raise BinarizeError(listing(opening, changed, closing))


def check_same_images(now: Mapping[str, str], then: Mapping[str, str] | None, checkpoint: Path) -> None:
    """Check that the training data are those of a checkpoint: name -> digest, or None where it did not keep them."""
    if then is None or now == then:
        return
    found = image_changes(then, now)
    fix = "Restore them, or start a new run from this one's model with init_from"
    raise BinarizeError(f"cannot resume from {checkpoint}: the training data are not those of the run: {found}. {fix}.")


def image_changes(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return how digests of images, by name, differ; an empty string if they are the same."""
    kinds = (
        ("new", now.keys() - then.keys()),
        ("missing", then.keys() - now.keys()),
        ("changed", {name for name in now.keys() & then.keys() if now[name] != then[name]}),
    )
    return "; ".join(f"{len(names)} {kind}, such as {min(names):.80}" for kind, names in kinds if names)


def changes(then: Mapping[str, Any], now: Mapping[str, Any], ignored: Collection[str] = ()) -> list[str]:
    """Return the differences of two nested mappings as ``"key: was x, is y"``, without ignored keys and sections."""
    old, new = _flat(then), _flat(now)
    return [
        f"{key}: was {old.get(key)!r}, is {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if key not in ignored and key.split(".")[0] not in ignored and old.get(key) != new.get(key)
    ]


def with_defaults(saved: dict[str, Any]) -> dict[str, Any]:
    """Return a stored recipe with the defaults of top-level keys that its version did not have."""
    fields = recipe_class(saved, "recipe").model_fields.items()
    values = {name: f.get_default(call_default_factory=True) for name, f in fields if not f.is_required()}
    return {**TypeAdapter(Any).dump_python(values, mode="json"), **saved}


def _depends_on_length(recipe: TrainingRecipe) -> bool:
    """Whether a step depends on ``max_train_steps``: by the learning rate, stages or a method's schedule."""
    if not recipe.lr_scheduler.startswith("constant") or recipe.two_stage or recipe.progressive:
        return True
    with torch.device("meta"):
        network = build_model(recipe)
    return any(isinstance(module, Scheduled) for module in network.modules())


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(data, Mapping):
        return {prefix: data}
    parts = (_flat(value, f"{prefix}.{key}" if prefix else key) for key, value in data.items())
    return {key: value for part in parts for key, value in part.items()}
