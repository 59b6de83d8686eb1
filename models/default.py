"""The trained models that come with the package."""

from pathlib import Path

from binarize.errors import BinarizeError

FOLDER = Path(__file__).parent / "pretrained"
"""Contains a folder ``x2``, ``x4``, ... per scale, each a saved SuperResolutionPipeline with a model card."""
_INDEX = "model_index.json"


def default_model(scale: int = 2) -> Path:
    """Return the folder of the trained model that comes with the package for a scale, for ``from_pretrained``."""
    folder = FOLDER / f"x{scale}"
    if not (folder / _INDEX).is_file():
        shipped = ", ".join(map(str, shipped_scales()))
        allowed = f"scales with one: {shipped}" if shipped else "this installation has none at all"
        fix = "Name a model of your own, or train one with `binarize train`."
        raise BinarizeError(f"no model for scale {scale} comes with binarize; {allowed}. {fix}")
    return folder


def default_generator() -> Path:
    """Return the folder of the trained model that comes with the package for generating images."""
    folder = FOLDER / "emoji"
    if not (folder / _INDEX).is_file():
        raise BinarizeError("this installation has no model that generates images; train one, and name it by --model.")
    return folder


def shipped_scales() -> list[int]:
    """Return the scales of the models that come with the package, ascending."""
    names = (index.parent.name for index in FOLDER.glob(f"x*/{_INDEX}"))
    return sorted(int(name[1:]) for name in names if name[1:].isdecimal())
