"""Upscaling with a conditional diffusion network, without diffusers' pipelines, whose import takes two seconds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from binarize.errors import BinarizeError
from binarize.imaging import DecodedImage, upscale_bicubic
from binarize.json_files import read_json
from binarize.models import checks
from binarize.models.graphs import GraphedPasses
from binarize.models.images import as_images, to_batch, to_output
from binarize.models.memory import check_sampling_memory
from binarize.models.overshoot import limit_overshoot
from binarize.models.sampling import parameters, set_timesteps
from binarize.models.saving import reading
from binarize.models.target import image_of
from binarize.models.tiling import TileGrid, pad_image, pad_noise, tile_grid
from binarize.modules import evaluating

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

ImageInput = (
    Image.Image | DecodedImage | np.ndarray | Tensor | Sequence[Image.Image | DecodedImage | np.ndarray | Tensor]
)
StepCallback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]

_DEFAULT_MULTIPLE = 8  # for networks without a `size_multiple`: the released networks have four levels
_DEFAULT_STEPS = 50  # for pipelines without `num_inference_steps`: as in the published results


def default_scheduler() -> DDIMScheduler:
    """Return DDIM as in the released networks. It clips predicted images to [-1, 1], though they are in [0, 1]."""
    return DDIMScheduler(num_train_timesteps=2000, beta_start=1e-6, beta_end=1e-2, beta_schedule="linear")


def checked_settings(
    unet: ModelMixin,
    scheduler: Any,
    scale: int | None = None,
    residual_scale: float | None = None,
    num_inference_steps: int | None = None,
    residual_strength: float = 1.0,
    overshoot: float | None = None,
) -> dict[str, Any]:
    """Check the arguments of a pipeline, and return those that are saved with it."""
    checks.check_scales(scale, residual_scale, residual_strength)
    checks.check_overshoot(overshoot)
    checks.check_scheduler(unet, scheduler)
    if num_inference_steps is not None:
        checks.check_numbers(scheduler, num_inference_steps, batch_size=1, eta=0)
    settings = {
        "scale": int(scale),  # type: ignore[arg-type]  # checked above
        "residual_scale": residual_scale,
        "num_inference_steps": num_inference_steps,
        "residual_strength": residual_strength,
    }
    # Older versions, which do not know it, ignore it with a warning.
    return settings if overshoot is None else settings | {"overshoot": overshoot}


class Upscaling:
    """The part of `SuperResolutionPipeline` that upscales images. `Upscaler` shares it."""

    _callback_tensor_inputs = ["latents", "condition"]

    cuda_graphs = True
    unet: ModelMixin
    scheduler: Any  # diffusers' common base class declares neither step nor set_timesteps
    config: Any
    name_or_path: Any
    device: Any
    _execution_device: Any
    progress_bar: Any
    maybe_free_model_hooks: Any

    @property
    def scale(self) -> int:
        """The upscaling factor."""
        return self.config["scale"]

    @property
    def residual_scale(self) -> float | None:
        """The divisor of residuals in training, or None if the network predicts images."""
        return self.config["residual_scale"]

    @property
    def residual_factor(self) -> float | None:
        """residual_scale * residual_strength, the factor of predicted residuals, or None."""
        return None if self.residual_scale is None else self.residual_scale * self.config["residual_strength"]

    @property
    def num_inference_steps(self) -> int:
        """Default number of denoising steps."""
        saved = self.config["num_inference_steps"]
        return _DEFAULT_STEPS if saved is None else saved

    @property
    def size_multiple(self) -> int:
        """The network's height and width must be multiples of this; images are padded."""
        return getattr(self.unet, "size_multiple", _DEFAULT_MULTIPLE)

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | list[Tensor] | None = None,
        tile: int | None = None,
        overlap: int | None = None,
        batch_size: int = 1,
        eta: float = 0.0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Upscale one or several images.

        A list gives exactly the results of its images one after another. With a single generator, the noise of an
        image depends on the sizes of the images before it, as in successive calls; with a list of generators it depends
        on its own generator alone. (Schedulers that add noise at each step draw it for ``batch_size`` images together.)

        Args:
            image: PIL image (of any mode; orientation, palette, inks and depth are resolved),
                `binarize.imaging.DecodedImage`, numpy array (H, W) or (H, W, 1 to 4), tensor (1 to 4, H, W), a batch
                of either with a leading axis, or a list of these, whose sizes may differ. Floating point in [0, 1],
                uint8 or uint16. The last of two or four channels is alpha, which is upscaled bicubically.
            num_inference_steps: Denoising steps, from 1 to the scheduler's number of training timesteps; by default
                the number that was saved with the pipeline, or 50.
            generator: One generator, or one per image.
            latents: Unit Gaussian noise to start from, of the size of the results: (B, 3, H * scale, W * scale), or a
                list of (3, H * scale, W * scale) if sizes differ. It is scaled by the scheduler's
                ``init_noise_sigma``. Padding is always filled with fixed noise.
            tile: Side in output pixels of square tiles, rounded down to a multiple of the network's size multiple. With
                ``None``, or a tile no smaller than the result, the network gets the whole image at once.
            overlap: Least number of output pixels that neighboring tiles share; by default 32, or a quarter of the tile
                if that is less.
            batch_size: Number of images of the same size, or of tiles of an image, per call of the network. 1 needs
                the least memory and makes each result bit for bit independent of the others.
            eta: DDIM's eta, from 0 (deterministic) to 1, for schedulers that have it.
            output_type: "pil" (grayscale, 16-bit and transparency as in the source), "np" (float32 (B, H, W, C)) or
                "pt" ((B, C, H, W)); C is 3, or 4 with transparency. "np" and "pt" give lists if shapes differ.
            return_dict: False returns a plain tuple.
            callback_on_step_end: Called as ``callback(pipe, step, timestep, tensors)`` after each step of each image;
                a dictionary ``{"latents": ...}`` that it returns replaces x_t.
            callback_on_step_end_tensor_inputs: Keys of ``tensors``: "latents" (x_t on the padded canvas; scaled
                residuals if the network predicts residuals) and "condition".

        Returns:
            ``ImagePipelineOutput`` with ``.images``, or a tuple with the images.
        """
        sources = as_images(image)
        num_inference_steps = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        checks.check_scheduler(self.unet, self.scheduler)
        checks.check_numbers(self.scheduler, num_inference_steps, batch_size, eta)
        checks.check_output(
            output_type, callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs
        )
        generators = checks.generator_per_image(generator, sources)
        noises = checks.latents_per_image(latents, sources, self.scale)
        chunks = _chunks(sources, 1 if tile is not None else batch_size)
        grids = [
            tile_grid(*(self.scale * side for side in size), tile=tile, overlap=overlap, multiple=self.size_multiple)
            for size in (sources[chunk[0]].rgb.shape[-2:] for chunk in chunks)
        ]
        if self._execution_device.type == "cpu":
            for chunk, grid in zip(chunks, grids, strict=True):
                check_sampling_memory(self.unet, grid, images=len(chunk), tiles=batch_size)

        scheduler = copy.deepcopy(self.scheduler)  # it keeps its position, and threads may share the pipeline
        set_timesteps(scheduler, num_inference_steps, self._execution_device)
        results: list[Any] = []
        with evaluating(self.unet), self.progress_bar(total=len(chunks) * len(scheduler.timesteps)) as bar:
            for chunk, grid in zip(chunks, grids, strict=True):
                own = [generators[i] for i in chunk] if isinstance(generator, list | tuple) else generator
                options = {"eta": eta, "generator": own}
                condition = self._condition([sources[i] for i in chunk])
                samples = self._sample(
                    scheduler,
                    noise=torch.cat([self._noise(noises[i], generators[i], condition) for i in chunk]),
                    condition=condition,
                    grid=grid,
                    num_inference_steps=num_inference_steps,
                    step_options={k: v for k, v in options.items() if k in checks.step_parameters(self.scheduler)},
                    batch_size=batch_size,
                    callback=callback_on_step_end,
                    callback_inputs=callback_on_step_end_tensor_inputs,
                    advance=bar.update,
                )
                overshoot = self.config.get("overshoot")
                for i, rgb in zip(chunk, samples, strict=True):
                    rgb = rgb if overshoot is None else limit_overshoot(rgb, sources[i].rgb.to(rgb), overshoot)
                    alpha = sources[i].alpha
                    alpha = None if alpha is None else upscale_bicubic(alpha.to(rgb), self.scale)
                    results.append(to_output(sources[i], rgb, alpha, output_type))
        self.maybe_free_model_hooks()
        images = to_batch(results, output_type)
        if not return_dict:
            return (images,)
        from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

        return ImagePipelineOutput(images=images)

    def _sample(
        self,
        scheduler: Any,
        noise: Tensor,
        condition: Tensor,
        grid: TileGrid,
        num_inference_steps: int,
        step_options: dict[str, Any],
        batch_size: int,
        callback: Callable[..., Any] | None,
        callback_inputs: Sequence[str],
        advance: Callable[[], Any],
    ) -> Tensor:
        """Denoise images of one size: noise and condition (B, 3, H, W) to images (B, 3, H, W) in [0, 1]."""
        height, width = condition.shape[-2:]
        condition = pad_image(condition, *grid.shape)
        # The scheduler keeps its position and the last predictions, so each sample starts it anew.
        scheduler.set_timesteps(num_inference_steps, device=condition.device)
        x = pad_noise(noise, *grid.shape) * scheduler.init_noise_sigma
        largest = x.new_zeros(())
        passes = len(scheduler.timesteps) * max(1, len(grid) // batch_size)  # of equal shapes
        recorded = passes if self.cuda_graphs and callback is None else 0
        predict = GraphedPasses(self._predict, self.unet, tuple(scheduler.timesteps[[0, -1]]), recorded)
        for step, timestep in enumerate(scheduler.timesteps):
            model_input = scheduler.scale_model_input(x, timestep)
            epsilon = grid.blend(partial(predict, timestep), model_input, condition, batch_size=batch_size)
            largest = torch.maximum(largest, _largest(epsilon))
            x = scheduler.step(epsilon, timestep, x, **step_options).prev_sample
            if callback is not None:
                tensors = {"latents": x, "condition": condition}
                returned = callback(self, step, timestep, {name: tensors[name] for name in callback_inputs})
                x = checks.callback_latents(returned, x)
            advance()
        largest = torch.maximum(largest, _largest(x))  # read once, because reading it waits for a GPU
        checks.check_prediction(largest.item(), self.name_or_path, self.unet.dtype)
        return image_of(x, condition, self.residual_factor)[..., :height, :width].clamp(0, 1)

    def _predict(self, timestep: Tensor, sample: Tensor, condition: Tensor) -> Tensor:
        dtype = self.unet.dtype
        # x_t keeps the precision of the sums over steps and tiles, whatever the network's dtype.
        return self.unet(sample.to(dtype), timestep, condition.to(dtype)).sample.to(sample.dtype)

    def _condition(self, sources: list[DecodedImage]) -> Tensor:
        dtype = torch.promote_types(self.unet.dtype, torch.float32)
        rgb = torch.stack([source.rgb.to(self._execution_device, dtype) for source in sources])
        return upscale_bicubic(rgb, self.scale)

    def _noise(self, given: Tensor | None, generator: torch.Generator | None, condition: Tensor) -> Tensor:
        if given is not None:
            return given.to(condition)
        shape = (1, *condition.shape[1:])
        return randn_tensor(shape, generator=generator, device=condition.device, dtype=condition.dtype)


class Upscaler(Upscaling):
    """Upscales images like `SuperResolutionPipeline`, with the same arguments. It cannot be saved or offloaded.

    ``settings`` are the arguments of `checked_settings`.

    Commands that only upscale images start earlier with it.
    """

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin | None = None, **settings: Any) -> None:
        self.unet, self.name_or_path = unet, None
        self.scheduler = default_scheduler() if scheduler is None else scheduler
        self.config = checked_settings(unet, self.scheduler, **settings)

    @classmethod
    def from_folder(cls, folder: str | PathLike[str], unet: ModelMixin) -> Upscaler:
        """Read all of a pipeline's folder but its network.

        Raises:
            BinarizeError: If a file is damaged, or the scheduler is none of diffusers'.
        """
        index, options, known = Path(folder, "model_index.json"), dict[str, Any](), parameters(checked_settings)
        with reading("SuperResolutionPipeline", known, Path(folder), options):
            config = read_json(index)
            entry = config.get("scheduler")
            if "scheduler" not in options and entry not in (None, [None, None]):
                allowed = f"a scheduler of this diffusers, {diffusers.__version__}, or null"
                fix = "Load others in Python, with SuperResolutionPipeline.from_pretrained."
                raise BinarizeError(f"{index}: scheduler is {entry!r:.60}; allowed: {allowed}. {fix}")
            settings = {name: config[name] for name in known - {"unet", "scheduler"} if name in config}
            upscaler = cls(unet, **options, **settings)
        upscaler.name_or_path = str(folder)
        return upscaler

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.unet.parameters()).device  # diffusers' `device` imports what could have moved it

    _execution_device = device

    def to(self, *args: Any) -> Upscaler:
        """Move the network as `torch.nn.Module.to` does."""
        nn.Module.to(self.unet, *args)  # diffusers' `to` imports all that it may move
        return self

    def progress_bar(self, total: int) -> Any:
        """Return a bar that is not shown."""
        return tqdm(total=total, disable=True)

    def set_progress_bar_config(self, **options: Any) -> None:
        """Do nothing: no bar is shown."""

    def maybe_free_model_hooks(self) -> None:
        """Do nothing: there are no hooks."""


def _largest(values: Tensor) -> Tensor:
    low, high = torch.aminmax(values)
    return torch.maximum(-low, high)


def _chunks(sources: list[DecodedImage], batch_size: int) -> list[list[int]]:
    """Group the images' indices, in order, into chunks of one size and at most ``batch_size`` images."""
    runs = [list(run) for _, run in groupby(range(len(sources)), key=lambda i: sources[i].rgb.shape)]
    return [run[first : first + batch_size] for run in runs for first in range(0, len(run), batch_size)]
