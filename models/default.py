"""The trained models that come with the package."""

from __future__ import annotations

from pathlib import Path

from binarize.errors import BinarizeError

FOLDER = Path(__file__).parent / "pretrained"
"""Holds a folder ``x2``, ``x4``, ... for each scale, each a saved SuperResolutionPipeline with a model card."""
_INDEX = "model_index.json"


def default_model(scale: int = 2) -> Path:
    """Return the folder of the trained model that comes with the package, for ``from_pretrained``.

    Args:
        scale: How many times it upscales.

    Raises:
        BinarizeError: If the package has no model of that scale; the message lists those that it has.
    """
    folder = FOLDER / f"x{scale}"
    if not (folder / _INDEX).is_file():
        shipped = ", ".join(str(known) for known in shipped_scales())
        allowed = f"scales with one: {shipped}" if shipped else "this installation has none at all"
        raise BinarizeError(
            f"no model that upscales {scale} times comes with binarize; {allowed}. Name a model of your own, or train "
            "one: `binarize train` makes it."
        )
    return folder


def shipped_scales() -> list[int]:
    """Return the scales of the models that come with the package, ascending."""
    names = (index.parent.name for index in FOLDER.glob(f"x*/{_INDEX}"))
    return sorted(int(name[1:]) for name in names if name[1:].isdecimal())
