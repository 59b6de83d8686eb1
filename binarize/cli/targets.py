"""Checks of the places that commands write to, before any work is done."""

from __future__ import annotations

from pathlib import Path

from binarize.errors import BinarizeError

_MODEL_FILES = {
    "README.md", "config.json", "diffusion_pytorch_model.safetensors", "model.safetensors", "model_index.json",
    "scheduler", "unet",
}  # fmt: skip


def check_model_folder(target: Path, source: Path, *, force: bool) -> None:
    """Check that `target` is new or an empty folder, or a model that `force` may replace, other than `source`."""
    if target.exists() and source.exists():
        new, old = target.resolve(), source.resolve()
        if old.is_relative_to(new) or new.is_relative_to(old):
            raise BinarizeError(f"{target}: holds the source {source}, which would be lost; give another name.")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not any((target / name).is_file() for name in ("model_index.json", "config.json")):
        raise BinarizeError(f"{target}: already exists and is not a model's folder; give another name.")
    if not force:
        raise BinarizeError(f"{target}: already holds a model; give another name, or --force to overwrite it.")
    foreign = sorted(path.name for path in target.iterdir() if path.name not in _MODEL_FILES)
    if foreign:
        raise BinarizeError(f"{target}: holds other files than a model's, such as {foreign[0]}; give another name.")


def check_evaluation_folder(folder: Path, *, force: bool) -> None:
    """Check that `folder` is not a file, and holds no evaluation unless `force` may replace it."""
    if folder.exists() and not folder.is_dir():
        raise BinarizeError(f"{folder}: is a file; --output takes a folder.")
    existing = [path for suffix in ("json", "csv", "md") if (path := folder / f"evaluation.{suffix}").exists()]
    if existing and not force:
        raise BinarizeError(f"{existing[0]}: already exists; give another folder, or --force to overwrite it.")
