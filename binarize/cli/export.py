"""`binarize export`: a binary network as an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from binarize.cli.options import MAX_STEPS, MODEL, ForceOption, RevisionOption, ScaleOption
from binarize.cli.streams import echo
from binarize.errors import BinarizeError

_STEPS = "Write a graph that makes whole images in so many denoising steps, at most 50; by default the network alone."


def export(
    source: Annotated[Path, typer.Argument(metavar="MODEL", help=MODEL)],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The new file, such as model.onnx.")],
    steps: Annotated[int | None, typer.Option(min=1, max=MAX_STEPS, show_default=False, help=_STEPS)] = None,
    revision: RevisionOption = None,
    scale: ScaleOption = None,
    force: ForceOption = False,
) -> None:
    """Write a binary model as an ONNX file, with 1 bit per binary weight.

    Any runtime for ONNX can run it without PyTorch. With `--steps`, its inputs are an image and noise, and its output
    is the enlarged image. For a model that generates images, the inputs are noise and, with classes, class labels.

    ```
    binarize export my-model network.onnx
    binarize export my-model upscale.onnx --steps 2
    ```
    """
    from binarize.files import check_new_file, followed
    from binarize.models.location import PIPELINE, at_revision, draws_images, locate, network_of, scale_of

    source = at_revision(source, revision)
    draws = draws_images(source, scale)
    alone = steps is None and scale is None and not (locate(source) / PIPELINE).is_file()
    if not draws:
        network_of(source) if alone else scale_of(source, scale)
    check_new_file(followed(target), force=force)

    import binarize
    from binarize.models.loading import load_generator, load_network, load_pipeline
    from binarize.onnx.protos import describe

    model: Any = (
        load_generator(source) if draws else load_network(source) if alone else load_pipeline(source, scale=scale)
    )
    try:
        binarize.export_onnx(model, target, steps=steps, force=force)
    except BinarizeError as error:
        raise BinarizeError(f"{source}: {error}") from error
    echo(f"wrote {target}, {target.stat().st_size / 1e6:.2f} MB")
    echo(describe(target))
