"""`Recipe`: every key of a recipe with its type, default and meaning."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationInfo, field_validator

from binarize.recipes import sections
from binarize.recipes.sections import ModelSection, UserPath
from binarize.recipes.yaml_text import to_yaml

_WARMED_UP = ("constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
_LR_SCHEDULERS = ("constant", *_WARMED_UP)
_TIMM_LR_SCHEDULERS = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant")
_OPTIMIZERS = ("adam", "adamw")
_TIMM_NAME = re.compile(r"timm/\w+")
# Residuals have unit variance and long tails; the released schedule clips predictions to 1.
_MIN_RESIDUAL_CLIP = 5.0


class Recipe(sections.Section):
    """One training run, complete: network, binarizer, noise schedule, data, optimiser and bookkeeping.

    A recipe is immutable and does not depend on the machine. Keys have the names and meanings of diffusers' training
    scripts: `train_batch_size` counts images per process and forward pass, so an optimiser step uses
    ``train_batch_size * gradient_accumulation_steps * processes`` images.
    """

    description: str = Field(default="", description="One line for `binarize recipes ls`.")
    published: sections.PublishedSection | None = None
    """The published row that this reproduces."""
    plugins: tuple[str, ...] = Field(default=(), description="Modules or .py files to import, to register methods.")

    scheduler: sections.SchedulerSection = Field(default_factory=sections.SchedulerSection)
    """The noise schedule."""
    scale: int = Field(ge=2, description="Upscaling factor of each side.")
    model: ModelSection = Field(default_factory=ModelSection, validate_default=True, description="The network.")
    method: sections.MethodSection | None = None
    """The binarization method: a name, `{name: ..., option: ...}`, or null (no conversion)."""
    structure: Literal["auto", "keep", "cp_cs"] = "auto"
    """keep: the network's own structure; cp_cs: CP-Down, CP-Up, CS-Fusion; auto: the method's choice."""
    keep: tuple[str, ...] | None = Field(default=None, description="Globs of modules that stay full precision.")
    overrides: dict[str, Any] | None = Field(default=None, description="Glob of modules -> their method or options.")
    linear: bool | tuple[str, ...] = Field(default=False, description="Binarize linear layers: true, or name globs.")

    two_stage: float | None = Field(default=None, gt=0, lt=1, description="Share of steps with full-precision weights.")
    progressive: sections.ProgressiveSection | None = None
    """Blocks that become binary one after another: `{blocks: [globs], until: share}`."""
    init_from: UserPath | None = Field(
        default=None, description="Trained network to start from, full precision or binary."
    )

    train_data_dir: UserPath | None = Field(default=None, description="Folder of high-resolution training images.")
    train_lr_data_dir: UserPath | None = None
    """Folder of the matching low-resolution images; by default they are made as MATLAB's imresize does."""
    resolution: PositiveInt = Field(default=128, validate_default=True)
    """Side of a training patch in high-resolution pixels."""
    augment: bool = Field(default=True, description="Apply one of the eight flips and rotations to each patch.")
    patch_candidates: PositiveInt = Field(default=1, description="Random positions; the most textured one is used.")
    dataloader_num_workers: NonNegativeInt = Field(default=0, description="Worker processes; 0 loads in this process.")

    output_dir: UserPath = Field(
        default=Path("runs/unnamed"), description="Output folder; default: runs/ and the name."
    )
    seed: NonNegativeInt = Field(default=0, description="Seed of weights, patches, timesteps, noise and dropout.")
    train_batch_size: PositiveInt = Field(default=16, description="Patches per process and forward pass.")
    gradient_accumulation_steps: PositiveInt = Field(default=1, description="Forward passes per optimiser step.")
    gradient_checkpointing: bool = Field(default=False, description="Recompute activations in the backward pass.")
    memory_mode: Literal["exact", "compact"] = "exact"
    """What binary convolutions keep for the backward pass (see `binarize.memory_mode`)."""
    compile: bool = Field(default=False, description="Run the network through torch.compile.")
    mixed_precision: Literal["no", "fp16", "bf16"] = Field(default="no", description="Autocast precision.")
    allow_tf32: bool = Field(default=False, description="Let CUDA round the inputs of matrix products to TF32.")
    max_train_steps: PositiveInt = Field(default=1_000_000, description="Optimiser steps.")

    loss: Literal["l1", "l2", "charbonnier"] = Field(default="l1", description="Loss between prediction and target.")
    target: Literal["image", "residual"] = "image"
    """What is diffused: the image, or (image - upscaled image) / `residual_scale`."""
    residual_scale: float | None = Field(default=None, gt=0, validate_default=True)
    """Standard deviation of the residuals; by default measured on the training images."""
    residual_strength: float = Field(default=1.0, gt=0, description="Factor on sampled residuals; above 1 sharpens.")
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

    validation_data_dir: UserPath | None = Field(
        default=None, description="Folder of high-resolution validation images."
    )
    validation_lr_data_dir: UserPath | None = None
    """Folder of the matching low-resolution images; by default they are made as MATLAB's imresize does."""
    validation_steps: PositiveInt = Field(default=5000, description="Steps between validations.")
    num_validation_images: PositiveInt = Field(default=4, description="Images that a validation upscales.")
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

    @field_validator("model")
    @classmethod
    def _same_timesteps(cls, value: ModelSection, info: ValidationInfo) -> ModelSection:
        scheduler = info.data.get("scheduler")
        given = value.num_train_timesteps
        if scheduler is not None and given is not None and given != scheduler.num_train_timesteps:
            theirs = scheduler.num_train_timesteps
            raise ValueError(f"num_train_timesteps is {given} but the noise schedule's is {theirs}; leave it out")
        return value

    @field_validator("structure", "keep", "overrides", "linear", "two_stage", "progressive", "memory_mode")
    @classmethod
    def _needs_method(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("method", ...) is None and value not in (None, False, "auto", "exact"):
            raise ValueError("has no effect while method is null; name a method, or remove it")
        return value

    _needs_hr = field_validator("train_lr_data_dir", "validation_lr_data_dir")(sections.needs_high_resolution)

    @field_validator("resolution")
    @classmethod
    def _divisible(cls, value: int, info: ValidationInfo) -> int:
        scale, model = info.data.get("scale"), info.data.get("model")
        if scale is not None and value % scale:
            raise ValueError(f"must be a multiple of scale ({scale})")
        if model is not None and value % (factor := 2 ** (len(model.channel_mults) - 1)):
            raise ValueError(f"must be a multiple of {factor}, the factor by which the network downsamples")
        return value

    @field_validator("target")
    @classmethod
    def _unclipped(cls, value: str, info: ValidationInfo) -> str:
        scheduler = info.data.get("scheduler")
        limit = scheduler.clip_sample_range if scheduler is not None and scheduler.clip_sample else math.inf
        if value == "residual" and limit < _MIN_RESIDUAL_CLIP:
            fix = f"set it to {_MIN_RESIDUAL_CLIP:g} or more, or scheduler.clip_sample to false"
            raise ValueError(f"residuals would be clipped at scheduler.clip_sample_range {limit:g}; {fix}")
        return value

    @field_validator("residual_scale", "residual_strength")
    @classmethod
    def _needs_residuals(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value not in (None, 1.0) and info.data.get("target", "residual") != "residual":
            raise ValueError("has no effect while target is image; set target to residual, or remove it")
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

    def to_yaml(self) -> str:
        """Return the whole recipe as YAML, defaults included; `load_recipe` reads an equal recipe from it."""
        return to_yaml(self.model_dump(mode="json", by_alias=True))
