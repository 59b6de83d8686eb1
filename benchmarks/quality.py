"""The quality of super-resolution models by number of denoising steps, compared with bicubic upscaling.

    python benchmarks/quality.py Set5/HR --model models/pretrained/x2 --backbone squeezenet1_1.pth --name x2
    python benchmarks/quality.py held-out --model models/pretrained/x2 --steps 1 2 --name x2 --crops crops-x2.png
    python benchmarks/quality.py Set5/HR --compare runs/default_methods_x2/cells --name budget-x2 --backbone ...

The last command measures every model of a study (`binarize ablate default_methods_x2`).

PSNR and SSIM are measured on Y without a border of `scale` pixels. LPIPS uses SqueezeNet, which is not comparable with
the AlexNet of the papers. Results go to benchmarks/results/quality-NAME.json and .png. `--crops` instead draws a detail
of each image: bicubic, the model with the fewest and with the most steps, and the original.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from tables import quality

from binarize.evaluation import evaluate
from binarize.imaging import degrade, read_image, upscale_bicubic
from binarize.models.loading import load_pipeline, prepare, sample
from binarize.tables import Table

RESULTS = Path(__file__).parent / "results"
_SCORES = (("psnr", "PSNR, dB"), ("lpips", "LPIPS (squeeze)"))


def measure(model: Path, data: Path, steps: list[int], backbone: Path | None) -> dict[str, Any]:
    """Return the mean scores of a model at each number of steps, and of bicubic upscaling (0 steps)."""
    pipeline = prepare(load_pipeline(model))
    rows: list[dict[str, Any]] = []
    for count in steps:
        report = evaluate(
            lambda small, count=count: sample(pipeline, small, steps=count, seed=0),
            data, scale=pipeline.scale, lpips=None if backbone is None else "squeeze", lpips_backbone=backbone,
        )  # fmt: skip
        scores, bicubic = report.mean.model, report.mean.bicubic
        assert bicubic is not None
        if not rows:
            rows.append({"steps": 0, "psnr": bicubic.psnr, "ssim": bicubic.ssim, "lpips": bicubic.lpips})
        rows.append({"steps": count, "psnr": scores.psnr, "ssim": scores.ssim, "lpips": scores.lpips})
    return {"model": str(model), "data": data.name, "scale": pipeline.scale, "rows": rows}


def comparison(models: dict[str, list[dict[str, Any]]]) -> str:
    """Return PSNR / SSIM / LPIPS of several models at each number of steps, as Markdown."""
    bicubic, *first = next(iter(models.values()))
    columns = ["PSNR / SSIM / LPIPS (squeeze)", *(_steps(row["steps"]) for row in first)]
    lines = [[name, *map(_scores, rows)] for name, (_, *rows) in models.items()]
    return Table(columns, [["bicubic", *[_scores(bicubic)] * len(first)], *lines]).to_markdown()


def _scores(row: dict[str, Any]) -> str:
    lpips = "" if row["lpips"] is None else f" / {row['lpips']:.4f}"
    return f"{row['psnr']:.2f} / {row['ssim']:.4f}{lpips}"


def plot(models: dict[str, list[dict[str, Any]]], to: Path) -> None:
    """Plot PSNR and, if measured, LPIPS of several models against the number of steps."""
    import matplotlib.pyplot as plt

    bicubic = next(iter(models.values()))[0]
    scores = [(key, label) for key, label in _SCORES if bicubic[key] is not None]
    figure, axes = plt.subplots(1, len(scores), figsize=(4.5 * len(scores), 3.4), squeeze=False)
    for axis, (key, label) in zip(axes[0], scores, strict=True):
        for name, (_, *rows) in models.items():
            axis.plot([row["steps"] for row in rows], [row[key] for row in rows], marker="o", label=name)
        axis.axhline(bicubic[key], color="gray", linestyle="--", label="bicubic")
        axis.set(xscale="log", xlabel="denoising steps", ylabel=label)
        axis.set_xticks([row["steps"] for row in rows], [str(row["steps"]) for row in rows])
        axis.minorticks_off()
    axes[0, -1].legend()
    figure.tight_layout()
    figure.savefig(to, dpi=110)


def crops(model: Path, data: Path, steps: list[int], to: Path, side: int = 96) -> None:
    """Draw the detail with the most texture of each image: bicubic, two numbers of steps, and the original."""
    pipeline = prepare(load_pipeline(model))
    lines = []
    for high in images_of(data, 8).values():
        around = most_textured(high, 2 * side)
        small = degrade(around, pipeline.scale)
        low = to_image(small)
        panels = [to_image(upscale_bicubic(small, pipeline.scale))]
        panels += [sample(pipeline, low, steps=count, seed=0) for count in (min(steps), max(steps))]
        lines.append([*panels, to_image(around)])
    sheet(["bicubic", _steps(min(steps)), _steps(max(steps)), "original"], lines).save(to)


def images_of(folder: Path, multiple: int) -> dict[str, torch.Tensor]:
    """Return name -> uint8 (3, H, W), cut to sides that are multiples."""
    found = {path.stem: read_image(path).pixels() for path in sorted(folder.iterdir())}
    return {
        name: image[:, : image.shape[1] // multiple * multiple, : image.shape[2] // multiple * multiple]
        for name, image in found.items()
    }


def sheet(titles: list[str], lines: list[list[Image.Image]], zoom: int = 2) -> Image.Image:
    """Return the middles of square panels, half as wide and enlarged, in lines, with a title above each column."""
    side, margin, head = lines[0][0].width // 2, 4, 16
    width, middle = side * zoom, (side // 2, side // 2, side // 2 + side, side // 2 + side)
    size = len(titles) * (width + margin) + margin, len(lines) * (width + margin) + margin + head
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for i, title in enumerate(titles):
        draw.text((margin + i * (width + margin), 2), title, fill="black")
        for j, line in enumerate(lines):
            panel = line[i].crop(middle).resize((width, width), Image.Resampling.NEAREST)
            image.paste(panel, (margin + i * (width + margin), head + margin + j * (width + margin)))
    return image


def _steps(count: int) -> str:
    return f"{count} step{'s' if count > 1 else ''}"


def most_textured(image: torch.Tensor, side: int) -> torch.Tensor:
    """Return the square with the most texture of uint8 (3, H, W)."""
    grey = image.float().mean(0).numpy()
    slopes = np.abs(np.diff(grey, axis=0))[:, 1:] + np.abs(np.diff(grey, axis=1))[1:]
    corners = [
        (y, x) for y in range(0, grey.shape[0] - side, 16) for x in range(0, grey.shape[1] - side, 16)
    ] or [(0, 0)]  # fmt: skip
    best = max(corners, key=lambda c: float(slopes[c[0] : c[0] + side, c[1] : c[1] + side].mean()))
    top, left = best[0] // 8 * 8, best[1] // 8 * 8
    return image[..., top : top + side, left : left + side]


def to_image(pixels: torch.Tensor) -> Image.Image:
    """Return uint8 (3, H, W) as an image."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of high-resolution images")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=Path)
    what.add_argument("--compare", type=Path, help="the cells/ folder of a study; measures all its models")
    parser.add_argument("--name", required=True)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 10])
    parser.add_argument("--backbone", type=Path, help="file with SqueezeNet's weights; required for LPIPS")
    parser.add_argument("--crops", type=Path, help="draw details to this file instead of measuring")
    options = parser.parse_args()
    if options.crops is not None and options.model is None:
        parser.error("--crops requires --model")
    if options.crops is not None:
        crops(options.model, options.data, options.steps, options.crops)
        return
    if options.compare is not None:
        found = sorted(options.compare.glob("*/seed-*/model"))
        if not found:
            parser.error(f"--compare: {options.compare} contains no */seed-*/model")
        seeds = {path.parts[-2] for path in found}
        names = [" ".join(path.parts[-3 : -1 if len(seeds) > 1 else -2]) for path in found]
        paths = dict(zip(names, found, strict=True))
        measured = {name: measure(path, options.data, options.steps, options.backbone) for name, path in paths.items()}
        models = {name: one["rows"] for name, one in measured.items()}
        results = {"data": options.data.name, "models": models}
    else:
        results = measure(options.model, options.data, options.steps, options.backbone)
        models = {"1-bit model": results["rows"]}
    (RESULTS / f"quality-{options.name}.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(models, RESULTS / f"quality-{options.name}.png")
    print(quality(results["rows"]) if options.compare is None else comparison(models))


if __name__ == "__main__":
    main()
