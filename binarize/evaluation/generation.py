"""Measure generated images: FID, KID, precision and recall, and how near they are to the training images."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from binarize.errors import BinarizeError
from binarize.evaluation.feature_names import INCEPTION_NAME, PIXELS
from binarize.evaluation.features import Features
from binarize.files import write_text_atomic
from binarize.imaging import save_image
from binarize.imaging.labelled import LabelledFolder
from binarize.models import GenerationPipeline
from binarize.models.generation import generate_images
from binarize.models.grid import image_grid
from binarize.progress import ProgressBar
from binarize.tables import Column, Table

if TYPE_CHECKING:
    from rich.table import Table as RichTable

_BATCH = 64
_NEIGHBOURS = 3  # Kynkäänniemi et al.
FEWEST = _NEIGHBOURS + 1  # images, generated or real
_SHOWN = 16


@dataclass(frozen=True)
class GenerationReport:
    """Measures of generated images against real ones; ``rich.print`` shows a table.

    Attributes:
        name: The model.
        features: What distances are measured in; values of different features are not comparable.
        images: Number of generated images.
        real: Number of real images.
        steps: Denoising steps.
        frechet: Fréchet distance of the features (Heusel et al. 2017); FID with Inception's.
        kid: Kernel distance (Bińkowski et al. 2018), the mean over subsets, and ``kid_std`` its deviation.
        precision: Share of generated images that are as near to a real image as its third neighbour (Kynkäänniemi et
            al. 2019), and ``recall`` the reverse.
        nearest: Mean distance in features from a generated image to the nearest real one, and ``nearest_real`` that of
            the real images among themselves. A network that copies its training images has a much smaller ``nearest``.
        seconds: Time of sampling.
        comparison: Some generated images above their nearest real ones.
    """

    name: str
    features: str
    images: int
    real: int
    steps: int
    frechet: float
    kid: float
    kid_std: float
    precision: float
    recall: float
    nearest: float
    nearest_real: float
    seconds: float
    comparison: Image.Image

    def values(self) -> dict[str, Any]:
        """Return all attributes but the image."""
        return {key: value for key, value in asdict(self).items() if key != "comparison"}

    def to_json(self) -> str:
        """Return all values at full precision."""
        return json.dumps(self.values(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def to_csv(self) -> str:
        """Return a line of headings and one of values, at full precision."""
        return Table([*self.values()], [[*self.values().values()]]).to_csv()

    def to_markdown(self) -> str:
        """Return a table."""
        return f"{self._title()}.\n\n{self._table().to_markdown()}\n"

    def table(self) -> RichTable:
        """Return a table for the terminal."""
        return self._table().to_rich(title=self._title())

    def __rich__(self) -> RichTable:
        return self.table()

    def save(self, folder: str | os.PathLike[str], *, force: bool = False) -> list[Path]:
        """Write ``evaluation.json``, ``.csv`` and ``.md``, and ``nearest.png``; see `EvaluationReport.save`."""
        folder = Path(folder)
        texts = {"json": self.to_json(), "csv": self.to_csv(), "md": self.to_markdown()}
        paths = {folder / f"evaluation.{suffix}": text for suffix, text in texts.items()}
        picture = folder / "nearest.png"
        existing = [path for path in (*paths, picture) if path.exists()]
        if existing and not force:
            raise BinarizeError(f"{existing[0]}: already exists; give another folder, or force to replace it")
        folder.mkdir(parents=True, exist_ok=True)
        written = [write_text_atomic(path, text, force=force) for path, text in paths.items()]
        return [*written, save_image(self.comparison, picture, force=force)]

    def _title(self) -> str:
        return f"{self.name}: {self.images} images in {self.steps} steps against {self.real}, by {self.features}"

    def _table(self) -> Table:
        keys = ("frechet", "kid", "kid_std", "precision", "recall", "nearest", "nearest_real")
        names = ("FID" if self.features == INCEPTION_NAME else "Fréchet distance", "KID", "±", *keys[3:5])
        headings = [Column(name, ".4g", "right") for name in (*names, "nearest", "nearest among real")]
        return Table(headings, [[getattr(self, key) for key in keys]])


class RealImages:
    """The images of a folder and their features, with which generated images are compared.

    Attributes:
        pixels: uint8 (N, C, H, W).
        features: float32 (N, D).
        nearest: Mean distance from an image's features to those of the nearest other one.

    Args:
        data: The folder; with classes, of a sub-folder per class.
        pipeline: A pipeline that generates images of their size, channels and classes.
        features: See `Features`.

    Raises:
        BinarizeError: If the images cannot be used, there are too few, or the features cannot be loaded.
    """

    def __init__(self, data: str | os.PathLike[str], pipeline: GenerationPipeline, features: str = PIXELS) -> None:
        require_torchmetrics()
        channels, height, width = pipeline.image_shape
        if height != width:
            raise BinarizeError(f"evaluate: images must be square; the model's are {width}x{height}.")
        self.folder = LabelledFolder(Path(data), resolution=height, channels=channels, classes=pipeline.classes)
        self.extractor = Features(features, pipeline.device)
        self.pixels = torch.stack(self.folder.pixels)
        self.features = self.extractor(self.pixels.split(_BATCH))
        among = _distances(self.features, self.features).fill_diagonal_(torch.inf)
        self.nearest = float(among.min(dim=1).values.mean())

    def evaluate(
        self,
        pipeline: GenerationPipeline,
        *,
        count: int | None = None,
        seed: int = 0,
        batch_size: int = _BATCH,
        progress: bool = True,
        name: str = "model",
        **options: Any,
    ) -> GenerationReport:
        """Generate images and compare them; for the arguments, see `evaluate_generator`."""
        folder, theirs = self.folder, self.features
        count = len(folder) if count is None else count
        if min(count, len(folder)) < FEWEST:
            raise BinarizeError(
                f"evaluate: {count} generated and {len(folder)} real images; needed: at least {FEWEST} of each."
            )
        labels = [folder.labels[number * len(folder) // count] for number in range(count)]
        classes = labels if pipeline.classes else None
        started = time.perf_counter()
        images = generate_images(pipeline, count, class_labels=classes, seed=seed, batch_size=batch_size, **options)
        bar = ProgressBar(images, total=count, desc="generate", unit="image", disable=not progress)
        drawn = torch.stack([_tensor(image) for image in bar])
        seconds = time.perf_counter() - started
        ours = self.extractor(drawn.split(_BATCH))
        nearest = _distances(ours, theirs).min(dim=1)
        steps = options.get("num_inference_steps")
        kid, kid_std = _kid(ours, theirs)
        return GenerationReport(
            name, self.extractor.name, count, len(folder), pipeline.num_inference_steps if steps is None else steps,
            frechet_distance(ours, theirs), kid, kid_std, *precision_and_recall(ours, theirs),
            float(nearest.values.mean()), self.nearest, seconds,
            _comparison(drawn, self.pixels, nearest.indices),
        )  # fmt: skip


def evaluate_generator(
    pipeline: GenerationPipeline, data: str | os.PathLike[str], *, features: str = PIXELS, **options: Any
) -> GenerationReport:
    """Generate images and compare them with those of a folder.

    Classes have the shares that they have in the folder.

    Args:
        pipeline: The pipeline.
        data: The folder of real images; with classes, of a sub-folder per class.
        features: See `Features`.
        **options: ``count``, the number of images to generate, by default as many as there are real ones; ``seed`` of
            the first image, see `binarize.models.generation.generate_images`; ``batch_size``, images per call of the
            network; ``progress``, whether to show a progress bar; ``name`` of the model in the report; and
            ``num_inference_steps``, ``guidance_scale`` and ``eta`` of the pipeline's call.

    Raises:
        BinarizeError: If the images cannot be used, there are too few, or the features cannot be loaded.
    """
    return RealImages(data, pipeline, features).evaluate(pipeline, **options)


def frechet_distance(ours: Tensor, theirs: Tensor) -> float:
    """Return |m - n|^2 + tr(A + B - 2 (A B)^(1/2)) for the means m, n and covariances A, B of features (N, D)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    return float(_filled(FrechetInceptionDistance(_Given(ours.shape[1])), ours, theirs).compute())


