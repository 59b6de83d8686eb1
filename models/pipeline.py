"""The pipeline that upscales images with a conditional diffusion network."""

from __future__ import annotations

import logging
from os import PathLike
from pathlib import Path
from typing import Any

from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from binarize.conversion.packing import is_packed, pack_if_possible, unpack
from binarize.kernels.backends import kernels_for
from binarize.models import checks
from binarize.models.sampling import parameters
from binarize.models.saving import reading, save_whole
from binarize.models.upscaler import Upscaling, checked_settings, default_scheduler

_log = logging.getLogger("binarize")


class SuperResolutionPipeline(Upscaling, DiffusionPipeline):
    """Upscales images with a conditional diffusion network.

    The image is upscaled bicubically (with MATLAB's filter), padded to the network's size multiple, and given to the
    network as the condition while the scheduler turns Gaussian noise into the high-resolution image, which is clamped
    to [0, 1] and cropped.

    Args:
        unet: Predicts from ``unet(sample, timestep, condition).sample``, all (B, 3, H, W), as
            :class:`binarize.models.SRUNet` does. H and W are multiples of its ``size_multiple`` (8 if it has none);
            its ``config.num_train_timesteps`` is the number of timesteps that it was trained with.
        scheduler: Any of diffusers' schedulers, with the betas and the prediction type of the training; by default
            :func:`default_scheduler`.
        scale: The upscaling factor, a whole number of at least 1, saved with the pipeline.
        residual_scale: For networks that were trained on residuals, (image - upscaled image) / residual_scale, the
            divisor, saved with the pipeline; None for networks that predict images.
        residual_strength: A further factor of predicted residuals, saved with the pipeline. A network that was trained
            with the L1 loss predicts the median of the possible images, which has less detail than each of them; 1.2
            to 1.5 restores some of it, at a small loss of PSNR.
        overshoot: How far results may leave the range of the low-resolution pixels around (5x5), as a share of that
            range, saved with the pipeline; None for no limit. It keeps the colours of lines and letters.
        num_inference_steps: Default number of denoising steps, saved with the pipeline; None for the published 50. At
            most the scheduler's number of training timesteps.

    Attributes:
        cuda_graphs: Whether calls with at least 16 passes of the network (steps times tiles) of the same shape replay a
            CUDA graph on a GPU, if it gives the same bits. Calls with a callback, passes of more than 2^19 pixels and
            networks with hooks run without one. Default: True.

    Example:
        ```python
        pipe = SuperResolutionPipeline(SRUNet(), scale=4)
        large = pipe(Image.open("small.png"), generator=torch.Generator().manual_seed(0)).images[0]
        ```
    """

    model_cpu_offload_seq: str = "unet"
    # diffusers treats parameters with a default as settings unless they are listed here.
    _optional_components = ["scheduler"]
    _packed_in_memory = _latents_lost = False

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin | None = None,
        scale: int | None = None,
        residual_scale: float | None = None,
        num_inference_steps: int | None = None,
        residual_strength: float = 1.0,
        overshoot: float | None = None,
    ) -> None:
        super().__init__()
        scheduler = default_scheduler() if scheduler is None else scheduler
        settings = checked_settings(
            unet, scheduler, scale, residual_scale, num_inference_steps, residual_strength, overshoot
        )
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(**settings)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str], *, pack: bool = True, **kwargs: Any
    ) -> SuperResolutionPipeline:
        """Load as diffusers does, and pack a binary network as `binarize.pack` does.

        A packed network is several times faster on a CPU and needs a tenth of the memory for weights, but its latent
        weights are gone: saving the pipeline again writes the bits alone. A network that was packed here is unpacked
        when the pipeline moves to a device without kernels (there are kernels for CPUs and CUDA).

        Args:
            pretrained_model_name_or_path: A folder, or a repository on the Hugging Face hub.
            pack: False keeps the latent weights, to train, inspect or revert the network, and computes with floats. A
                network that was saved packed stays packed.
            **kwargs: As in diffusers; a ``unet`` among them is used as it is.
        """
        with reading(cls.__name__, parameters(cls), Path(pretrained_model_name_or_path), kwargs):
            pipe: SuperResolutionPipeline = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if "unet" not in kwargs:
            checks.check_weights(pipe.unet, str(pretrained_model_name_or_path))
        if pack and "unet" not in kwargs and not is_packed(pipe.unet):
            pipe._packed_in_memory = pack_if_possible(pipe.unet)
        return pipe

    def to(self, *args: Any, **kwargs: Any) -> SuperResolutionPipeline:
        """Move as diffusers does."""
        super().to(*args, **kwargs)
        moved = self._packed_in_memory and self.unet.device.type != "cpu"
        if moved and kernels_for(next(self.unet.parameters())) is None:
            unpack(self.unet)
            self._packed_in_memory, self._latents_lost = False, True
        return self

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as diffusers does; a pipeline that the folder holds is replaced, and other files stay."""
        if self._packed_in_memory or self._latents_lost:
            _log.warning(
                "The network was packed when it was loaded, so %s contains only the signs of its weights and cannot be "
                "trained further. To copy the latent weights, load with pack=False.",
                save_directory,
            )
        save_whole(super().save_pretrained, save_directory, args, kwargs)
