"""`binarize import-official`: a released checkpoint becomes a pipeline's folder."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from binarize.cli.options import ForceOption
from binarize.errors import BinarizeError


class SignZero(str, Enum):
    """What sign(0) is: 0 as in the released code, or +1, which fits one bit."""

    zero = "zero"
    plus = "plus"


def import_official(
    checkpoint: Annotated[Path, typer.Argument(metavar="FILE", help="A released .pth file.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The new folder.")],
    scale: Annotated[int, typer.Option(min=1, help="How many times the network enlarges: the released ones 2 or 4.")],
    config: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="What differs from the released configuration, in its names."),
    ] = None,
    sign_zero: Annotated[SignZero, typer.Option(help="What the sign of exactly 0 is.")] = SignZero.zero,
    force: ForceOption = False,
) -> None:
    """Import a checkpoint of BI-DiffSR's authors.

    OUT becomes a folder that every other command takes as a model.

    ```
    binarize import-official BI-DiffSR_x2.pth bidiffsr-x2 --scale 2
    binarize import-official small.pth small --scale 4 inner_channel=32 channel_mults=[1,2,4] fp_res=[256]
    ```
    """
    from binarize.models import SuperResolutionPipeline, load_official
    from binarize.training.checkpoint import replace_folder

    check_folder(target, force=force)
    unet = load_official(checkpoint, sign_zero=sign_zero.value, **_options(config or ()))
    pipeline = SuperResolutionPipeline(unet, scale=scale)
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_folder(target, pipeline.save_pretrained)
    typer.echo(f"wrote {target}")
    typer.echo(f"next: binarize upscale IN OUT --model {target}")


def check_folder(folder: Path, *, force: bool) -> None:
    """Refuse to write a pipeline over something else.

    Raises:
        BinarizeError: If ``folder`` is a file, holds something and ``force`` is not given, or holds something that is
            no pipeline.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / "model_index.json").is_file():
        raise BinarizeError(f"{folder}: already exists and is no pipeline's folder; give another name.")
    if not force:
        raise BinarizeError(f"{folder}: already holds a pipeline; give another name, or --force to overwrite it.")


def _options(texts: list[str] | tuple[str, ...]) -> dict[str, Any]:
    import yaml

    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise BinarizeError(f"{text!r} is not KEY=VALUE; write, for example, inner_channel=32.")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise BinarizeError(f"{text!r}: {value!r} is no value; write a number or a list, as [1,2,4].") from None
    return options
