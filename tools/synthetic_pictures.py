"""Draw training pictures that photographs lack: text, user interfaces, line art and gradients.

The pictures are a function of the seed (and of the versions of Pillow, FreeType and matplotlib, whose fonts they use),
contain nobody's work, and may be used for anything.

    python tools/synthetic_pictures.py FOLDER --count 24 --size 768
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono",
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "cmr10", "cmss10", "cmtt10",
)  # fmt: skip
SYLLABLES = ("an", "be", "cor", "dis", "el", "fi", "gra", "hum", "in", "ka", "lo", "mer", "no", "o", "per", "qua", "ri")
SYLLABLES += ("sta", "to", "um", "ver", "wi", "xy", "za", "th", "ing")
Colour = tuple[int, ...]
Random = np.random.Generator


def colour(rng: Random, lowest: int = 0, highest: int = 255) -> Colour:
    """Return a random colour; one in three is grey."""
    levels = rng.integers(lowest, highest + 1, 3)
    return tuple(int(level) for level in (levels[:1].repeat(3) if rng.random() < 1 / 3 else levels))


def ink_and_paper(rng: Random) -> tuple[Colour, Colour]:
    """Return two colours that can be read on each other: black on white, dark on light, or the reverse."""
    if rng.random() < 0.3:
        pair = ((0, 0, 0), (255, 255, 255))
    else:
        pair = (colour(rng, 0, 110), colour(rng, 170, 255))
        if rng.random() < 0.3:  # a saturated ink, as in links and signs
            strong = [0, 0, 0]
            strong[int(rng.integers(3))] = int(rng.integers(150, 256))
            pair = (tuple(strong), pair[1])
    return pair if rng.random() < 0.7 else pair[::-1]


def font(rng: Random, smallest: int = 9, largest: int = 40) -> ImageFont.FreeTypeFont:
    """Return a random font; small sizes are frequent."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    size = int(smallest * (largest / smallest) ** rng.random())
    return ImageFont.truetype(folder / f"{FONTS[rng.integers(len(FONTS))]}.ttf", size)


def words(rng: Random, count: int) -> str:
    """Return invented words and numbers."""
    found = []
    for _ in range(count):
        word = "".join(SYLLABLES[i] for i in rng.integers(len(SYLLABLES), size=rng.integers(1, 5)))
        style = rng.random()
        word = str(rng.integers(10_000)) if style < 0.1 else word.upper() if style < 0.15 else word
        found.append(word.capitalize() if style > 0.8 else word + (",", ".", "")[int(rng.integers(3))])
    return " ".join(found)


def text(rng: Random, size: int) -> Image.Image:
    """Draw columns of paragraphs, each in its own font, some on a box of another colour."""
    ink, paper = ink_and_paper(rng)
    image = Image.new("RGB", (size, size), paper)
    draw, columns, top = ImageDraw.Draw(image), int(rng.integers(1, 4)), 8
    while top < size:
        face, bottom = font(rng), top
        for column in range(columns):
            left, width = 8 + column * size // columns, size // columns - 16
            own = ink_and_paper(rng) if rng.random() < 0.3 else (ink, paper)
            step = int(face.size * 1.3) + 1
            lines = int(rng.integers(1, 7))
            draw.rectangle((left - 4, top - 4, left + width, top + lines * step + 4), fill=own[1])
            for line in range(lines):
                written = words(rng, 40)
                while face.getlength(written) > width and " " in written:
                    written = written.rpartition(" ")[0]
                draw.text((left, top + line * step), written, font=face, fill=own[0])
            bottom = max(bottom, top + lines * step)
        top = bottom + int(rng.integers(6, 30))
    return image


