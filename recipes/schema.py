"""`TrainingRecipe`: the keys that the recipes of all tasks have, with their types, defaults and meanings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationInfo, field_validator

from binarize.recipes import sections
from binarize.recipes.sections import UserPath
from binarize.recipes.yaml_text import to_yaml

_WARMED_UP = ("constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
_LR_SCHEDULERS = ("constant", *_WARMED_UP)
_TIMM_LR_SCHEDULERS = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant")
_OPTIMIZERS = ("adam", "adamw")
_TIMM_NAME = re.compile(r"timm/\w+")
DEFAULT_TASK = "super_resolution"
Loss = Literal["l1", "l2", "charbonnier", "psnr"]


class TrainingRecipe(sections.Section):
    """One training run, complete: network, binarizer, noise schedule, data, optimiser and bookkeeping.

    A recipe is immutable and does not depend on the machine. Keys have the names and meanings of diffusers' training
    scripts: `train_batch_size` counts images per process and forward pass, so an optimiser step uses
    ``train_batch_size * gradient_accumulation_steps * processes`` images.

    A task is a class derived from this one, with the keys of its network, data and objective.
    """

    task: ClassVar[str]
    """The value of the key `task`, which is written only if it is not the default, super_resolution."""

    description: str = Field(default="", description="One line for `binarize recipes ls`.")
    published: sections.PublishedSection | None = None
    """The published row that this reproduces."""
    plugins: tuple[str, ...] = Field(default=(), description="Modules or .py files to import, to register methods.")

    scheduler: sections.NoiseSchedule
    """The noise schedule."""
    method: sections.MethodSection | None = None
    """The binarization method: a name, `{name: ..., option: ...}`, or null (no conversion)."""
    structure: Literal["auto", "keep", "cp_cs", "contract"] = "auto"
    """keep: the network's own; cp_cs, contract: with CP-Down, CP-Up and CS-Fusion; auto: the method's choice."""
    keep: tuple[str, ...] | None = Field(default=None, description="Globs of modules that stay full precision.")
    overrides: dict[str, Any] | None = Field(default=None, description="Glob of modules -> their method or options.")
    linear: bool | tuple[str, ...] = Field(default=False, description="Binarize linear layers: true, or name globs.")

    two_stage: float | None = Field(default=None, gt=0, lt=1, description="Share of steps with full-precision weights.")
    progressive: sections.ProgressiveSection | None = None
    """Blocks that become binary one after another: `{blocks: [globs], until: share}`."""
    init_from: UserPath | None = Field(
        default=None, description="Trained network to start from, full precision, binary or packed."
    )

    train_data_dir: UserPath | None = Field(default=None, description="Folder of training images.")
    dataloader_num_workers: NonNegativeInt = Field(default=0, description="Worker processes; 0 loads in this process.")

    output_dir: UserPath = Field(
        default=Path("runs/unnamed"), description="Output folder; default: runs/ and the name."
    )
    seed: NonNegativeInt = Field(default=0, description="Seed of weights, images, timesteps, noise and dropout.")
    train_batch_size: PositiveInt = Field(default=16, description="Images per process and forward pass.")
    gradient_accumulation_steps: PositiveInt = Field(default=1, description="Forward passes per optimiser step.")
    gradient_checkpointing: bool = Field(default=False, description="Recompute activations in the backward pass.")
    memory_mode: Literal["exact", "compact"] = "exact"
    """What binary convolutions keep for the backward pass (see `binarize.memory_mode`)."""
    compile: bool = Field(default=False, description="Run the network through torch.compile.")
    mixed_precision: Literal["no", "fp16", "bf16"] = Field(default="no", description="Autocast precision.")
    allow_tf32: bool = Field(default=False, description="Let CUDA round the inputs of matrix products to TF32.")
    max_train_steps: PositiveInt = Field(default=1_000_000, description="Optimiser steps.")

    loss: Loss = Field(default="l1", description="Loss between prediction and target.")
    snr_gamma: float | None = Field(default=None, gt=0, description="Gamma of Min-SNR timestep weighting (paper: 5).")
    distillation: sections.DistillationSection | None = None
    """Train with a trained network as the teacher: `{teacher: folder, ...}`."""
    timesteps_per: Literal["sample", "batch"] = "sample"
    """Draw one timestep per image, or one for all images of an optimiser step."""
    sampling_timesteps_share: float = Field(default=0.0, ge=0, le=1)
    """Share of samples with a timestep that sampling visits; the others are uniform over all."""

    optimizer: str = Field(default="adam", description="`adam`, `adamw`, or a name of timm, such as `timm/lion`.")
    optimizer_options: dict[str, Any] = Field(default_factory=dict, description="More arguments of the optimiser.")
    learning_rate: float = Field(default=1e-4, gt=0, description="Peak learning rate.")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of the average gradient.")
    adam_beta2: float = Field(default=0.99, ge=0, lt=1, description="Decay of the average squared gradient.")
    adam_weight_decay: float = Field(default=0.0, ge=0, description="Weight decay, of full-precision weights alone.")
    adam_epsilon: float = Field(default=1e-8, gt=0, description="Added to the denominator.")
    max_grad_norm: float | None = Field(default=None, gt=0, description="Clip the gradient to this norm; null: never.")
    lr_scheduler: str = "constant"
    """Learning-rate schedule: one of diffusers, such as `cosine`, or one of timm, such as `timm/cosine`."""
    lr_scheduler_options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of timm's create_scheduler_v2, with steps for epochs, such as `{min_lr: 1e-6}`."""
    lr_warmup_steps: NonNegativeInt = Field(default=0, description="Steps over which the rate rises from 0.")
    lr_num_cycles: PositiveInt = Field(default=1, description="Restarts of cosine_with_restarts.")
    lr_power: float = Field(default=1.0, gt=0, description="Exponent of polynomial.")

    use_ema: bool = Field(default=False, description="Validate and save an average of the weights over the steps.")
    ema_decay: float = Field(default=0.9999, ge=0, lt=1, description="Decay of that average after its warm-up.")

    checkpointing_steps: PositiveInt = Field(default=5000, description="Steps between checkpoints.")
    checkpoints_total_limit: PositiveInt | None = Field(default=3, description="Newest checkpoints kept; null: all.")
    resume_from_checkpoint: str | None = Field(default=None, description="`latest`, or a checkpoint's folder.")

    validation_steps: PositiveInt = Field(default=5000, description="Steps between validations.")
    num_validation_images: PositiveInt = Field(default=4, description="Images that a validation samples.")
    num_inference_steps: PositiveInt = Field(default=50, description="Sampling steps of a validation.")

    report_to: Literal["tensorboard", "wandb"] | None = Field(default=None, description="Experiment tracker.")
    logging_steps: PositiveInt = Field(default=50, description="Steps between log entries; losses are means over them.")

    @field_validator("method", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("report_to", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return None if value == "none" else value

    @field_validator("structure", "keep", "overrides", "linear", "two_stage", "progressive", "memory_mode")
    @classmethod
    def _needs_method(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("method", ...) is None and value not in (None, False, "auto", "exact"):
            raise ValueError("has no effect while method is null; name a method, or remove it")
        return value

    @field_validator("snr_gamma")
    @classmethod
    def _weighs_errors(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("loss") == "psnr":
            reason = "the gradient of loss: psnr does not depend on the scale of the error that Min-SNR weighs"
            raise ValueError(f"{reason}; remove it, or use the loss l1, l2 or charbonnier")
        return value

    @field_validator("optimizer", "lr_scheduler")
    @classmethod
    def _known(cls, value: str, info: ValidationInfo) -> str:
        if info.field_name == "optimizer":
            # The optimiser checks timm's names when it is built, so a recipe can be read without timm.
            allowed: tuple[str, ...] = (*_OPTIMIZERS, "timm/NAME")
            known = value in _OPTIMIZERS or bool(_TIMM_NAME.fullmatch(value))
        else:
            allowed = (*_LR_SCHEDULERS, *(f"timm/{name}" for name in _TIMM_LR_SCHEDULERS))
            known = value in allowed
        if not known:
            raise ValueError(f"must be one of: {', '.join(allowed)}")
        return value

    @field_validator("lr_scheduler_options")
    @classmethod
    def _timm_only(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if value and not info.data.get("lr_scheduler", "timm/").startswith("timm/"):
            raise ValueError("needs one of timm's schedulers, such as lr_scheduler: timm/cosine")
        return value

    @field_validator("lr_warmup_steps")
    @classmethod
    def _warms_up(cls, value: int, info: ValidationInfo) -> int:
        name = info.data.get("lr_scheduler", _WARMED_UP[0])
        if value and name not in _WARMED_UP and not name.startswith("timm/"):
            raise ValueError(f"has no effect with lr_scheduler {name!r}; use one of: {', '.join(_WARMED_UP)}")
        return value

    def to_keys(self) -> dict[str, Any]:
        """Return all keys with their values as JSON has them, defaults included."""
        task = {} if self.task == DEFAULT_TASK else {"task": self.task}
        return {**task, **self.model_dump(mode="json", by_alias=True)}

    def to_yaml(self) -> str:
        """Return the whole recipe as YAML, defaults included; `load_recipe` reads an equal recipe from it."""
        return to_yaml(self.to_keys())
