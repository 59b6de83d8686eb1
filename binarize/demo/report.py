"""The demonstration's report and its comparison of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from binarize.tables import Table

if TYPE_CHECKING:
    from binarize import Summary
    from binarize.evaluation import EvaluationReport, ImageScores
    from binarize.recipes import Recipe
    from binarize.training import TrainResult

ZOOM, MARGIN = 2, 8
_CAPTION, _FONT_SIZE = 40, 15
_EQUAL_DB = 0.05  # the seed alone changes the result by more


def side_by_side(images: Sequence[Image.Image], mean: ImageScores, detail: tuple[int, int, int, int]) -> Image.Image:
    """Return the same detail of several images with captions, magnified without smoothing.

    `images` are the low resolution (of smaller size), bicubic upscaling, the network's result and the original;
    `detail` is left, upper, right and lower in pixels of the original.
    """
    width, height = ZOOM * (detail[2] - detail[0]), ZOOM * (detail[3] - detail[1])
    low, _, _, original = images
    captions = [
        ("low resolution", f"{low.width}x{low.height} in all"),
        ("bicubic", "" if mean.bicubic is None else f"{mean.bicubic.psnr:.2f} dB"),
        ("1-bit network", f"{mean.model.psnr:.2f} dB"),
        ("original", f"{original.width}x{original.height} in all"),
    ]
    size = (MARGIN + len(images) * (width + MARGIN), height + _CAPTION + 2 * MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)
    for index, (image, (title, remark)) in enumerate(zip(images, captions, strict=True)):
        left = MARGIN + index * (width + MARGIN)
        whole = image.convert("RGB").resize(original.size, Image.Resampling.NEAREST)
        sheet.paste(whole.crop(detail).resize((width, height), Image.Resampling.NEAREST), (left, MARGIN))
        draw.text((left, height + 2 * MARGIN), title, fill="black", font=font)
        draw.text((left, height + 2 * MARGIN + _CAPTION // 2), remark, fill="dimgray", font=font)
    return sheet


def verdict(mean: ImageScores, steps: int) -> str:
    """Return the comparison of the network with bicubic upscaling as a sentence in Markdown."""
    if mean.bicubic is None:
        return f"The network reaches {mean.model.psnr:.2f} dB."
    gain = mean.model.psnr - mean.bicubic.psnr
    figures = f"{mean.model.psnr:.2f} dB against {mean.bicubic.psnr:.2f} dB (PSNR on Y)"
    if gain > _EQUAL_DB:
        return f"The network is **{gain:.2f} dB above bicubic upscaling**: {figures}, after only {steps} steps."
    if gain >= -_EQUAL_DB:
        return f"The network is **level with bicubic upscaling**: {figures}, after only {steps} steps."
    return (
        f"The network is **{-gain:.2f} dB below bicubic upscaling**: {figures}, after {steps} steps on a few images; "
        "the published network was trained for 1,000,000 steps on 3,450 images."
    )


def make_report(recipe: Recipe, trained: TrainResult, cost: Summary, scores: EvaluationReport, seconds: float) -> str:
    """Return the report as Markdown; it refers to ``comparison.png`` beside it."""
    first, last = trained.history[0], trained.history[-1]
    binary = cost.macs_by_bits.get(1, 0) / sum(cost.macs_by_bits.values())
    get_it = "`binarize evaluate run/model --data images/held-out` downloads it"
    lpips = f"\nLPIPS is omitted, because its backbone is not on this machine; {get_it}.\n"
    settings = [
        ("task", f"upscale by {recipe.scale}, {recipe.num_inference_steps} denoising steps"),
        ("method", "full precision" if recipe.method is None else recipe.method.name),
        ("parameters", f"{cost.params / 1e6:.3f} M (binary weights / 32); {cost.raw_params / 1e6:.3f} M in training"),
        ("multiply-accumulates", f"{100 * binary:.0f}% of them binary"),
        ("training", f"{trained.steps} steps, {recipe.train_batch_size} patches of {recipe.resolution} pixels squared"),
        ("loss", f"{first.loss:.4f} at step {first.step}, {last.loss:.4f} at step {last.step}"),
        ("time", f"{seconds:.0f} s, of which {trained.seconds:.0f} s training"),
    ]
    files = [
        ("`upscaled.png`", "the held-out image, upscaled by the network"),
        ("`comparison.png`", "the comparison above"),
        ("`run/model/`", "the trained model"),
        ("`run/samples/`", "results for the held-out image during training"),
        ("`images/`", "the images for training and measuring"),
    ]
    return f"""# A 1-bit super-resolution network, trained in {trained.seconds / 60:.1f} minutes

![The same detail: low resolution, bicubic, the network, the original](comparison.png)

{verdict(scores.mean, trained.steps)}

{scores.to_markdown()}{lpips if scores.lpips is None else ""}
{Table(["", ""], settings).to_markdown()}

{Table(["file", "content"], files).to_markdown()}

Next: `binarize upscale IN -o OUT --model run/model` upscales your own image; `binarize recipes cp demo mine.yaml`
starts a longer training.
"""
