"""The nested sections of a recipe: network, method, noise schedule, distillation and published row."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationInfo, model_validator


def _expanded(value: Any) -> Any:
    """Return a path with ``~`` and variables replaced; a name that is left is an error, not a folder's name."""
    if not isinstance(value, str | Path):
        return value
    text = os.path.expandvars(os.path.expanduser(str(value)))
    if not text.strip():
        raise ValueError("is empty; name a file or a folder")
    if text.startswith("~") or re.search(r"\$\w|\$\{", text) or "\0" in text:
        raise ValueError("has a user or a variable that does not exist here; write the path out")
    return Path(text)


UserPath = Annotated[Path, BeforeValidator(_expanded)]
"""A path that a person writes, with ``~`` and ``$VARIABLE``."""


class Section(BaseModel):
    """Base class of a recipe's sections: unknown keys are errors, and values are immutable."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def needs_high_resolution(value: Path | None, info: ValidationInfo) -> Path | None:
    """Check that a key such as ``train_lr_data_dir`` has its ``train_data_dir``."""
    twin = str(info.field_name).replace("lr_", "")
    if value is not None and info.data.get(twin, ...) is None:
        raise ValueError(f"needs {twin}, the folder of the matching high-resolution images")
    return value


class ModelSection(Section):
    """The network before conversion: `binarize.models.SRUNet`'s configuration."""

    class_name: Literal["SRUNet"] = Field(default="SRUNet", alias="class", description="The network's class.")
    in_channels: PositiveInt = Field(default=6, description="Channels of the condition and the noisy image together.")
    out_channels: PositiveInt = Field(default=3, description="Channels of the prediction.")
    base_channels: PositiveInt = Field(default=64, description="Channels of the finest level.")
    channel_mults: tuple[PositiveInt, ...] = Field(default=(1, 2, 4, 8), min_length=1)
    """Channels of each level, finest first, in `base_channels`."""
    res_blocks: PositiveInt = Field(default=2, description="ResBlocks per encoder level; the decoder has one more.")
    norm_groups: PositiveInt = Field(default=16, description="Groups of every GroupNorm.")
    dropout: float = Field(default=0.2, ge=0, lt=1, description="Dropout rate inside every ResBlock.")
    attention_levels: tuple[int, ...] = Field(default=(), description="Levels with self-attention, 0 the finest.")
    resampling: Literal["conv", "pixel", "cp"] = Field(default="cp", description="Layers between levels.")
    fusion: Literal["wide", "concat", "add", "split", "cs"] = Field(default="cs", description="Fusion of skips.")
    num_train_timesteps: PositiveInt | None = None
    """Training timesteps T; must equal the noise schedule's, which is the default."""
    detail_factor: float | None = Field(default=None, gt=0)
    """Adds the condition's fine detail to the input: (condition - its 3x3 mean) times this."""

    def config(self, num_train_timesteps: int) -> dict[str, Any]:
        """Return the keyword arguments of the network's class, with the noise schedule's T."""
        return {**self.model_dump(exclude={"class_name"}), "num_train_timesteps": num_train_timesteps}


class MethodSection(BaseModel):
    """A binarization method and its options; the method checks its options when the model is built."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = Field(description="The registered name.")

    @property
    def spec(self) -> dict[str, Any]:
        """The mapping that `binarize.convert` takes: ``{"name": ..., **options}``."""
        return self.model_dump()


class ProgressiveSection(Section):
    """Progressive binarization: blocks are full precision at first and become binary one after another."""

    blocks: tuple[str, ...] = Field(min_length=1)
    """Globs of modules or binary layers, in the order in which they become binary."""
    until: float = Field(default=0.5, gt=0, le=1, description="Share of the steps after which all are binary.")


class DistillationSection(Section):
    """Knowledge distillation: loss = task * task loss + output * output distance + features * feature distance."""

    teacher: UserPath = Field(description="A trained model: a run's folder, a pipeline's, or a network's.")
    task: float = Field(default=1.0, ge=0, description="Weight of the loss on the training data.")
    output: float = Field(default=1.0, ge=0, description="Weight of the distance of the predictions, by `loss`.")
    features: float = Field(default=0.0, ge=0, description="Weight of the distance of normalised block outputs.")
    blocks: tuple[str, ...] = Field(default=("encoder.*.blocks.*", "middle.*", "decoder.*.blocks.*"), min_length=1)
    """Blocks whose outputs are compared; a star matches one part of a dotted name."""

    @model_validator(mode="after")
    def _teaches(self) -> DistillationSection:
        if self.output == 0 and self.features == 0:
            raise ValueError("output and features are both 0, so the teacher is not used; make one of them positive")
        return self


class PerceptualSection(Section):
    """A perceptual loss: weight * LPIPS of the predicted and the true image is added to the other terms."""

    weight: float = Field(gt=0, description="Weight of LPIPS.")
    net: Literal["alex", "vgg", "squeeze"] = Field(default="squeeze", description="The backbone of LPIPS.")
    backbone: UserPath | None = None
    """File of the backbone's weights; by default they are in torch's cache, or downloaded."""


class NoiseSchedule(Section):
    """What the noise schedules of all tasks have."""

    num_train_timesteps: int = Field(default=1000, ge=1, le=100_000, description="Training timesteps T.")
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    """What the network predicts: the noise, the velocity, or the clean image."""


class SchedulerSection(NoiseSchedule):
    """The noise schedule: the arguments of diffusers' `DDIMScheduler`, with the released settings as defaults."""

    num_train_timesteps: int = Field(default=2000, ge=1, le=100_000, description="Training timesteps T.")
    beta_start: float = Field(default=1e-6, gt=0, lt=1, description="First noise variance.")
    beta_end: float = Field(default=1e-2, gt=0, lt=1, description="Last noise variance.")
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    """Course of the variances from first to last."""
    clip_sample: bool = Field(default=True, description="Clip the predicted image while sampling.")
    clip_sample_range: float = Field(default=1.0, gt=0, description="Largest magnitude after clipping.")
    set_alpha_to_one: bool = Field(default=True, description="Make the last sampling step noise-free.")
    steps_offset: int = Field(default=0, ge=0, description="Added to every sampling timestep.")
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading"
    """Spacing of the sampling timesteps."""
    rescale_betas_zero_snr: bool = Field(default=False, description="Rescale the schedule to end in pure noise.")

    @model_validator(mode="after")
    def _solvable(self) -> SchedulerSection:
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            fix = "set prediction_type to 'v_prediction' or 'sample'"
            raise ValueError(f"rescale_betas_zero_snr ends in pure noise, which epsilon cannot predict; {fix}")
        return self


class Figures(Section):
    """Published quality on one data set: PSNR in dB and SSIM on the luma channel, LPIPS with AlexNet."""

    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None


class PublishedSection(Section):
    """The published row that a recipe reproduces: metadata for tables, not an input of training."""

    source: str = Field(description="Paper, table and row.")
    rows: tuple[str, ...] = Field(default=(), description="Other rows of the same paper that are the same network.")
    params_m: float | None = Field(default=None, gt=0, description="Parameters in millions; a binary one counts 1/32.")
    ops_g: float | None = Field(default=None, gt=0, description="Operations in 10^9 at 3x256x256; binary: 1/64.")
    results: dict[str, Figures] = Field(default_factory=dict, description="Quality by data set.")
