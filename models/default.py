"""The trained models that come with the package."""

from pathlib import Path

from binarize.errors import BinarizeError, did_you_mean

FOLDER = Path(__file__).parent / "pretrained"
"""Contains a folder per kind and scale, each a saved SuperResolutionPipeline, and ``emoji``, a GenerationPipeline."""
_INDEX = "model_index.json"
KINDS = {"photo": "photo_x", "clean": "x"}
"""The kinds of models and the names of their folders without the scale: for photographs with JPEG artefacts, noise and
blur, and for images that were reduced bicubically, as in papers. The default is the first that there is."""


def default_model(scale: int = 2, kind: str | None = None) -> Path:
    """Return the folder of the trained model that comes with the package for a scale, for ``from_pretrained``.

    `kind` is one of `KINDS`; by default ``photo``, or ``clean`` where there is no model for photographs.
    """
    for prefix in _prefixes(kind):
        folder = FOLDER / f"{prefix}{scale}"
        if (folder / _INDEX).is_file():
            return folder
    shipped = ", ".join(map(str, shipped_scales(kind)))
    allowed = f"scales with one: {shipped}" if shipped else "this installation has none at all"
    fix = "Name a model of your own, or train one with `binarize train`."
    what = "model" if kind is None else f"{kind} model"
    raise BinarizeError(f"no {what} for scale {scale} comes with binarize; {allowed}. {fix}")


def default_generator() -> Path:
    """Return the folder of the trained model that comes with the package for generating images."""
    folder = FOLDER / "emoji"
    if not (folder / _INDEX).is_file():
        raise BinarizeError("this installation has no model that generates images; train one, and name it by --model.")
    return folder


def shipped_scales(kind: str | None = None) -> list[int]:
    """Return the scales of the models of a kind, or of all kinds, that come with the package, ascending."""
    scales = {
        index.parent.name.removeprefix(prefix)
        for prefix in _prefixes(kind)
        for index in FOLDER.glob(f"{prefix}*/{_INDEX}")
    }
    return sorted(int(scale) for scale in scales if scale.isdecimal())


def _prefixes(kind: str | None) -> tuple[str, ...]:
    if kind is None:
        return tuple(KINDS.values())
    if kind not in KINDS:
        raise BinarizeError(f"unknown kind of model {kind!r}; kinds: {', '.join(KINDS)}.{did_you_mean(kind, KINDS)}")
    return (KINDS[kind],)
