"""The nested sections of a recipe: the network, the binarizer, the noise schedule and the published row."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator


class Section(BaseModel):
    """What every part of a recipe shares: unknown keys are errors, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


class ModelSection(Section):
    """The network before conversion: `binarize.models.SRUNet`'s configuration."""

    class_name: Literal["SRUNet"] = Field(default="SRUNet", alias="class", description="The network's class.")
    in_channels: PositiveInt = Field(default=6, description="Channels of the condition and the noisy picture together.")
    out_channels: PositiveInt = Field(default=3, description="Channels of the prediction.")
    base_channels: PositiveInt = Field(default=64, description="Width of the finest level.")
    channel_mults: tuple[PositiveInt, ...] = Field(
        default=(1, 2, 4, 8), min_length=1, description="Width of each level, finest first, in `base_channels`."
    )
    res_blocks: PositiveInt = Field(
        default=2, description="ResBlocks a level in the encoder; the decoder has one more."
    )
    norm_groups: PositiveInt = Field(default=16, description="Groups of every GroupNorm.")
    dropout: float = Field(default=0.2, ge=0, lt=1, description="Share of activations dropped inside every ResBlock.")
    attention_levels: tuple[int, ...] = Field(default=(), description="Levels with self-attention, 0 the finest.")
    resampling: Literal["conv", "pixel", "cp"] = Field(default="cp", description="How levels are joined.")
    fusion: Literal["wide", "concat", "add", "split", "cs"] = Field(
        default="cs", description="How a skip enters the decoder."
    )
    num_train_timesteps: PositiveInt | None = Field(
        default=None, description="Training timesteps T; unset, it is the noise schedule's, and it must equal it."
    )
    detail_factor: float | None = Field(
        default=None,
        gt=0,
        description="Show the network the condition's fine detail as well, (condition - its 3x3 mean) times this.",
    )

    def config(self, num_train_timesteps: int) -> dict[str, Any]:
        """Return the keyword arguments of the network's class.

        Args:
            num_train_timesteps: The noise schedule's T.
        """
        return {**self.model_dump(exclude={"class_name"}), "num_train_timesteps": num_train_timesteps}


class MethodSection(BaseModel):
    """A binarization method and its options; the options are checked by the method itself when the model is built."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = Field(description="The registered name.")

    @property
    def spec(self) -> dict[str, Any]:
        """The mapping that `binarize.convert` takes: ``{"name": ..., **options}``."""
        return self.model_dump()


class ProgressiveSection(Section):
    """Progressive binarization: blocks become binary one after another, and compute in full precision before."""

    blocks: tuple[str, ...] = Field(
        min_length=1, description="Globs on names of modules or binary layers, in the order in which they turn binary."
    )
    until: float = Field(default=0.5, gt=0, le=1, description="Share of the steps after which the last one is binary.")


class DistillationSection(Section):
    """Knowledge distillation: the loss is task * loss + output * distance of outputs + features * that of features."""

    teacher: Path = Field(description="A trained model: a run's folder, a pipeline's, or a network's.")
    task: float = Field(default=1.0, ge=0, description="Weight of the loss against the data.")
    output: float = Field(
        default=1.0, ge=0, description="Weight of the distance of the two predictions, by the recipe's `loss`."
    )
    features: float = Field(
        default=0.0,
        ge=0,
        description="Weight of the mean squared distance of blocks' outputs, each scaled to unit norm a sample.",
    )
    blocks: tuple[str, ...] = Field(
        default=("encoder.*.blocks.*", "middle.*", "decoder.*.blocks.*"),
        min_length=1,
        description="Names of the blocks whose outputs are compared; a star stands for one step of a name.",
    )

    @model_validator(mode="after")
    def _teaches(self) -> DistillationSection:
        if self.output == 0 and self.features == 0:
            raise ValueError("output and features are both 0, so that the teacher says nothing; raise one of them")
        return self


class SchedulerSection(Section):
    """The noise schedule: the arguments of diffusers' `DDIMScheduler`, with the released settings as defaults."""

    num_train_timesteps: PositiveInt = Field(default=2000, description="Training timesteps T.")
    beta_start: float = Field(default=1e-6, gt=0, lt=1, description="First noise variance.")
    beta_end: float = Field(default=1e-2, gt=0, lt=1, description="Last noise variance.")
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = Field(
        default="linear", description="How the variances go from the first to the last."
    )
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = Field(
        default="epsilon", description="What the network predicts: the noise, the velocity, or the clean picture."
    )
    clip_sample: bool = Field(default=True, description="Clip the predicted picture while sampling.")
    clip_sample_range: float = Field(default=1.0, gt=0, description="To what magnitude it is clipped.")
    set_alpha_to_one: bool = Field(default=True, description="Let the last sampling step end without noise.")
    steps_offset: int = Field(default=0, ge=0, description="Added to every sampling timestep.")
    timestep_spacing: Literal["leading", "trailing", "linspace"] = Field(
        default="leading", description="How sampling timesteps are spread over the T training ones."
    )
    rescale_betas_zero_snr: bool = Field(default=False, description="Rescale the schedule to end in pure noise.")

    @model_validator(mode="after")
    def _solvable(self) -> SchedulerSection:
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "rescale_betas_zero_snr ends in pure noise, from which a predicted noise says nothing; "
                "set prediction_type to 'v_prediction' or 'sample'"
            )
        return self


class Figures(Section):
    """Published quality on one data set; PSNR in dB and SSIM on the luma channel, LPIPS with AlexNet."""

    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None


class PublishedSection(Section):
    """The published row that a recipe reproduces; metadata for tables, never an input of the training."""

    source: str = Field(description="Paper, table and row.")
    rows: tuple[str, ...] = Field(default=(), description="Other rows of the same paper that are the same network.")
    params_m: float | None = Field(
        default=None, gt=0, description="Parameters in millions, a binary one counting 1/32."
    )
    ops_g: float | None = Field(
        default=None, gt=0, description="Operations in 10^9 at 3x256x256, a binary one counting 1/64."
    )
    results: dict[str, Figures] = Field(default_factory=dict, description="Quality by data set.")
