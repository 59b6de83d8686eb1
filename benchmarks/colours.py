"""Measure whether a model keeps colours: the ink of text, the darkest and lightest levels, and flat areas.

Text is drawn at the resolution of the input, as on a screen. Its ink is the median luma of the pixels on the ink's side
of the middle between ink and paper. "drawn large" is the same text drawn at the resolution of the result, whose strokes
have more pixels of pure ink; "reduced" is the model's result reduced to the input's size by averages.

    python benchmarks/colours.py [MODEL ...] [--scale 2] [--steps N] [--strength S] [--overshoot SHARE]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from binarize.imaging import upscale_bicubic
from binarize.models import SuperResolutionPipeline, default_model
from binarize.models.loading import load_pipeline, prepare, sample
from binarize.tables import Column, Table

LUMA = np.array([0.299, 0.587, 0.114])
WHITE = (255, 255, 255)
TEXTS = {
    "black on white": ((0, 0, 0), WHITE),
    "grey on white": ((68, 68, 68), WHITE),
    "blue on white": ((9, 105, 218), WHITE),
    "red on cream": ((190, 30, 40), (250, 244, 225)),
    "white on black": (WHITE, (13, 17, 23)),
}
COLUMNS = ("input", "drawn large", "bicubic", "model", "reduced")
FLAT = ((9, 105, 218), (250, 244, 225), (13, 17, 23), (128, 128, 128), (200, 30, 40), (255, 255, 255))
Colour = tuple[int, int, int]


def text(ink: Colour, paper: Colour, scale: int = 1) -> np.ndarray:
    """Return lines of small text, uint8 (96 * scale, 192 * scale, 3)."""
    image = Image.new("RGB", (192 * scale, 96 * scale), paper)
    draw, top = ImageDraw.Draw(image), 4
    for size in (10, 11, 12, 13, 14):
        font = ImageFont.truetype(str(_font()), size * scale)
        draw.text((4 * scale, top * scale), "Hamburgefonstiv 0123 il|.,;: quick", font=font, fill=ink)
        top += size + 6
    return np.asarray(image)


def ink_level(pixels: np.ndarray, ink: Colour, paper: Colour) -> float:
    """Return the median luma of the pixels on the ink's side of the middle."""
    luma, dark, light = pixels @ LUMA, float(np.dot(ink, LUMA)), float(np.dot(paper, LUMA))
    middle = (dark + light) / 2
    return float(np.median(luma[luma < middle] if dark < light else luma[luma > middle]))


def beyond(pixels: np.ndarray, ink: Colour, paper: Colour) -> float:
    """Return by how many levels single channels leave the range between ink and paper (99.5th percentile)."""
    low, high = np.minimum(ink, paper), np.maximum(ink, paper)
    return float(np.percentile(np.maximum(low - pixels.astype(int), pixels.astype(int) - high).max(-1), 99.5))


def measure(pipeline: SuperResolutionPipeline, steps: int | None) -> dict[str, list[float | None]]:
    """Return what is measured -> a value for each of `COLUMNS`."""
    scale = pipeline.scale
    rows: dict[str, list[float | None]] = {}

    def enlarge(pixels: np.ndarray) -> np.ndarray:
        return np.asarray(sample(pipeline, Image.fromarray(pixels), steps=steps, seed=0))

    for name, (ink, paper) in TEXTS.items():
        small = text(ink, paper)
        large = enlarge(small)
        reduced = np.asarray(Image.fromarray(large).reduce(scale))
        images = (small, text(ink, paper, scale), upscale_bicubic(small, scale), large, reduced)
        rows[f"{name}: median ink"] = [ink_level(image, ink, paper) for image in images]
        rows[f"{name}: beyond the range"] = [beyond(image, ink, paper) for image in images]
    for name, sigma in (("flat", 0.0), ("flat with noise of 3 levels", 3.0)):
        noise = np.random.default_rng(0).normal(0, sigma, (48, 48, 3))
        patches = [(noise + colour).round().clip(0, 255).astype(np.uint8) for colour in FLAT]
        shifts = [np.abs(enlarge(patch).mean((0, 1)) - patch.mean((0, 1))).max() for patch in patches]
        rows[f"{name}: largest shift of a channel's mean"] = [None, None, None, float(max(shifts)), None]
    return rows


def _font() -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--scale", type=int, default=2)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--strength", type=float, help="another residual_strength")
    parser.add_argument("--overshoot", type=float, help="another limit of the overshoot")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for path in options.models or [default_model(options.scale)]:
        pipeline = prepare(load_pipeline(path), "cpu")
        if options.strength is not None:
            pipeline.register_to_config(residual_strength=options.strength)
        if options.overshoot is not None:
            pipeline.register_to_config(overshoot=options.overshoot)
        columns = ["", *(Column(name, ".1f", "right") for name in COLUMNS)]
        rows = [[name, *values] for name, values in measure(pipeline, options.steps).items()]
        print(f"{path}\n\n{Table(columns, rows).to_markdown()}\n")


if __name__ == "__main__":
    main()