def precision_and_recall(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Return the shares of our features (N, D) in the manifold of theirs, and of theirs in that of ours.

    A manifold is the union of balls around its points, each up to the third nearest other point.
    """

    def share(points: Tensor, manifold: Tensor) -> float:
        radii = _distances(manifold, manifold).kthvalue(_NEIGHBOURS + 1, dim=1).values  # the nearest is the point
        return float((_distances(points, manifold) <= radii).any(dim=1).float().mean())

    return share(ours, theirs), share(theirs, ours)


def _distances(one: Tensor, other: Tensor) -> Tensor:
    """Return Euclidean distances, (N, M); the faster way by a product is not exact for near points."""
    return torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist")


def _kid(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(1000, len(ours), len(theirs))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*will save all extracted features.*", UserWarning)
        metric = KernelInceptionDistance(_Given(ours.shape[1]), subset_size=size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the subsets
        mean, deviation = _filled(metric, ours, theirs).compute()
    return float(mean), float(deviation)


class _Given(nn.Identity):
    """Stands for a feature extractor where the features are already computed."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.num_features = size


def _filled(metric: Any, ours: Tensor, theirs: Tensor) -> Any:
    metric.update(theirs.double(), real=True)
    metric.update(ours.double(), real=False)
    return metric


def require_torchmetrics() -> None:
    """Raise an error with the command that installs torchmetrics, if it is missing."""
    try:
        import torchmetrics  # noqa: F401
    except ImportError as error:
        raise BinarizeError(
            "evaluate: FID and KID need torchmetrics: pip install 'binarize-diffusion[eval]'."
        ) from error


def _tensor(image: Image.Image) -> Tensor:
    pixels = np.array(image)
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)).contiguous()


def _comparison(drawn: Tensor, real: Tensor, nearest: Tensor) -> Image.Image:
    chosen: Sequence[int] = [number * len(drawn) // _SHOWN for number in range(min(_SHOWN, len(drawn)))]
    shown = [drawn[i] for i in chosen] + [real[int(nearest[i])] for i in chosen]
    arrays = [(pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)).numpy() for pixels in shown]
    return image_grid([Image.fromarray(array) for array in arrays], len(chosen))
