"""The demonstration: a trained 1-bit network, a comparison and a report, in minutes and without a download."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image

from binarize.conversion.summary import summary
from binarize.demo.folder import REPORT, check_folder
from binarize.demo.report import make_report, side_by_side
from binarize.errors import BinarizeError
from binarize.evaluation import EvaluationReport, evaluate
from binarize.files import write_text_atomic
from binarize.imaging import degrade, read_image, save_image, upscale_bicubic
from binarize.models.loading import load_pipeline, sample
from binarize.recipes import Recipe, load_recipe
from binarize.training import train

RECIPE = "demo"
TRAINING = ("chelsea.png", "coffee.png", "color.png", "ihc.png", "motorcycle_left.png", "rocket.jpg")
"""Images of scikit-image for training, all coloured."""
HELD_OUT = "astronaut.png"
CROP, DETAIL = (96, 0, 352, 256), (64, 56, 192, 184)
"""The part of the held-out image that is used, and the part of that part to show: left, upper, right, lower."""


@dataclass(frozen=True)
class DemoResult:
    """The folders and files of the demonstration, and the scores of the held-out image."""

    folder: Path
    model: Path
    upscaled: Path
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
    """Train ``demo.yaml`` with ``"key=value"`` overrides, measure a held-out image, and write a report to `output`.

    An earlier demonstration there is replaced only by `force`. `say` is called with a line for each stage.
    """
    started = time.perf_counter()
    output = Path(output)
    images, held_out = output / "images", output / "images" / "held-out"
    check_folder(output, force=force)
    source = image_folder()
    folders = [f"train_data_dir={images / 'training'}", f"validation_data_dir={held_out}"]
    recipe = cast(Recipe, load_recipe(RECIPE, [*folders, f"output_dir={output / 'run'}", *overrides]))
    pixels = prepare_images(source, images, recipe.scale)
    low, bicubic = _to_pil(pixels), _to_pil(upscale_bicubic(pixels, recipe.scale))

    say(f"1/3  training {RECIPE}.yaml: {recipe.max_train_steps} steps on {len(TRAINING)} images of scikit-image")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second thread gains little on a free core and costs minutes on a busy one
    try:
        trained = train(recipe, force=True, progress=progress)
    finally:
        torch.set_num_threads(threads)
    say("2/3  upscaling and measuring the held-out image")
    pipeline = load_pipeline(trained.model_dir)
    pipeline.set_progress_bar_config(disable=True)
    upscaled = sample(pipeline, low, steps=recipe.num_inference_steps, seed=0)
    backbone = _cached_backbone()
    metric: Any = {"lpips": None if backbone is None else "alex", "lpips_backbone": backbone}
    scores = evaluate(lambda image: upscaled, held_out, scale=pipeline.scale, **metric, progress=False, name=RECIPE)
    say("3/3  writing the comparison and the report")
    large = save_image(upscaled, output / "upscaled.png", force=True)
    sheet = side_by_side((low, bicubic, upscaled, Image.open(held_out / HELD_OUT)), scores.mean, DETAIL)
    comparison = save_image(sheet, output / "comparison.png", force=True)
    seconds = time.perf_counter() - started
    report = make_report(recipe, trained, summary(pipeline.unet), scores, seconds)
    written = write_text_atomic(output / REPORT, report)
    return DemoResult(output, trained.model_dir, large, comparison, written, scores, trained.steps, seconds)


def image_folder() -> Path:
    """Return the folder of the images that come with scikit-image."""
    found = importlib.util.find_spec("skimage")
    if found is None or found.origin is None:
        raise BinarizeError("the demonstration uses images of scikit-image: pip install 'binarize-diffusion[eval]'")
    folder = Path(found.origin).parent / "data"
    missing = [name for name in (*TRAINING, HELD_OUT) if not (folder / name).is_file()]
    if missing:
        raise BinarizeError(f"{folder}: this scikit-image lacks {', '.join(missing)}; its packages on PyPI have them.")
    return folder


def prepare_images(source: Path, target: Path, scale: int) -> torch.Tensor:
    """Write the images to ``training/`` and ``held-out/``; return the held-out image at low resolution."""
    for folder in ("training", "held-out"):
        (target / folder).mkdir(parents=True, exist_ok=True)
    for name in TRAINING:
        save_image(read_image(source / name).to_pil(), target / "training" / f"{Path(name).stem}.png", force=True)
    held_out = target / "held-out" / HELD_OUT
    save_image(read_image(source / HELD_OUT).to_pil().crop(CROP), held_out, force=True)
    low = degrade(read_image(held_out).pixels(), scale)
    save_image(_to_pil(low), target / f"held-out-x{scale}-small.png", force=True)
    return low


def _cached_backbone() -> Path | None:
    """Return LPIPS's backbone if it was downloaded before; the demonstration does not download its 240 MB."""
    if importlib.util.find_spec("lpips") is None:
        return None
    return next(iter(sorted((Path(torch.hub.get_dir()) / "checkpoints").glob("alexnet-*.pth"))), None)


def _to_pil(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
