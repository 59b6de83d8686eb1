"""Fréchet and kernel distances, precision and recall, nearest neighbours, and the report of generated images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from errors_case import assert_error
from generation_case import CLASSES, write_images
from PIL import Image
from scipy.linalg import sqrtm

from binarize.evaluation.features import Features
from binarize.evaluation.generation import evaluate_generator, frechet_distance, precision_and_recall
from binarize.imaging import list_images, read_image

pytest.importorskip("torchmetrics")


class Copier:
    """Stands for a pipeline that returns the images of a folder, or noise."""

    classes = list(CLASSES)
    image_shape = (1, 8, 8)
    num_inference_steps = 3
    device = "cpu"

    def __init__(self, folder: Path, copies: bool) -> None:
        self.images = {name: [read_image(p).to_pil() for p in list_images(folder / name)] for name in CLASSES}
        self.copies, self.labels = copies, list[int]()

    def __call__(self, class_labels: list[int], generator: list[torch.Generator], **options: Any) -> Any:
        self.labels += class_labels
        if not self.copies:
            noise = [torch.randint(0, 256, (8, 8), generator=each, dtype=torch.uint8) for each in generator]
            return ([Image.fromarray(pixels.numpy()) for pixels in noise],)
        pairs = zip(class_labels, generator, strict=True)
        return ([self.images[CLASSES[label]][each.initial_seed() % 6] for label, each in pairs],)


def test_the_frechet_distance_is_that_of_gaussians() -> None:
    random = np.random.default_rng(0)
    ours, theirs = random.normal(size=(200, 5)) @ random.normal(size=(5, 5)), random.normal(1, 2, (300, 5))
    a, b = np.cov(ours.T), np.cov(theirs.T)
    shift = np.square(ours.mean(0) - theirs.mean(0)).sum()
    expected = shift + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert frechet_distance(torch.tensor(ours), torch.tensor(theirs)) == pytest.approx(expected, rel=1e-4)


def test_precision_and_recall_of_half_the_points() -> None:
    theirs = torch.cat([torch.randn(50, 2), torch.randn(50, 2) + 100])
    assert precision_and_recall(theirs, theirs) == (1, 1)
    precision, recall = precision_and_recall(theirs[:50] + 0.01 * torch.randn(50, 2), theirs)
    assert precision > 0.9
    assert 0.4 < recall < 0.6
    assert precision_and_recall(torch.full((20, 2), -50.0) + torch.randn(20, 2), theirs) == (0, 0)


def test_a_copy_is_told_from_noise(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images")
    copier: Any = Copier(folder, copies=True)
    copied = evaluate_generator(copier, folder, progress=False)
    noise = evaluate_generator(Copier(folder, copies=False), folder, progress=False)  # type: ignore[arg-type]
    assert copier.labels == [0] * 6 + [1] * 6
    assert (copied.images, copied.real, copied.steps, copied.features) == (12, 12, 3, "pixels")
    assert copied.frechet < 1e-3 < noise.frechet
    assert copied.nearest == 0 < copied.nearest_real < noise.nearest
    assert (copied.precision, copied.recall) == (1, 1)
    assert noise.precision < 0.3
    written = copied.save(tmp_path / "out")
    assert {path.name for path in written} == {"evaluation.json", "evaluation.csv", "evaluation.md", "nearest.png"}
    assert json.loads(copied.to_json())["frechet"] == copied.frechet
    with Image.open(tmp_path / "out" / "nearest.png") as image:
        rows = np.asarray(image)
    np.testing.assert_array_equal(rows[:8], rows[10:])
    assert_error("already exists", copied.save, tmp_path / "out")
    assert_error("at least 4 of each", evaluate_generator, copier, folder, count=3)


def test_features_of_every_source(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(Features("pixels")([images]), images.flatten(1) / 255)
    (tmp_path / "own.py").write_text(
        "def mean():\n    return lambda images: images.mean((2, 3))\ndef no():\n    return abs\n"
    )
    own = Features(f"{tmp_path}/own.py:mean")([images[:2], images[2:]])
    torch.testing.assert_close(own, images.float().mean((2, 3)).expand(3, 3) / 255)
    assert_error("gives .* for 3 images", Features(f"{tmp_path}/own.py:no"), [images])
    assert_error("'squeeze' is unknown; allowed: pixels, inception", Features, "squeeze")
    torchvision = pytest.importorskip("torchvision")
    network = torchvision.models.squeezenet1_1().eval()
    torch.save(network.state_dict(), tmp_path / "squeezenet1_1.pth")
    found = Features(str(tmp_path / "squeezenet1_1.pth"))
    assert (found.name, found([images]).shape) == ("SqueezeNet", (3, 512))
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pth")
    assert_error("is not a file of torchvision's squeezenet1_1", Features, str(tmp_path / "other.pth"))
