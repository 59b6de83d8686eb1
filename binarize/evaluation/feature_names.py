"""The names of features of images; naming them needs no PyTorch."""

from pathlib import Path

from binarize.errors import BinarizeError

PIXELS, INCEPTION = "pixels", "inception"
INCEPTION_NAME = "Inception v3"


def feature_name(source: str) -> str:
    """Return the name of features for tables, or raise an error if ``source`` is not one of `Features`."""
    if source in (PIXELS, INCEPTION):
        return {PIXELS: "pixels", INCEPTION: INCEPTION_NAME}[source]
    if is_function(source):
        return source
    if Path(source).suffix in (".pth", ".pt"):
        return "SqueezeNet"
    allowed = "pixels, inception, a squeezenet1_1 .pth file, or module:function"
    raise BinarizeError(f"features: {source!r} is unknown; allowed: {allowed}.")


def is_function(source: str) -> bool:
    """Whether features are given as ``"module:function"``."""
    return ":" in source and not Path(source).is_file()
