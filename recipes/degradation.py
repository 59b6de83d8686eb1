"""The `degradation` key of recipes: how low-resolution images are made of high-resolution ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np
import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    RootModel,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from binarize import imaging
from binarize.errors import did_you_mean
from binarize.randomness import generator
from binarize.recipes.sections import Section

if TYPE_CHECKING:
    from torch import Tensor

Number = TypeVar("Number")
Size = tuple[int, int]
Share = Annotated[float, Field(ge=0, le=1)]


def _as_range(value: Any) -> Any:
    if any(isinstance(each, bool) for each in (value if isinstance(value, list | tuple) else [value])):
        raise ValueError("must be a number, or [lowest, highest]")
    return (value, value) if isinstance(value, int | float) else value


def _ascending(value: tuple[Any, Any]) -> tuple[Any, Any]:
    if value[0] > value[1]:
        raise ValueError("must be [lowest, highest]")
    return value


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Range = Annotated[tuple[Number, Number], BeforeValidator(_as_range), AfterValidator(_ascending)]
"""[lowest, highest], or one number for both."""
Filters = Annotated[
    tuple[Literal["box", "bilinear", "bicubic", "lanczos"], ...], BeforeValidator(_as_tuple), Field(min_length=1)
]
_EVERY_FILTER: Filters = ("box", "bilinear", "bicubic", "lanczos")
Quality = Range[Annotated[int, Field(ge=1, le=100)]]


class Step(Section):
    """A step with random parameters, drawn uniformly for each sample; in short form, its main parameter alone."""

    main: ClassVar[str]
    share: Share = Field(default=1.0, description="Share of samples that the step changes.")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return value if isinstance(value, Mapping | Step) else {cls.main: value}

    def apply(self, image: Tensor, low: Size, rng: np.random.Generator) -> Tensor:
        """Return the changed image, float32 (3, H, W), on the way to the low resolution of `low` = (h, w)."""
        raise NotImplementedError


class Blur(Step):
    """Blur by a kernel of random width, direction and profile."""

    main: ClassVar[str] = "sigma"
    sigma: Range[Annotated[float, Field(gt=0, le=5)]] = Field(description="Width in low-resolution pixels, up to 5.")
    anisotropic: Share = Field(default=0.0, description="Share of kernels with two widths and a direction.")
    profiles: Annotated[
        tuple[Literal["gaussian", "generalized", "plateau"], ...], BeforeValidator(_as_tuple), Field(min_length=1)
    ] = ("gaussian",)
    """Profiles to choose from; generalized and plateau as in Real-ESRGAN."""

    def apply(self, image: Tensor, low: Size, rng: np.random.Generator) -> Tensor:
        """Blur."""
        profile, angle = self.profiles[rng.integers(len(self.profiles))], rng.uniform(0, math.pi)
        first, second = rng.uniform(*self.sigma, size=2) * image.shape[-1] / low[1]
        second = second if rng.random() < self.anisotropic else first
        highest = {"gaussian": 1.0, "generalized": 4.0, "plateau": 2.0}[profile]
        lowest = 0.5 if profile == "generalized" else 1.0
        # Real-ESRGAN draws half of the exponents below 1 and half above.
        beta = rng.uniform(lowest, 1) if rng.random() < 0.5 else rng.uniform(1, highest)
        kernel = imaging.degradation.blur_kernel((first, second), angle, beta=beta, plateau=profile == "plateau")
        return imaging.degradation.convolve(image, kernel)


class Sinc(Step):
    """An ideal low-pass filter, which rings as sharpened and strongly compressed images do."""

    main: ClassVar[str] = "cutoff"
    cutoff: Range[Annotated[float, Field(gt=0, le=math.pi)]] = Field(description="Radians per pixel, up to pi.")

    def apply(self, image: Tensor, low: Size, rng: np.random.Generator) -> Tensor:
        """Filter."""
        return imaging.degradation.convolve(image, imaging.degradation.sinc_kernel(rng.uniform(*self.cutoff)))


class Resize(Step):
    """Resize to a random multiple of the low resolution, before `reduce`."""

    main: ClassVar[str] = "factor"
    factor: Range[Annotated[float, Field(gt=0, le=16)]] = Field(description="Size in low-resolution images.")
    filters: Filters = Field(default=_EVERY_FILTER, description="Pillow's filters to choose from.")

    def apply(self, image: Tensor, low: Size, rng: np.random.Generator) -> Tensor:
        """Resize."""
        name, factor = self.filters[rng.integers(len(self.filters))], rng.uniform(*self.factor)
        height, width = (max(1, round(side * factor)) for side in low)
        return imaging.degradation.resize(image, (height, width), name)


class Reduce(Step):
    """Resize to the low resolution."""

    main: ClassVar[str] = "filters"
    filters: Filters = Field(default=_EVERY_FILTER, description="Pillow's filters to choose from.")
    share: Annotated[float, Field(ge=1, le=1)] = 1.0
    """Always 1."""

    def apply(self, image: Tensor, low: Size, rng: np.random.Generator) -> Tensor:
        """Resize."""
        return imaging.degradation.resize(image, low, self.filters[rng.integers(len(self.filters))])


class GaussianNoise(Step):
    """White noise."""

    main: ClassVar[str] = "sigma"
    sigma: Range[Annotated[float, Field(ge=0, le=255)]] = Field(description="Standard deviation in levels of 255.")
    grey: Share = Field(default=0.4, description="Share of noise that is the same in all channels.")

    def apply(self, image: Tensor, low: Size, rng: np.random.Generator) -> Tensor:
        """Add noise."""
        return imaging.degradation.gaussian_noise(image, rng.uniform(*self.sigma), rng, grey=rng.random() < self.grey)


class PoissonNoise(Step):
    """The noise of counting photons; their number is drawn uniformly in logarithms, as in BSRGAN."""

    main: ClassVar[str] = "photons"
    photons: Range[Annotated[float, Field(ge=1, le=1e9)]] = Field(description="Photons of a white pixel.")
    grey: Share = Field(default=0.4, description="Share of noise that is the same in all channels.")

    def apply(self, image: Tensor, low: Size, rng: np.random.Generator) -> Tensor:
        """Add noise."""
        fewest, most = map(math.log, self.photons)
        photons = math.exp(rng.uniform(fewest, most))
        return imaging.degradation.poisson_noise(image, photons, rng, grey=rng.random() < self.grey)


class Jpeg(Step):
    """JPEG compression."""

    main: ClassVar[str] = "quality"
    quality: Quality = Field(description="Pillow's quality, 1 to 100.")
    subsampling: Annotated[
        tuple[Literal["4:4:4", "4:2:2", "4:2:0"], ...], BeforeValidator(_as_tuple), Field(min_length=1)
    ] = ("4:2:0",)
    """Resolutions of the chroma channels to choose from."""

    def apply(self, image: Tensor, low: Size, rng: np.random.Generator) -> Tensor:
        """Compress."""
        chroma = self.subsampling[rng.integers(len(self.subsampling))]
        return imaging.degradation.compress(
            image, "JPEG", quality=int(rng.integers(*self.quality, endpoint=True)), subsampling=chroma
        )


class Webp(Step):
    """Lossy WebP compression."""

    main: ClassVar[str] = "quality"
    quality: Quality = Field(description="Pillow's quality, 1 to 100.")

    def apply(self, image: Tensor, low: Size, rng: np.random.Generator) -> Tensor:
        """Compress."""
        return imaging.degradation.compress(image, "WEBP", quality=int(rng.integers(*self.quality, endpoint=True)))


class DegradationStep(Section):
    """One step of a degradation: exactly one of these keys."""

    blur: Blur | None = Field(default=None, description="`{sigma, anisotropic, profiles, share}`")
    sinc: Sinc | None = Field(default=None, description="`{cutoff, share}`")
    resize: Resize | None = Field(default=None, description="`{factor, filters, share}`")
    reduce: Reduce | None = Field(default=None, description="`{filters}`")
    gaussian_noise: GaussianNoise | None = Field(default=None, description="`{sigma, grey, share}`")
    poisson_noise: PoissonNoise | None = Field(default=None, description="`{photons, grey, share}`")
    jpeg: Jpeg | None = Field(default=None, description="`{quality, subsampling, share}`")
    webp: Webp | None = Field(default=None, description="`{quality, share}`")

    @model_validator(mode="after")
    def _one(self) -> DegradationStep:
        if len(self.model_fields_set) != 1 or self.step is None:
            raise ValueError(
                f"must be one step, such as {{jpeg: [60, 95]}}; steps: {', '.join(type(self).model_fields)}"
            )
        return self

    @property
    def step(self) -> Step:
        """The step that is given."""
        return getattr(self, next(iter(self.model_fields_set)))

    @model_serializer(mode="wrap")
    def _given(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if name in self.model_fields_set}


PRESETS: dict[str, list[dict[str, Any]]] = {
    "bicubic": [],
    # The steps of BSRGAN and Real-ESRGAN in the order of the latter: what a camera does, then what a web site does. The
    # ranges are narrower, because a network that expects the worst smooths photographs that are nearly clean.
    "photo": [
        {"blur": {"sigma": [0.1, 0.7], "anisotropic": 0.4, "profiles": ["gaussian", "generalized"], "share": 0.2}},
        {"resize": {"factor": [1, 2], "share": 0.15}},
        {"gaussian_noise": {"sigma": [1, 10], "share": 0.1}},
        {"poisson_noise": {"photons": [100, 10_000], "share": 0.1}},
        {"jpeg": {"quality": [75, 98], "subsampling": ["4:2:0", "4:4:4"], "share": 0.15}},
        {"reduce": ["box", "bilinear", "bicubic", "lanczos"]},
        {"gaussian_noise": {"sigma": [1, 10], "share": 0.2}},
        {"sinc": {"cutoff": [math.pi / 2, math.pi], "share": 0.05}},
        {"jpeg": {"quality": [55, 98], "subsampling": ["4:2:0", "4:4:4"], "share": 0.6}},
        {"webp": {"quality": [55, 98], "share": 0.1}},
    ],
}  # fmt: skip
"""Degradations with a name."""


class Degradation(RootModel[tuple[DegradationStep, ...]]):
    """Steps in order, or the name of a preset; none at all are MATLAB's bicubic reduction (`binarize.imaging.degrade`).

    Exactly one step is `reduce`, and `resize` comes before it. Only then do blur, noise and compression after it have
    the size that they have in the images of users.
    """

    model_config = ConfigDict(frozen=True)
    root: tuple[DegradationStep, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value not in PRESETS:
            raise ValueError(f"must be one of {', '.join(PRESETS)}, or a list of steps.{did_you_mean(value, PRESETS)}")
        return PRESETS[value]

    @model_validator(mode="after")
    def _reduces_once(self) -> Degradation:
        names = [next(iter(step.model_fields_set)) for step in self.root]
        if names and names.count("reduce") != 1:
            raise ValueError(
                f"must have `reduce` once, such as {{reduce: bicubic}}; has it {names.count('reduce')} times"
            )
        if names and "resize" in names[names.index("reduce") :]:
            raise ValueError("has `resize` after `reduce`; move it before")
        return self

    @model_serializer(mode="wrap")
    def _written(self, dump: SerializerFunctionWrapHandler) -> Any:
        return dump(self) if self.root else "bicubic"

    def to_text(self) -> str:
        """Return the degradation as one line of YAML."""
        written = self.model_dump(mode="json")
        if isinstance(written, str):
            return written
        return yaml.safe_dump(written, default_flow_style=True, sort_keys=False, width=math.inf).strip()

    def seeded(self, seed: int) -> Callable[[Tensor, int, int], Tensor] | None:
        """Return ``make(hr, scale, index)``, a pure function of `seed` and its arguments; None for plain `degrade`.

        `hr` is uint8 (3, H, W), and the result uint8 (3, H // scale, W // scale).
        """
        return partial(_make, self, seed) if self.root else None


def _make(degradation: Degradation, seed: int, hr: Tensor, scale: int, index: int) -> Tensor:
    rng, low = generator(seed, "degradation", index), (hr.shape[-2] // scale, hr.shape[-1] // scale)
    image = hr[..., : low[0] * scale, : low[1] * scale].float() / 255
    for each in degradation.root:
        if each.step.share > rng.random():
            image = each.step.apply(image, low, rng).clamp(0, 1)
    return (image * 255 + 0.5).floor().byte()
