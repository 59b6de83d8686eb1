"""What the demonstration shows: pictures side by side, and a report that says how it went, well or not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from binarize.imaging import write_atomic

if TYPE_CHECKING:
    from binarize import Summary
    from binarize.evaluation import EvaluationReport, ImageScores
    from binarize.recipes import Recipe
    from binarize.training import TrainResult

_ZOOM = 2
_MARGIN = 8
_CAPTION = 40
_FONT_SIZE = 15
# A difference below this is no difference: the seed alone moves the result by more.
_EVEN_DB = 0.05


@dataclass(frozen=True)
class Comparison:
    """One picture in four states; ``low`` is smaller than the others, which agree in size.

    Attributes:
        low: What both methods get.
        bicubic: Enlarged by MATLAB's filter.
        enlarged: Enlarged by the network.
        original: What both try to restore.
        mean: The scores of both.
    """

    low: Image.Image
    bicubic: Image.Image
    enlarged: Image.Image
    original: Image.Image
    mean: ImageScores


def side_by_side(pictures: Comparison, detail: tuple[int, int, int, int]) -> Image.Image:
    """Return the same detail of all four with captions, magnified without smoothing.

    Args:
        pictures: What to show.
        detail: Left, upper, right and lower in pixels of the original.
    """
    width, height = _ZOOM * (detail[2] - detail[0]), _ZOOM * (detail[3] - detail[1])
    baseline = pictures.mean.bicubic
    captions = [
        ("low resolution", f"{pictures.low.width}x{pictures.low.height} in all"),
        ("bicubic", "" if baseline is None else f"{baseline.psnr:.2f} dB"),
        ("1-bit network", f"{pictures.mean.model.psnr:.2f} dB"),
        ("original", f"{pictures.original.width}x{pictures.original.height} in all"),
    ]
    low = pictures.low.resize(pictures.original.size, Image.Resampling.NEAREST)
    panels = (low, pictures.bicubic, pictures.enlarged, pictures.original)
    size = (_MARGIN + len(panels) * (width + _MARGIN), height + _CAPTION + 2 * _MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)
    for index, (panel, (title, remark)) in enumerate(zip(panels, captions, strict=True)):
        left = _MARGIN + index * (width + _MARGIN)
        part = panel.convert("RGB").crop(detail).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(part, (left, _MARGIN))
        draw.text((left, height + 2 * _MARGIN), title, fill="black", font=font)
        draw.text((left, height + 2 * _MARGIN + _CAPTION // 2), remark, fill="dimgray", font=font)
    return sheet


def verdict(mean: ImageScores, steps: int) -> str:
    """Return in words how the network compares with bicubic enlargement, whichever is better."""
    if mean.bicubic is None:
        return f"The network reaches {mean.model.psnr:.2f} dB."
    gain = mean.model.psnr - mean.bicubic.psnr
    figures = f"{mean.model.psnr:.2f} dB against {mean.bicubic.psnr:.2f} dB (PSNR on Y)"
    if gain > _EVEN_DB:
        return f"The network is **{gain:.2f} dB above bicubic enlargement**: {figures}, after only {steps} steps."
    if gain >= -_EVEN_DB:
        return f"The network is **level with bicubic enlargement**: {figures}, after only {steps} steps."
    return (
        f"The network is **{-gain:.2f} dB below bicubic enlargement**: {figures}. That is what {steps} steps on a few "
        "pictures give; the published network was trained for 1,000,000 steps on 3,450 photographs."
    )


def write_report(
    path: Path,
    recipe: Recipe,
    trained: TrainResult,
    cost: Summary,
    scores: EvaluationReport,
    seconds: float,
) -> Path:
    """Write the report as Markdown, replacing an earlier one.

    Args:
        path: Where to; ``comparison.png`` is expected beside it.
        recipe: What was run.
        trained: How it went.
        cost: Of the trained network.
        scores: Of the held-out picture.
        seconds: Wall time of the whole demonstration.
    """
    first, last = trained.history[0], trained.history[-1]
    macs = cost.macs_by_bits
    binary = macs.get(1, 0) / sum(macs.values())
    left_out = (
        ""
        if scores.lpips is not None
        else (
            "\nLPIPS is left out, since its backbone is not on this machine; "
            "`binarize evaluate run/model --data pictures/held-out` fetches it.\n"
        )
    )
    text = f"""# A 1-bit super-resolution network, trained in {trained.seconds / 60:.1f} minutes

![The same detail: low resolution, bicubic, the network, the original](comparison.png)

{verdict(scores.mean, trained.steps)}

{scores.to_markdown()}{left_out}
| | |
|---|---|
| task | enlarge {recipe.scale} times, {recipe.num_inference_steps} denoising steps |
| method | {"full precision" if recipe.method is None else recipe.method.name} |
| parameters | {cost.params / 1e6:.3f} M, a binary weight as 1/32; {cost.raw_params / 1e6:.3f} M in training |
| multiply-accumulates | {100 * binary:.0f}% of them binary |
| training | {trained.steps} steps of {recipe.train_batch_size} patches of {recipe.resolution} pixels squared |
| loss | {first.loss:.4f} at step {first.step}, {last.loss:.4f} at step {last.step} |
| time | {seconds:.0f} s, of which {trained.seconds:.0f} s training |

| file | what it is |
|---|---|
| `enlarged.png` | the held-out photograph, enlarged by the network |
| `comparison.png` | the picture above |
| `run/model/` | the trained model |
| `run/samples/` | what it made of the held-out photograph during training |
| `pictures/` | what it was trained and measured on |

Go on: `binarize upscale IN OUT --model run/model` enlarges a picture of your own;
`binarize recipes cp demo mine.yaml` is the beginning of a longer training.
"""
    return write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), force=True)
