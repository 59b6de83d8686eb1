"""What a file says of a pipeline, and modules that do all that a pipeline does, for one graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from binarize.errors import BinarizeError
from binarize.imaging import upscale_bicubic
from binarize.models import GenerationPipeline, SuperResolutionPipeline
from binarize.models.overshoot import limit_overshoot
from binarize.models.target import image_of
from binarize.onnx.sampling import Sampler, sampler_of

Pipeline = SuperResolutionPipeline | GenerationPipeline


def sampling_of(pipeline: Pipeline, steps: int | None) -> dict[str, Any]:
    """Return what a program needs to sample with the network alone, as JSON can hold it."""
    count = pipeline.num_inference_steps if steps is None else steps
    config = {key: value for key, value in dict(pipeline.scheduler.config).items() if key[0] != "_"}
    described = {
        **_task_of(pipeline),
        "prediction_type": config.get("prediction_type"),
        "num_inference_steps": count,
        "scheduler": {"class": type(pipeline.scheduler).__name__, **config},
    }
    if type(pipeline.scheduler) is DDIMScheduler:
        described["sampler"] = sampler_of(pipeline.scheduler, count).to_config()
    return described


def _task_of(pipeline: Pipeline) -> dict[str, Any]:
    if isinstance(pipeline, GenerationPipeline):
        if pipeline.vae is not None:
            what = "an autoencoder cannot be written into a file"
            raise BinarizeError(f"export: {what}; in Python, export the network alone: export_onnx(pipe.unet, ...).")
        return {
            "image_shape": list(pipeline.image_shape),
            "classes": pipeline.classes,
            "guidance_scale": pipeline.guidance_scale,
        }
    return {
        "scale": pipeline.scale,
        "size_multiple": pipeline.size_multiple,
        "residual_scale": pipeline.residual_scale,
        "residual_strength": pipeline.config["residual_strength"],
        "overshoot": pipeline.config.get("overshoot"),
    }


@dataclass(frozen=True)
class Whole:
    """A module that does all that a pipeline does, example inputs by name, and the name of its output.

    Height and width of the inputs in `multiples` are multiples of these numbers; others have no declared limit.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    multiples: dict[str, int]
    output: str


def whole_of(pipeline: Pipeline, network: nn.Module, steps: int) -> Whole:
    """Return what a pipeline does in a number of steps, with a network in place of its own."""
    sampler = sampler_of(pipeline.scheduler, steps)
    if isinstance(pipeline, SuperResolutionPipeline):
        overshoot, multiple = pipeline.config.get("overshoot"), pipeline.size_multiple
        module: nn.Module = WholeImage(network, sampler, pipeline.scale, pipeline.residual_factor, overshoot)
        inputs = {"image": torch.zeros(2, 3, 7, 9), "noise": torch.zeros(2, 3, 8 * multiple, 12 * multiple)}
        return Whole(module, inputs, {"noise": multiple}, "enlarged")
    channels, height, width = pipeline.sample_shape
    inputs = {"noise": torch.zeros(2, channels, height, width)}
    if pipeline.classes is not None:
        inputs["class_labels"] = torch.zeros(2, dtype=torch.long)
    module = WholeGeneration(network, sampler, pipeline.guidance_scale, len(pipeline.classes or ()))
    return Whole(module, inputs, {}, "images")


class WholeImage(nn.Module):
    """From a low-resolution image and noise to the enlarged image, as `binarize.models.SuperResolutionPipeline` does.

    ``network(x, timestep, condition).sample`` is its prediction.
    """

    def __init__(
        self, network: nn.Module, sampler: Sampler, scale: int, residual_factor: float | None, overshoot: float | None
    ) -> None:
        super().__init__()
        self.overshoot = overshoot
        self.network, self.sampler, self.scale, self.residual_factor = network, sampler, scale, residual_factor

    def forward(self, image: Tensor, noise: Tensor) -> Tensor:
        """Enlarge ``(B, 3, h, w)`` in [0, 1].

        ``noise`` is ``(B, 3, H, W)``, at least as large as the result and a multiple of the network's size multiple;
        what is beyond the result is padding.
        """
        enlarged = upscale_bicubic(image, self.scale)
        condition = _extended(_extended(enlarged, 2, noise.shape[2]), 3, noise.shape[3])
        x = noise
        for step in self.sampler.steps:
            output = self.network(x, torch.tensor([float(step.timestep)]), condition).sample
            x = self.sampler.step(step, x, output)
        out = image_of(x, condition, self.residual_factor).clamp(0, 1)
        for axis in (2, 3):
            out = out.index_select(axis, torch.arange(self.scale * image.shape[axis], device=out.device))
        return out if self.overshoot is None else limit_overshoot(out, image, self.overshoot)


def _extended(image: Tensor, axis: int, size: int) -> Tensor:
    """Extend an axis as `binarize.models.tiling.pad_image` does, for any size without a branch in the graph."""
    length = image.shape[axis]
    index = torch.arange(size, device=image.device)
    extra = torch.zeros_like(index) + (size - length)
    reflected = torch.where(extra < length, 2 * (length - 1) - index, length - 1)
    return image.index_select(axis, torch.where(index < length, index, reflected))


class WholeGeneration(nn.Module):
    """From noise to an image, as `binarize.models.GenerationPipeline` does.

    ``network(x, timestep, class_labels).sample`` is its prediction. With guidance it predicts for the label `no_class`
    too.
    """

    def __init__(self, network: nn.Module, sampler: Sampler, guidance_scale: float, no_class: int) -> None:
        super().__init__()
        self.network, self.sampler, self.guidance_scale, self.no_class = network, sampler, guidance_scale, no_class

    def forward(self, noise: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Return images in [0, 1] of the noise's shape (B, C, H, W); ``class_labels`` is (B,)."""
        x = noise
        for step in self.sampler.steps:
            x = self.sampler.step(step, x, self._predict(x, step.timestep, class_labels))
        return (x / 2 + 0.5).clamp(0, 1)

    def _predict(self, x: Tensor, timestep: int, labels: Tensor | None) -> Tensor:
        at = torch.tensor([float(timestep)])
        if labels is None:
            return self.network(x, at).sample
        if self.guidance_scale == 1:
            return self.network(x, at, class_labels=labels).sample
        both = torch.cat([labels, torch.full_like(labels, self.no_class)])
        out = self.network(torch.cat([x, x]), at, class_labels=both).sample
        with_class, without = out[: x.shape[0]], out[x.shape[0] :]  # the exporter fails at chunk
        return without + self.guidance_scale * (with_class - without)
