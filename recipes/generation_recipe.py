"""`GenerationRecipe`: the keys of a recipe for generating images, unconditionally or of given classes."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import ConfigDict, Field, PositiveInt, ValidationInfo, field_validator, model_validator

from binarize.recipes import sections
from binarize.recipes.schema import Loss, TrainingRecipe
from binarize.recipes.sections import Section, UserPath

_BY_CLASSES = "has no effect without classes; name them, or remove it"


class NetworkSection(Section):
    """The network before conversion: a class of diffusers, a saved network, or a function that returns one.

    All other keys are arguments of the class or of the function.
    """

    model_config = ConfigDict(extra="allow")
    class_name: str | None = Field(default=None, alias="class", description="A model of diffusers, as `UNet2DModel`.")
    from_pretrained: str | None = None
    """A network or pipeline that diffusers saved: a folder, or a name on the Hugging Face hub."""
    factory: str | None = Field(default=None, description="`module:function`, which returns a diffusers model.")

    @model_validator(mode="after")
    def _has_one_source(self) -> NetworkSection:
        given = [name for name in (self.class_name, self.from_pretrained, self.factory) if name is not None]
        if len(given) != 1:
            raise ValueError("must have one of class, from_pretrained and factory")
        if self.factory is not None and not all(self.factory.partition(":")):
            raise ValueError("factory must be module:function")
        if self.from_pretrained is not None and self.options:
            raise ValueError(f"{min(self.options)} cannot be changed with from_pretrained; remove it")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of the class or of the function."""
        return dict(self.model_extra or {})


class SamplerSection(sections.NoiseSchedule):
    """The noise schedule: a scheduler of diffusers over discrete timesteps; all other keys are its arguments."""

    model_config = ConfigDict(extra="allow")
    class_name: str = Field(default="DDPMScheduler", alias="class", description="The scheduler, for sampling too.")

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of the scheduler."""
        return self.model_dump(exclude={"class_name"})


class GenerationDistillation(sections.DistillationSection):
    """Knowledge distillation for networks whose blocks are named as diffusers names them."""

    blocks: tuple[str, ...] = Field(
        default=("down_blocks.*.resnets.*", "mid_block.resnets.*", "up_blocks.*.resnets.*"), min_length=1
    )
    """Blocks whose outputs are compared; a star matches one part of a dotted name."""


class GenerationRecipe(TrainingRecipe):
    """A training run for generation: a network learns to draw images like those of a folder."""

    task: ClassVar[str] = "generation"

    scheduler: SamplerSection = Field(default_factory=SamplerSection)
    """The noise schedule and the sampler."""
    model: NetworkSection = Field(description="The network: its class and options, `from_pretrained`, or `factory`.")
    distillation: GenerationDistillation | None = None
    """Train with a trained network as the teacher: `{teacher: folder, ...}`."""
    loss: Loss = Field(default="l2", description="Loss between prediction and target.")

    classes: tuple[str, ...] | None = Field(default=None, min_length=1)
    """The sub-folders of `train_data_dir`, one per class, in the order of their labels; null: no classes."""
    class_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of the samples that are trained without their class, which classifier-free guidance needs."""
    guidance_scale: float = Field(default=1.0, ge=0, validate_default=True)
    """Weight of classifier-free guidance in samples, saved with the model; 1: none."""
    resolution: PositiveInt = Field(default=32, description="Side of the images in pixels.")
    vae: UserPath | None = None
    """Generate latents of this autoencoder: the folder of a trained AutoencoderKL, or its name on the hub."""
    center_crop: bool = Field(default=True, description="Crop larger images in the middle, or at random places.")
    random_flip: bool = Field(default=False, description="Flip half of the images horizontally.")

    @field_validator("model", mode="before")
    @classmethod
    def _function(cls, value: Any) -> Any:
        return {"factory": value} if isinstance(value, str) else value

    @field_validator("classes")
    @classmethod
    def _different(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("names a class twice")
        return value

    @field_validator("guidance_scale")
    @classmethod
    def _needs_dropout(cls, value: float, info: ValidationInfo) -> float:
        if value != 1 and info.data.get("classes", ...) is None:
            raise ValueError(_BY_CLASSES)
        if value != 1 and info.data.get("class_dropout") == 0:
            raise ValueError("needs samples without their class; make class_dropout positive, such as 0.1")
        return value

    @field_validator("center_crop")
    @classmethod
    def _whole_images(cls, value: bool, info: ValidationInfo) -> bool:
        if not value and info.data.get("vae") is not None:
            raise ValueError("must be true with vae, which encodes each image once")
        return value

    @property
    def num_labels(self) -> int | None:
        """The number of labels: one per class, and with dropout a last one for no class; None without classes."""
        return None if self.classes is None else len(self.classes) + (self.class_dropout > 0)
