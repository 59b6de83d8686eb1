"""The key `evaluation` of a study, which each task has in its own form."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt, field_validator

from binarize.evaluation.feature_names import PIXELS, feature_name
from binarize.recipes.degradation import Degradation
from binarize.recipes.sections import Section, UserPath, needs_high_resolution

LpipsNet = Literal["alex", "vgg", "squeeze"]


class Evaluation(Section):
    """What every run of a study is measured on, and how."""

    @property
    def lpips_net(self) -> LpipsNet | None:
        """The backbone of LPIPS, if the task is measured by it."""
        return None

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines below the table, without full stops."""
        return ()


class EvaluationSection(Evaluation):
    """For super-resolution: the images that every run is measured on, and how."""

    data_dir: UserPath | None = None
    """Folder of high-resolution images; by default the recipes' validation_data_dir."""
    lr_data_dir: UserPath | None = None
    """Folder of the matching low-resolution images; by default they are made as `degradation` says."""
    degradation: Degradation = Degradation()
    """How low-resolution images are made: `bicubic` (MATLAB's imresize), `photo`, or a list of steps."""
    dataset: str | None = Field(default=None, description="Name of the images, to show published results beside.")
    limit: PositiveInt | None = Field(default=None, description="Use only this many images.")
    num_inference_steps: PositiveInt | None = Field(default=None, description="Sampling steps; default: the recipes'.")
    tile: PositiveInt | None = Field(default=None, description="Tile size, to bound memory; by default no tiles.")
    lpips: LpipsNet | None = Field(default="alex", description="Backbone of LPIPS, or null.")
    lpips_backbone: UserPath | None = Field(
        default=None, description="The backbone's file, for machines without network."
    )

    _needs_hr = field_validator("lr_data_dir")(needs_high_resolution)

    @property
    def lpips_net(self) -> LpipsNet | None:
        """The backbone of LPIPS."""
        return self.lpips

    @property
    def notes(self) -> tuple[str, ...]:
        """How low resolution is made, if not by the default."""
        made_by = self.degradation
        return (f"Low-resolution images are made by {made_by.to_text()}",) if made_by.root else ()


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, int) else value


class GenerationEvaluation(Evaluation):
    """For generation: the images that the generated ones are compared with, and how."""

    data_dir: UserPath | None = Field(default=None, description="Folder of real images; default: train_data_dir.")
    features: str = Field(default=PIXELS, description="Features, as in `binarize evaluate --features`.")
    count: int | None = Field(default=None, ge=4, description="Images to generate; default: as many as real ones.")
    num_inference_steps: Annotated[tuple[PositiveInt, ...], BeforeValidator(_as_list)] | None = None
    """Numbers of sampling steps, one or a list; by default the recipes'."""

    @field_validator("features")
    @classmethod
    def _known(cls, value: str) -> str:
        feature_name(value)
        return value

    @field_validator("num_inference_steps")
    @classmethod
    def _ascending(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and (not value or len(set(value)) != len(value)):
            raise ValueError("give at least one number of steps, and none twice")
        return None if value is None else tuple(sorted(value))
