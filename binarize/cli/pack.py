"""`binarize pack`: a binary network's latent weights out, its bits in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from binarize.cli.options import ForceOption, Precision, ScaleOption
from binarize.errors import BinarizeError

_MODEL_FILES = {
    "README.md", "config.json", "diffusion_pytorch_model.safetensors", "model.safetensors", "model_index.json",
    "scheduler", "unet",
}  # fmt: skip


def pack(
    source: Annotated[
        Path,
        typer.Argument(metavar="IN", help="A trained model: a folder, a run's folder, or a released .pth file."),
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The new folder.")],
    dtype: Annotated[
        Precision, typer.Option("--dtype", help="What is stored of the tensors that are not bits.")
    ] = Precision.float32,
    scale: ScaleOption = None,
    force: ForceOption = False,
) -> None:
    """Store a binary network with 1 bit for a binary weight.

    OUT becomes a pipeline's folder if IN says how many times it enlarges, or `--scale` does, else a network's. Every
    other command takes it as a model, and the network's .safetensors file in it, too. It cannot be trained: keep IN.

    ```
    binarize pack runs/bidiffsr_x4 bidiffsr-x4
    binarize pack BI-DiffSR_x2.pth bidiffsr-x2 --scale 2 --dtype float16
    binarize upscale small.png large.png --model bidiffsr-x4
    ```
    """
    import torch

    import binarize
    from binarize.models.loading import has_scale, load_network, load_pipeline
    from binarize.packed.files import WEIGHTS
    from binarize.training.checkpoint import replace_folder

    _check_target(source, target, force=force)
    stored = getattr(torch, dtype.value)
    if scale is None and not has_scale(source):
        pipeline, network, inside = None, load_network(source), ""
    else:
        pipeline = load_pipeline(source, scale=scale)
        network, inside = pipeline.unet, "unet"
    if not binarize.is_packed(network):
        try:
            binarize.pack(network)
        except BinarizeError as error:
            raise BinarizeError(f"{source}: {error}") from error

    def write(folder: Path) -> None:
        if pipeline is not None:
            pipeline.save_pretrained(folder)
        binarize.save(network, folder / inside, dtype=stored)

    target.parent.mkdir(parents=True, exist_ok=True)
    replace_folder(target, write)
    size = (target / inside / WEIGHTS).stat().st_size
    typer.echo(f"wrote {target}, the network in {size / 1e6:.2f} MB")
    typer.echo(f"next: binarize upscale IN OUT --model {target}{' --scale N' if pipeline is None else ''}")


def _check_target(source: Path, target: Path, *, force: bool) -> None:
    from binarize.models.loading import NETWORK, PIPELINE

    if target.exists() and source.exists() and source.resolve().is_relative_to(target.resolve()):
        raise BinarizeError(f"{target}: holds what is to be packed, which would be lost; give another name.")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not any((target / name).is_file() for name in (PIPELINE, NETWORK)):
        raise BinarizeError(f"{target}: already exists and is no model's folder; give another name.")
    if not force:
        raise BinarizeError(f"{target}: already holds a model; give another name, or --force to overwrite it.")
    strange = sorted(path.name for path in target.iterdir() if path.name not in _MODEL_FILES)
    if strange:
        raise BinarizeError(
            f"{target}: holds more than a model, such as {strange[0]}, which --force would remove with it; give "
            "another name, or remove the rest yourself."
        )
