"""`binarize import-official`: turn a released checkpoint into a pipeline's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from binarize.cli.options import ForceOption
from binarize.cli.streams import echo
from binarize.cli.targets import check_model_folder
from binarize.errors import BinarizeError, clip


def import_official(
    checkpoint: Annotated[Path, typer.Argument(metavar="FILE", help="A released .pth file.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The new folder.")],
    scale: Annotated[int, typer.Option(min=1, max=64, help="Scale of the network; the released ones have 2 or 4.")],
    config: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Differences from the released configuration.")
    ] = None,
    sign_zero: Annotated[
        Literal["zero", "plus"],
        typer.Option(help="Sign of 0: zero as in the released code, or plus, which fits a bit."),
    ] = "zero",
    force: ForceOption = False,
) -> None:
    """Import a checkpoint of BI-DiffSR's authors.

    OUT becomes a folder that every other command accepts as a model.

    ```
    binarize import-official BI-DiffSR_x2.pth bidiffsr-x2 --scale 2
    binarize import-official small.pth small --scale 4 inner_channel=32 channel_mults=[1,2,4] fp_res=[256]
    ```
    """
    from binarize.models.official_config import check_names

    check_model_folder(target, checkpoint, force=force)
    options = dict(_option(text) for text in config or ())
    check_names(options)
    if not checkpoint.is_file():
        raise BinarizeError(f"{checkpoint}: is not a file; give a released .pth file.")

    from binarize.files import replace_folder
    from binarize.models import SuperResolutionPipeline, load_official

    pipeline = SuperResolutionPipeline(load_official(checkpoint, sign_zero=sign_zero, **options), scale=scale)
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_folder(target, pipeline.save_pretrained)
    echo(f"wrote {target}")
    echo(f"next: binarize upscale IN -o OUT --model {target}")


def _option(text: str) -> tuple[str, Any]:
    from binarize.recipes.yaml_text import parse_yaml

    key, equals, value = text.partition("=")
    if not equals:
        raise BinarizeError(f"{clip(text, 80)!r} is not KEY=VALUE; write, for example, inner_channel=32.")
    return key, parse_yaml(value, clip(text, 80))
