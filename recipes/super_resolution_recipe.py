"""`Recipe`: the keys of a recipe for super-resolution."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field, PositiveInt, ValidationInfo, field_validator

from binarize.recipes import sections
from binarize.recipes.degradation import Degradation
from binarize.recipes.schema import DEFAULT_TASK, TrainingRecipe
from binarize.recipes.sections import ModelSection, UserPath

# Residuals have unit variance and long tails; the released schedule clips predictions to 1.
_MIN_RESIDUAL_CLIP = 5.0


class Recipe(TrainingRecipe):
    """A training run for super-resolution: a network learns to upscale the images of a folder."""

    task: ClassVar[str] = DEFAULT_TASK

    scheduler: sections.SchedulerSection = Field(default_factory=sections.SchedulerSection)
    """The noise schedule."""
    scale: int = Field(ge=2, description="Upscaling factor of each side.")
    model: ModelSection = Field(default_factory=ModelSection, validate_default=True, description="The network.")

    train_lr_data_dir: UserPath | None = None
    """Folder of the low-resolution training images; by default they are made as `degradation` says."""
    degradation: Degradation = Degradation()
    """How low-resolution images are made: `bicubic` (MATLAB's imresize), `photo`, or a list of steps."""
    resolution: PositiveInt = Field(default=128, validate_default=True)
    """Side of a training patch in high-resolution pixels."""
    augment: bool = Field(default=True, description="Apply one of the eight flips and rotations to each patch.")
    patch_candidates: PositiveInt = Field(default=1, description="Random positions; the most textured one is used.")

    target: Literal["image", "residual"] = "image"
    """What is diffused: the image, or (image - upscaled image) / `residual_scale`."""
    residual_scale: float | None = Field(default=None, gt=0, validate_default=True)
    """Standard deviation of the residuals; by default measured on the training images."""
    residual_strength: float = Field(default=1.0, gt=0, description="Factor on sampled residuals; above 1 sharpens.")
    overshoot: float | None = Field(default=None, ge=0, le=1)
    """How far samples may leave the levels of the pixels around, as a share of their range; null: no limit."""

    perceptual: sections.PerceptualSection | None = None
    """Add LPIPS of the predicted image to the loss: `{weight: 0.3}`."""

    validation_data_dir: UserPath | None = Field(
        default=None, description="Folder of high-resolution validation images."
    )
    validation_lr_data_dir: UserPath | None = None
    """Folder of the matching low-resolution images; by default they are made as `degradation` says."""

    @field_validator("model")
    @classmethod
    def _same_timesteps(cls, value: ModelSection, info: ValidationInfo) -> ModelSection:
        scheduler = info.data.get("scheduler")
        given = value.num_train_timesteps
        if scheduler is not None and given is not None and given != scheduler.num_train_timesteps:
            theirs = scheduler.num_train_timesteps
            raise ValueError(f"num_train_timesteps is {given} but the noise schedule's is {theirs}; leave it out")
        return value

    _needs_hr = field_validator("train_lr_data_dir", "validation_lr_data_dir")(sections.needs_high_resolution)

    @field_validator("degradation")
    @classmethod
    def _degrades(cls, value: Degradation, info: ValidationInfo) -> Degradation:
        if value.root and info.data.get("train_lr_data_dir") is not None:
            raise ValueError("has no effect on the images of train_lr_data_dir; remove one of them")
        return value

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

    @field_validator("perceptual")
    @classmethod
    def _predicts_images(
        cls, value: sections.PerceptualSection | None, info: ValidationInfo
    ) -> sections.PerceptualSection | None:
        scheduler = info.data.get("scheduler")
        if value is not None and scheduler is not None and scheduler.prediction_type != "sample":
            raise ValueError("needs a network that predicts images; set scheduler.prediction_type to 'sample'")
        return value

    @field_validator("residual_scale", "residual_strength")
    @classmethod
    def _needs_residuals(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value not in (None, 1.0) and info.data.get("target", "residual") != "residual":
            raise ValueError("has no effect while target is image; set target to residual, or remove it")
        return value
