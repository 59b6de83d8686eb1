"""The folder of the demonstration."""

from pathlib import Path

from binarize.errors import BinarizeError

REPORT = "report.md"


def check_folder(output: Path, *, force: bool) -> None:
    """Check that a folder holds no demonstration, unless `force` may replace it."""
    if (output / REPORT).exists() and not force:
        raise BinarizeError(f"{output}: holds a demonstration; choose another folder, or --force to replace it.")
