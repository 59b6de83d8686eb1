"""The demonstration: from a recipe and photographs to a trained 1-bit network, a comparison and a report, in minutes.

It needs no data set and no network: the photographs are those that scikit-image ships inside its package.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from binarize.demo.report import Comparison, side_by_side, write_report
from binarize.errors import BinarizeError
from binarize.imaging import degrade, read_image, save_image, upscale_bicubic

if TYPE_CHECKING:
    from binarize.evaluation import EvaluationReport
    from binarize.models import SuperResolutionPipeline

RECIPE = "demo"
TRAINING = ("chelsea.png", "coffee.png", "color.png", "ihc.png", "motorcycle_left.png", "rocket.jpg")
"""Pictures that scikit-image ships, to train on: coloured ones, since grey ones teach nothing about colours."""
HELD_OUT = "astronaut.png"
"""The one that is never trained on."""
PART = (96, 0, 352, 256)
"""What of it is used: left, upper, right, lower."""
DETAIL = (64, 56, 192, 184)
"""What of that part the comparison shows."""


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration leaves.

    Attributes:
        folder: Where everything is.
        model: The trained pipeline's folder.
        enlarged: The held-out picture, enlarged by the model.
        comparison: The pictures side by side.
        report: The Markdown file.
        scores: The held-out picture, measured for the model and for bicubic enlargement.
        steps: Optimiser steps that it was trained for.
        seconds: Wall time of everything.
    """

    folder: Path
    model: Path
    enlarged: Path
    comparison: Path
    report: Path
    scores: EvaluationReport
    steps: int
    seconds: float


def run_demo(
    output: str | Path = "demo-output",
    *,
    overrides: Sequence[str] = (),
    force: bool = False,
    say: Callable[[str], object] = print,
    progress: bool = True,
) -> DemoResult:
    """Train ``demo.yaml``, measure it on a picture that it never saw, enlarge that picture, and write a report.

    Args:
        output: Folder for everything; created.
        overrides: ``"key=value"`` changes of the recipe.
        force: Replace an earlier demonstration in the folder.
        say: Called with a line for each stage.
        progress: Show progress bars.

    Raises:
        BinarizeError: If scikit-image or its pictures are missing, the folder holds an earlier demonstration and
            ``force`` is not given, or the recipe with its changes cannot be run.
    """
    import binarize
    from binarize.models.loading import load_pipeline
    from binarize.recipes import load_recipe
    from binarize.training import train

    began = time.perf_counter()
    output = Path(output)
    if (output / "report.md").exists() and not force:
        raise BinarizeError(f"{output}: holds a demonstration; choose another folder, or --force to replace it.")
    source = image_folder()
    recipe = load_recipe(
        RECIPE,
        [
            f"train_data_dir={output / 'pictures' / 'training'}",
            f"validation_data_dir={output / 'pictures' / 'held-out'}",
            f"output_dir={output / 'run'}",
            *overrides,
        ],
    )
    prepare_images(source, output / "pictures", recipe.scale)

    say(f"1/3  training {RECIPE}.yaml: {recipe.max_train_steps} steps on {len(TRAINING)} pictures of scikit-image")
    with _one_thread():
        trained = train(recipe, force=True, progress=progress)
    say("2/3  enlarging the photograph that was held out, and measuring the result")
    pipeline = load_pipeline(trained.model_dir)
    pipeline.set_progress_bar_config(disable=True)
    low = Image.open(output / "pictures" / f"held-out-x{recipe.scale}-small.png")
    enlarged, scores = _measure(pipeline, low, output / "pictures" / "held-out", recipe.num_inference_steps)
    say("3/3  writing the comparison and the report")
    save_image(enlarged, output / "enlarged.png", force=True)
    comparison = Comparison(
        low=low,
        bicubic=_bicubic(low, recipe.scale),
        enlarged=enlarged,
        original=Image.open(output / "pictures" / "held-out" / HELD_OUT),
        mean=scores.mean,
    )
    save_image(side_by_side(comparison, DETAIL), output / "comparison.png", force=True)
    seconds = time.perf_counter() - began
    write_report(output / "report.md", recipe, trained, binarize.summary(pipeline.unet), scores, seconds)
    return DemoResult(
        folder=output,
        model=trained.model_dir,
        enlarged=output / "enlarged.png",
        comparison=output / "comparison.png",
        report=output / "report.md",
        scores=scores,
        steps=trained.steps,
        seconds=seconds,
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: here a second gains little where a core is free, and costs minutes where none is."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def image_folder() -> Path:
    """Return the folder in which scikit-image ships its pictures; nothing is downloaded.

    Raises:
        BinarizeError: If scikit-image is not installed, or came without a picture that is needed.
    """
    found = importlib.util.find_spec("skimage")
    if found is None or found.origin is None:
        raise BinarizeError("the demonstration uses pictures of scikit-image: pip install 'binarize-diffusion[eval]'")
    folder = Path(found.origin).parent / "data"
    missing = [name for name in (*TRAINING, HELD_OUT) if not (folder / name).is_file()]
    if missing:
        raise BinarizeError(
            f"{folder}: this scikit-image comes without {', '.join(missing)}; its packages on PyPI have them."
        )
    return folder


def prepare_images(source: Path, target: Path, scale: int) -> None:
    """Copy what is used into ``training/`` and ``held-out/``, and the held-out picture degraded beside them."""
    (target / "training").mkdir(parents=True, exist_ok=True)
    (target / "held-out").mkdir(parents=True, exist_ok=True)
    for name in TRAINING:
        picture = read_image(source / name).to_pil()
        save_image(picture, target / "training" / f"{Path(name).stem}.png", force=True)
    part = read_image(source / HELD_OUT).to_pil().crop(PART)
    save_image(part, target / "held-out" / HELD_OUT, force=True)
    small = degrade(read_image(target / "held-out" / HELD_OUT).pixels(), scale)
    save_image(_image(small), target / f"held-out-x{scale}-small.png", force=True)


def _measure(
    pipeline: SuperResolutionPipeline, low: Image.Image, folder: Path, steps: int
) -> tuple[Image.Image, EvaluationReport]:
    """Return the enlarged held-out picture, and the scores of that very picture."""
    from binarize.evaluation import evaluate
    from binarize.models.loading import sample

    enlarged = sample(pipeline, low, steps=steps, seed=0)
    backbone = _cached_backbone()
    scores = evaluate(
        lambda small: enlarged,
        folder,
        scale=pipeline.scale,
        lpips=None if backbone is None else "alex",
        lpips_backbone=backbone,
        progress=False,
        name=RECIPE,
    )
    return enlarged, scores


def _cached_backbone() -> Path | None:
    """Return LPIPS's backbone if it was downloaded before; 240 MB are too much for a demonstration to fetch."""
    if importlib.util.find_spec("lpips") is None:
        return None
    return next(iter(sorted((Path(torch.hub.get_dir()) / "checkpoints").glob("alexnet-*.pth"))), None)


def _bicubic(low: Image.Image, scale: int) -> Image.Image:
    from binarize.imaging import to_image

    return _image(upscale_bicubic(to_image(low).pixels(), scale))


def _image(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
