"""`binarize pack`: store the bits of a binary network instead of its latent weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from binarize.cli.options import MODEL, Dtype, ForceOption, RevisionOption, ScaleOption
from binarize.cli.streams import echo
from binarize.cli.targets import check_model_folder
from binarize.errors import BinarizeError

# The same as in binarize.conversion.record, which imports torch.
FullPrecision = Literal["float", "int8"]
_FULL_PRECISION = "Weights of full-precision layers: as they are, or rounded to 8 bits."


def pack(
    source: Annotated[Path, typer.Argument(metavar="IN", help=MODEL)],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The new folder.")],
    dtype: Annotated[Dtype, typer.Option(help="Data type of the stored tensors that are not bits.")] = "float32",
    full_precision: Annotated[FullPrecision, typer.Option(help=_FULL_PRECISION)] = "float",
    revision: RevisionOption = None,
    scale: ScaleOption = None,
    force: ForceOption = False,
) -> None:
    """Store a binary network with 1 bit per binary weight.

    OUT becomes a pipeline's folder if IN stores its scale or `--scale` gives it, else a network's folder. Every other
    command accepts OUT, or the network's .safetensors file in it, as a model. It cannot be trained: keep IN.

    ```
    binarize pack runs/bidiffsr_x4 bidiffsr-x4
    binarize pack BI-DiffSR_x2.pth bidiffsr-x2 --scale 2 --dtype float16
    ```
    """
    from binarize.models.location import PIPELINE, at_revision, draws_images, locate, network_of, scale_of

    source = at_revision(source, revision)
    check_model_folder(target, locate(source), force=force)
    draws = draws_images(source, scale)
    alone = scale is None and not (locate(source) / PIPELINE).is_file()
    if not draws:
        network_of(source) if alone else scale_of(source, scale)

    import torch

    import binarize
    from binarize.conversion.record import conversion
    from binarize.files import replace_folder
    from binarize.models.loading import load_generator, load_network, load_pipeline
    from binarize.packed.files import WEIGHTS, stored_as

    pipeline: Any
    if draws:
        pipeline = load_generator(source)
        network, inside = pipeline.unet, "unet"
    elif alone:
        pipeline, network, inside = None, load_network(source), ""
    else:
        pipeline = load_pipeline(source, scale=scale)
        network, inside = pipeline.unet, "unet"
    done = binarize.is_packed(network) and conversion(network).full_precision in (full_precision, "int8")
    if not done:
        try:
            binarize.pack(network, full_precision=full_precision)
        except BinarizeError as error:
            raise BinarizeError(f"{source}: {error}") from error

    def write(folder: Path) -> None:
        if draws:
            for name, tensor in network.state_dict().items():
                stored_as(name, tensor, getattr(torch, dtype))
            torch.nn.Module.to(network, getattr(torch, dtype))  # diffusers' own warns of nothing
            pipeline.save_pretrained(folder)
            return
        if pipeline is not None:
            pipeline.save_pretrained(folder)
        binarize.save(network, folder / inside, dtype=getattr(torch, dtype))

    target.parent.mkdir(parents=True, exist_ok=True)
    replace_folder(target, write)
    size = (target / inside / WEIGHTS).stat().st_size
    echo(f"wrote {target}, the network in {size / 1e6:.2f} MB")
    if draws:
        echo(f"next: binarize generate OUT --model {target}")
        return
    echo(f"next: binarize upscale IN -o OUT --model {target}{' --scale N' if pipeline is None else ''}")
