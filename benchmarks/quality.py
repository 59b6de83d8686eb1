"""What a super-resolution model gives against the number of denoising steps, beside bicubic enlargement.

    python benchmarks/quality.py Set5/HR --model models/pretrained/x2 --backbone squeezenet1_1.pth --name x2
    python benchmarks/quality.py held-out --model models/pretrained/x2 --steps 1 2 --name x2 --crops crops-x2.png
    python benchmarks/quality.py Set5/HR --compare runs/default_methods_x2/cells --name budget-x2 --backbone ...

The last one measures every model of a study (`binarize ablate default_methods_x2`) in the same way.

PSNR and SSIM on Y with a border of the scale shaved, LPIPS of SqueezeNet (not comparable with that of AlexNet, which
papers report). Results go to benchmarks/results/quality-NAME.json and .png; `--crops` draws a detail of the folder's
pictures: bicubic, the model with the fewest and with the most steps, the original.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from binarize.evaluation import evaluate
from binarize.imaging import degrade, read_image, upscale_bicubic
from binarize.models.loading import load_pipeline, prepare, sample

RESULTS = Path(__file__).parent / "results"
_SCORES = (("psnr", "PSNR, dB"), ("lpips", "LPIPS (squeeze)"))


def measure(model: Path, data: Path, steps: list[int], backbone: Path | None) -> dict[str, Any]:
    """Return the mean scores of a model at each number of steps, and of bicubic enlargement."""
    pipeline = prepare(load_pipeline(model))
    rows: list[dict[str, Any]] = []
    for count in steps:
        report = evaluate(
            lambda small, count=count: sample(pipeline, small, steps=count, seed=0),
            data, scale=pipeline.scale, lpips=None if backbone is None else "squeeze", lpips_backbone=backbone,
        )  # fmt: skip
        found, bicubic = report.mean.model, report.mean.bicubic
        assert bicubic is not None
        if not rows:
            rows.append({"steps": 0, "psnr": bicubic.psnr, "ssim": bicubic.ssim, "lpips": bicubic.lpips})
        rows.append({"steps": count, "psnr": found.psnr, "ssim": found.ssim, "lpips": found.lpips})
    return {"model": str(model), "data": data.name, "scale": pipeline.scale, "rows": rows}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = ["| | PSNR | SSIM | LPIPS (squeeze) |", "| :-- | --: | --: | --: |"]
    for row in rows:
        name = "bicubic" if row["steps"] == 0 else _steps(row["steps"])
        lpips = "" if row["lpips"] is None else f"{row['lpips']:.4f}"
        lines.append(f"| {name} | {row['psnr']:.2f} | {row['ssim']:.4f} | {lpips} |")
    return "\n".join(lines)


def comparison(results: dict[str, Any]) -> str:
    """Return PSNR / SSIM / LPIPS of several models, each at the numbers of steps, as Markdown."""
    models: dict[str, list[dict[str, Any]]] = results["models"]
    bicubic, *first = next(iter(models.values()))
    counts = [row["steps"] for row in first]
    lines = [
        "| PSNR / SSIM / LPIPS (squeeze) | " + " | ".join(map(_steps, counts)) + " |",
        "| :-- |" + " --: |" * len(counts),
        f"| bicubic, {_scores(bicubic)} |" + " |" * len(counts),
    ]
    for name, (_, *rows) in models.items():
        lines.append(f"| {name} | " + " | ".join(map(_scores, rows)) + " |")
    return "\n".join(lines)


def _scores(row: dict[str, Any]) -> str:
    lpips = "" if row["lpips"] is None else f" / {row['lpips']:.4f}"
    return f"{row['psnr']:.2f} / {row['ssim']:.4f}{lpips}"


def plot(models: dict[str, list[dict[str, Any]]], to: Path) -> None:
    """Draw PSNR and LPIPS, where it was measured, of models against the number of steps."""
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


def crops(model: Path, data: Path, steps: list[int], to: Path, side: int = 96, zoom: int = 2) -> None:
    """Draw the detail with most texture of each picture, enlarged in several ways."""
    pipeline = prepare(load_pipeline(model))
    lines = []
    for path in sorted(data.iterdir()):
        high = read_image(path).pixels()
        high = high[..., : high.shape[-2] // 8 * 8, : high.shape[-1] // 8 * 8]
        top, left = _busiest(high.float().mean(0).numpy(), 2 * side)
        around = high[..., top : top + 2 * side, left : left + 2 * side]
        small = degrade(around, pipeline.scale)
        low = _image(small)
        panels = [_image(upscale_bicubic(small, pipeline.scale))]
        panels += [sample(pipeline, low, steps=count, seed=0) for count in (min(steps), max(steps))]
        panels.append(_image(around))
        middle = (side // 2, side // 2, side // 2 + side, side // 2 + side)
        lines.append([panel.crop(middle).resize((side * zoom,) * 2, Image.Resampling.NEAREST) for panel in panels])
    width, margin, head = side * zoom, 4, 16
    sheet = Image.new("RGB", (4 * (width + margin) + margin, len(lines) * (width + margin) + margin + head), "white")
    draw = ImageDraw.Draw(sheet)
    for i, title in enumerate(("bicubic", _steps(min(steps)), _steps(max(steps)), "original")):
        draw.text((margin + i * (width + margin), 2), title, fill="black")
        for j, line in enumerate(lines):
            sheet.paste(line[i], (margin + i * (width + margin), head + margin + j * (width + margin)))
    sheet.save(to)


def _steps(count: int) -> str:
    return f"{count} step{'s' if count > 1 else ''}"


def _busiest(grey: np.ndarray, side: int) -> tuple[int, int]:
    slopes = np.abs(np.diff(grey, axis=0))[:, 1:] + np.abs(np.diff(grey, axis=1))[1:]
    corners = [
        (y, x) for y in range(0, grey.shape[0] - side, 16) for x in range(0, grey.shape[1] - side, 16)
    ] or [(0, 0)]  # fmt: skip
    best = max(corners, key=lambda c: float(slopes[c[0] : c[0] + side, c[1] : c[1] + side].mean()))
    return best[0] // 8 * 8, best[1] // 8 * 8


def _image(pixels: Any) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of high-resolution pictures")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=Path)
    what.add_argument("--compare", type=Path, help="the cells/ folder of a study, whose models are all measured")
    parser.add_argument("--name", required=True)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 10])
    parser.add_argument("--backbone", type=Path, help="SqueezeNet's weights; without them there is no LPIPS")
    parser.add_argument("--crops", type=Path, help="draw details into this file instead of measuring")
    given = parser.parse_args()
    if given.crops is not None and given.model is None:
        parser.error("--crops draws the pictures of one --model")
    if given.crops is not None:
        crops(given.model, given.data, given.steps, given.crops)
        return
    if given.compare is not None:
        found = sorted(given.compare.glob("*/seed-*/model"))
        if not found:
            parser.error(f"--compare: {given.compare} holds no */seed-*/model")
        seeds = {path.parts[-2] for path in found}
        names = [" ".join(path.parts[-3 : -1 if len(seeds) > 1 else -2]) for path in found]
        paths = dict(zip(names, found, strict=True))
        measured = {name: measure(path, given.data, given.steps, given.backbone) for name, path in paths.items()}
        models = {name: one["rows"] for name, one in measured.items()}
        results = {"data": given.data.name, "models": models}
    else:
        results = measure(given.model, given.data, given.steps, given.backbone)
        models = {"1-bit model": results["rows"]}
    (RESULTS / f"quality-{given.name}.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(models, RESULTS / f"quality-{given.name}.png")
    print(table(results["rows"]) if given.compare is None else comparison(results))


if __name__ == "__main__":
    main()