def interface(rng: Random, size: int) -> Image.Image:
    """Draw windows with bars, buttons, fields, lists and icons in flat colours."""
    image = Image.new("RGB", (size, size), colour(rng))
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        ink, paper = ink_and_paper(rng)
        accent, line = colour(rng), colour(rng)
        left, top = (int(value) for value in rng.integers(-40, size - 160, 2))
        width, height = (int(value) for value in rng.integers(160, size // 2, 2))
        draw.rounded_rectangle((left, top, left + width, top + height), int(rng.integers(0, 13)), paper, line)
        draw.rectangle((left, top + 4, left + width, top + 28), accent)
        face = font(rng, 9, 18)
        draw.text((left + 10, top + 8), words(rng, 2), font=face, fill=ink)
        for row in range(top + 40, top + height - 24, int(rng.integers(22, 44))):
            kind = rng.random()
            if kind < 0.3:
                draw.rounded_rectangle((left + 10, row, left + 100, row + 18), 4, accent, line)
                draw.text((left + 16, row + 2), words(rng, 1), font=face, fill=paper)
            elif kind < 0.5:
                draw.ellipse((left + 10, row, left + 24, row + 14), accent, line)
                draw.line((left + 30, row + 14, left + width - 12, row + 14), line)
            elif kind < 0.6:
                draw.rectangle((left + 12, row, left + 24, row + 12), outline=ink)
                draw.line((left + 14, row + 6, left + 17, row + 10, left + 23, row + 2), ink, 2)
            draw.text((left + 110, row), words(rng, 3), font=face, fill=ink)
    return image


def line_art(rng: Random, size: int) -> Image.Image:
    """Draw curves, hatches and outlines of several widths, antialiased."""
    factor = 3
    ink, paper = ink_and_paper(rng)
    image = Image.new("RGB", (size * factor, size * factor), paper)
    draw = ImageDraw.Draw(image)
    for _ in range(90):
        stroke = ink if rng.random() < 0.7 else colour(rng)
        width = int(rng.integers(2, 5 * factor))
        x, y, radius = *rng.uniform(0, size, 2).tolist(), float(rng.uniform(4, size / 4))
        box = [(value * factor) for value in (x - radius, y - radius, x + radius, y + radius)]
        kind = rng.integers(5)
        if kind == 0:
            draw.ellipse(box, colour(rng) if rng.random() < 0.4 else None, stroke, width)
        elif kind == 1:
            draw.arc(box, *sorted(rng.uniform(0, 360, 2).tolist()), stroke, width)
        elif kind == 2:
            steps = np.linspace(0, 1, 60)[:, None]
            ends = np.array([x, y]) + rng.uniform(-radius, radius, (4, 2))
            weights = np.hstack([(1 - steps) ** 3, 3 * steps * (1 - steps) ** 2, 3 * steps**2 * (1 - steps), steps**3])
            draw.line([tuple(point) for point in (weights @ ends * factor).tolist()], stroke, width, "curve")
        elif kind == 3:
            angle, gap = rng.uniform(0, math.pi), rng.uniform(3, 12)
            along, across = np.array([math.cos(angle), math.sin(angle)]), np.array([-math.sin(angle), math.cos(angle)])
            for offset in np.arange(-radius / 2, radius / 2, gap):
                middle = np.array([x, y]) + offset * across
                first, last = ((middle + side * radius / 2 * along) * factor for side in (-1, 1))
                draw.line([tuple(first.tolist()), tuple(last.tolist())], stroke, max(2, width // 3))
        else:
            corners = int(rng.integers(3, 8))
            draw.regular_polygon(
                (x * factor, y * factor, radius * factor), corners, rng.uniform(0, 360), None, stroke, width
            )
    return image.resize((size, size), Image.Resampling.BOX)


def gradients(rng: Random, size: int) -> Image.Image:
    """Draw linear and radial gradients, behind flat shapes with sharp edges."""
    rows, columns = np.mgrid[0 : 1 : size * 1j, 0 : 1 : size * 1j]
    canvas = np.zeros((size, size, 3))
    for _ in range(7):
        first, second = (np.array(colour(rng), dtype=float) for _ in range(2))
        angle, (x, y), reach = rng.uniform(0, 2 * math.pi), rng.random(2), rng.uniform(0.2, 0.7)
        if rng.random() < 0.5:
            share = (math.cos(angle) * (columns - x) + math.sin(angle) * (rows - y)) / reach + 0.5
        else:
            share = np.hypot(columns - x, rows - y) / reach
        filled = first + (second - first) * share.clip(0, 1)[..., None]
        where = (
            np.hypot(columns - y, rows - x) < reach if rng.random() < 0.5 else np.abs(columns - x) + rows < reach + y
        )
        canvas = np.where(where[..., None] | (canvas.sum() == 0), filled, canvas)
    image = Image.fromarray((canvas + 0.5).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        left, top = rng.integers(0, size, 2).tolist()
        draw.rectangle((left, top, left + int(rng.integers(8, 160)), top + int(rng.integers(8, 160))), colour(rng))
    return image


KINDS: tuple[Callable[[Random, int], Image.Image], ...] = (text, interface, line_art, gradients)


def main() -> None:
    """Draw the pictures that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=24, help="pictures, in turn of each kind")
    parser.add_argument("--size", type=int, default=768, help="side in pixels, at least 400")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.size < 400 or options.count < 1:
        parser.error("--size must be at least 400, --count at least 1")
    options.folder.mkdir(parents=True, exist_ok=True)
    for number in range(options.count):
        kind = KINDS[number % len(KINDS)]
        image = kind(np.random.default_rng([options.seed, number]), options.size)
        image.save(options.folder / f"{kind.__name__}_{number:03}.png", optimize=True)


if __name__ == "__main__":
    main()
