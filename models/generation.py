"""The pipeline that generates images, unconditionally or of given classes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from binarize.errors import BinarizeError, did_you_mean
from binarize.models import checks
from binarize.models.graphs import GraphedPasses
from binarize.models.latents import check_autoencoder, decode, latent_geometry
from binarize.models.sampling import parameters, set_timesteps
from binarize.models.saving import reading, save_whole
from binarize.modules import evaluating

MAX_GUIDANCE, _MOST = 1000, 65536
_DEFAULT_STEPS = 50
Labels = int | str | Sequence[int | str]


class GenerationPipeline(DiffusionPipeline):
    """Turns Gaussian noise into images with an unconditional or a class-conditional network.

    Without classes and autoencoder, diffusers' `DDPMPipeline` and `DDIMPipeline` load the same folder.

    Args:
        unet: Predicts from ``unet(sample, timestep).sample``, (B, C, H, W), or with classes from
            ``unet(sample, timestep, class_labels=labels).sample``, with labels (B,).
        scheduler: Any of diffusers' schedulers over discrete timesteps, with the betas and the prediction type of the
            training.
        classes: Names of the classes in the order of their labels, saved with the pipeline; None: unconditional.
        guidance_scale: Default weight of classifier-free guidance, saved with the pipeline: the prediction is
            u + guidance_scale * (c - u), for the predictions c with the class and u without, whose label is the number
            of classes.
        num_inference_steps: Default number of denoising steps, saved with the pipeline; None for 50.
        vae: The autoencoder whose latents the network generates; None for a network that generates pixels.

    Attributes:
        cuda_graphs: As in `SuperResolutionPipeline`.

    Example:
        ```python
        pipe = GenerationPipeline.from_pretrained("runs/emoji_bidiffsr/model")
        images = pipe(16, class_labels="flags", generator=torch.Generator().manual_seed(0)).images
        ```
    """

    model_cpu_offload_seq: str = "unet->vae"
    _optional_components: list[str] = ["vae"]
    cuda_graphs = True
    unet: ModelMixin
    vae: AutoencoderKL | None
    scheduler: Any  # diffusers' common base class declares neither step nor set_timesteps

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        classes: Sequence[str] | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int | None = None,
        vae: AutoencoderKL | None = None,
    ) -> None:
        super().__init__()
        checks.check_scheduler(unet, scheduler)
        if num_inference_steps is not None:
            checks.check_numbers(scheduler, num_inference_steps, batch_size=1, eta=0)
        if vae is not None:
            check_autoencoder(vae, unet.config.get("in_channels"))
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
        classes = None if classes is None else list(classes)
        _check_classes(unet, classes)
        self.register_to_config(
            classes=classes, guidance_scale=float(guidance_scale), num_inference_steps=num_inference_steps
        )
        self._check_guidance(guidance_scale)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> GenerationPipeline:
        """Load as diffusers does, and check the noise schedule and the weights."""
        with reading(cls.__name__, parameters(cls), Path(pretrained_model_name_or_path), kwargs):
            pipe: GenerationPipeline = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if "unet" not in kwargs:
            checks.check_weights(pipe.unet, str(pretrained_model_name_or_path))
        if pipe.vae is not None and "vae" not in kwargs:
            checks.check_weights(pipe.vae, f"{pretrained_model_name_or_path}: vae")
        return pipe

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as diffusers does; a pipeline that the folder holds is replaced, and other files stay."""
        save_whole(super().save_pretrained, save_directory, args, kwargs)

    @property
    def classes(self) -> list[str] | None:
        """The names of the classes, or None."""
        return self.config["classes"]

    @property
    def guidance_scale(self) -> float:
        """Default weight of classifier-free guidance."""
        return self.config["guidance_scale"]

    @property
    def num_inference_steps(self) -> int:
        """Default number of denoising steps."""
        saved = self.config["num_inference_steps"]
        return min(_DEFAULT_STEPS, self.scheduler.config["num_train_timesteps"]) if saved is None else saved

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""
        channels, height, width = self.sample_shape
        if self.vae is None:
            return channels, height, width
        _, factor, image_channels = latent_geometry(self.vae.config, "vae")
        return image_channels, height * factor, width * factor

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the network's samples: images, or latents of the autoencoder."""
        size, channels = self.unet.config.get("sample_size"), self.unet.config.get("in_channels")
        sides = size if isinstance(size, list | tuple) else (size, size)
        if len(sides) != 2 or not all(checks.is_whole(side) and side <= _MOST for side in (*sides, channels)):
            given = f"sample_size={size!r:.40}, in_channels={channels!r:.40}"
            allowed = f"whole numbers from 1 to {_MOST}, sample_size also two of them"
            raise BinarizeError(f"the network's configuration has {given}; allowed: {allowed}.")
        return channels, *sides

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: Labels | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        eta: float = 0.0,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate images.

        Args:
            batch_size: Number of images; by default the number of class labels or generators, or 1.
            class_labels: Name or label of a class, or one for each image; by default all classes in turn.
            num_inference_steps: Denoising steps, from 1 to the scheduler's number of training timesteps; by default
                the number that was saved with the pipeline, or 50.
            guidance_scale: Weight of classifier-free guidance; by default the pipeline's. 1 needs half the time.
            generator: One generator, or one per image. With one per image, an image does not depend on the others.
            latents: Unit Gaussian noise of `sample_shape` to start from, (B, C, H, W); the scheduler scales it.
            eta: DDIM's eta, from 0 (deterministic) to 1, for schedulers that have it.
            output_type: "pil", "np" (float32 (B, H, W, C) in [0, 1]) or "pt" ((B, C, H, W)).
            return_dict: False returns a plain tuple.

        Returns:
            ``ImagePipelineOutput`` with ``.images``, or a tuple with the images.
        """
        steps = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        count = _count(batch_size, class_labels, generator, latents)
        checks.check_scheduler(self.unet, self.scheduler)
        checks.check_numbers(self.scheduler, steps, count, eta)
        checks.check_output(output_type, None, (), ())
        self._check_guidance(scale)
        checks.generator_per_image(generator, [None] * count)
        labels = self._labels(class_labels, count)
        scheduler = copy.deepcopy(self.scheduler)  # it keeps its position, and threads may share the pipeline
        set_timesteps(scheduler, steps, self._execution_device)
        options: dict[str, Any] = {"eta": eta, "generator": generator}
        options = {key: value for key, value in options.items() if key in checks.step_parameters(scheduler)}
        x = self._noise(count, generator, latents) * scheduler.init_noise_sigma
        timesteps = scheduler.timesteps
        predict = GraphedPasses(
            partial(self._predict, labels=labels, scale=scale),
            self.unet, tuple(timesteps[[0, -1]]), len(timesteps) if self.cuda_graphs else 0,
        )  # fmt: skip
        with evaluating(self.unet), self.progress_bar(total=len(timesteps)) as bar:
            for timestep in timesteps:
                seen = scheduler.scale_model_input(x, timestep)
                x = scheduler.step(predict(timestep, seen), timestep, x, **options).prev_sample
                bar.update()
        checks.check_prediction(float(x.abs().amax()), self.name_or_path, self.unet.dtype)
        if self.vae is not None:
            x = decode(self.vae, x)
            checks.check_prediction(float(x.abs().amax()), f"the autoencoder of {self.name_or_path}", self.vae.dtype)
        images: Any = (x / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _predict(self, timestep: Tensor, x: Tensor, labels: Tensor | None, scale: float) -> Tensor:
        dtype = self.unet.dtype
        seen = x.to(dtype)  # x_t keeps the precision of the sums over steps, whatever the network's dtype
        if labels is None:
            return self.unet(seen, timestep).sample.to(x.dtype)
        if scale == 1:
            return self.unet(seen, timestep, class_labels=labels).sample.to(x.dtype)
        none = torch.full_like(labels, len(self.classes or ()))
        both = self.unet(torch.cat([seen, seen]), timestep, class_labels=torch.cat([labels, none])).sample
        with_class, without = both.to(x.dtype).chunk(2)
        return without + scale * (with_class - without)

    def _noise(self, count: int, generator: Any, latents: Tensor | None) -> Tensor:
        shape = (count, *self.sample_shape)
        dtype = torch.promote_types(self.unet.dtype, torch.float32)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=dtype)
        if tuple(latents.shape) != shape:
            raise BinarizeError(f"latents have the shape {tuple(latents.shape)}; needed: {shape}.")
        return latents.to(self._execution_device, dtype)

    def _labels(self, given: Labels | None, count: int) -> Tensor | None:
        if self.classes is None:
            if given is not None:
                raise BinarizeError(f"class_labels={given!r}: the network has no classes; leave it out.")
            return None
        labels = range(len(self.classes)) if given is None else [self._label(each) for each in _as_list(given)]
        if given is not None and len(labels) not in (1, count):
            raise BinarizeError(f"{len(labels)} class_labels for {count} images; give one, or one for each.")
        return torch.tensor([labels[i % len(labels)] for i in range(count)], device=self._execution_device)

    def _label(self, given: int | str) -> int:
        names = self.classes or []
        if isinstance(given, str) and given in names:
            return names.index(given)
        if checks.is_whole(given, 0) and int(given) < len(names):
            return int(given)
        hint = did_you_mean(str(given), names)
        raise BinarizeError(f"unknown class {given!r}; classes: {', '.join(names)}.{hint}")

    def _check_guidance(self, scale: Any) -> None:
        if not (isinstance(scale, int | float) and not isinstance(scale, bool) and 0 <= scale <= MAX_GUIDANCE):
            allowed = f"a number from 0 to {MAX_GUIDANCE}, and 1 for no guidance"
            raise BinarizeError(f"guidance_scale={scale!r:.40}; allowed: {allowed}.")
        if scale == 1:
            return
        if self.classes is None:
            raise BinarizeError(f"guidance_scale={scale!r}: the network has no classes; leave it at 1.")
        labels = self.unet.config.get("num_class_embeds")
        if labels is not None and labels <= len(self.classes):
            reason = f"the network has {labels} labels for {len(self.classes)} classes, so none for no class"
            raise BinarizeError(f"guidance_scale={scale!r}: {reason}; it was trained without class_dropout.")


def generate_images(
    pipeline: GenerationPipeline,
    count: int,
    *,
    class_labels: Sequence[int | str] | None = None,
    seed: int = 0,
    batch_size: int = 16,
    **options: Any,
) -> Iterator[Image.Image]:
    """Yield images of a pipeline, image i from the noise of a CPU generator with the seed ``seed + i``.

    An image is the same, up to rounding, in every batch and on every device.

    Args:
        pipeline: The pipeline.
        count: Number of images.
        class_labels: Names or labels of classes, which the images have in turn; by default all classes.
        seed: Seed of the first image's noise.
        batch_size: Number of images per call of the network.
        **options: ``num_inference_steps``, ``guidance_scale`` and ``eta`` of the pipeline's call.
    """
    labels = range(len(pipeline.classes or ())) if class_labels is None else class_labels
    for start in range(0, count, batch_size):
        numbers = range(start, min(start + batch_size, count))
        noise = [torch.Generator().manual_seed((seed + number) % 2**64) for number in numbers]
        given = [labels[number % len(labels)] for number in numbers] if labels else None
        yield from pipeline(class_labels=given, generator=noise, return_dict=False, **options)[0]


def _check_classes(unet: ModelMixin, classes: list[str] | None) -> None:
    embedded, labels = getattr(unet, "class_embedding", unet), unet.config.get("num_class_embeds")
    if classes is None:
        if embedded not in (None, unet):
            raise BinarizeError("the network has classes; name them in the order of their labels: classes=[...].")
    elif embedded is None:
        raise BinarizeError(f"the network has no classes, but the pipeline has {len(classes)}; leave classes out.")
    elif not classes or (labels is not None and labels < len(classes)):
        raise BinarizeError(f"the network has {labels} labels, but the pipeline has {len(classes)} classes.")


def _as_list(given: Labels) -> list[int | str]:
    return [given] if isinstance(given, Integral | str) else list(cast("Sequence[int | str]", given))


def _count(batch_size: int | None, labels: Labels | None, generator: Any, latents: Tensor | None) -> Any:
    """Return the number of images that the arguments agree on."""
    sizes = {"batch_size": batch_size, "latents": None if latents is None else len(latents)}
    sizes["generator"] = len(generator) if isinstance(generator, list | tuple) else None
    given = {name: size for name, size in sizes.items() if size is not None}
    if len(set(given.values())) > 1:
        found = ", ".join(f"{name} {size}" for name, size in given.items())
        raise BinarizeError(f"the numbers of images differ: {found}.")
    if given:
        return next(iter(given.values()))
    return 1 if labels is None else len(_as_list(labels))
