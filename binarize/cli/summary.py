"""`binarize summary`: what a network costs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from binarize.cli.options import RevisionOption
from binarize.cli.streams import echo
from binarize.cli.trust import TrustOption, code_of
from binarize.errors import BinarizeError

if TYPE_CHECKING:
    from torch import nn

_LONGEST = 65536  # far more than the side of any image that is upscaled at once

_SIZE = "Size of the image to count for; by default 256x256 for super-resolution, else that of the model."


def summary(
    model: Annotated[str, typer.Argument(metavar="RECIPE|MODEL", help="Name or file of a recipe, or a model.")],
    size: Annotated[str | None, typer.Option(metavar="HxW", show_default=False, help=_SIZE)] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Add a line per layer; JSON always has them.")] = False,
    style: Annotated[Literal["text", "markdown", "json"], typer.Option("--format", help="Output format.")] = "text",
    revision: RevisionOption = None,
    trust: TrustOption = False,
) -> None:
    """Count parameters, operations and bytes.

    As in the papers: a binary weight is 1/32 of a parameter, a binary multiplication 1/64 of an operation.

    ```
    binarize summary bidiffsr_x2
    binarize summary runs/bidiffsr_x2/model --size 512x512 --format markdown
    ```
    """
    import binarize

    with code_of(model, trust, inspecting=True):
        network = _network(model, revision)
    found = binarize.summary(network, _inputs(network, size))
    if style == "json":
        echo(found.to_json())
    else:
        echo((found.to_markdown if style == "markdown" else found.to_text)(layers=layers))


def _network(model: str, revision: str | None) -> nn.Module:
    """Return the network of a recipe or a model. A recipe's name wins; a folder of that name needs a ``./``."""
    import torch

    from binarize.models.loading import at_revision, generates, load_generator, load_network
    from binarize.recipes import build, list_recipes, recipe_path

    path, recipes = at_revision(Path(model), revision), list_recipes()
    if model in recipes or path.suffix in (".yaml", ".yml"):
        with torch.device("meta"):  # no count depends on the weights' values
            return build(model)
    folders = {name.partition("/")[0] for name in recipes if "/" in name}
    if not path.exists() and ("/" not in model or model.partition("/")[0] in folders):
        recipe_path(model)  # its error names the recipes and the nearest one
    return load_generator(path).unet if generates(path) else load_network(path)


def _inputs(network: Any, size: str | None) -> Any:
    """Return meta tensors for `binarize.summary`, or None for its defaults."""
    import torch

    if size is None:
        return None
    match = re.fullmatch(r"([1-9]\d{0,9})[x×]([1-9]\d{0,9})", size)
    if match is None or max(map(int, match.groups())) > _LONGEST:
        what = f"must be height and width in pixels, from 1 to {_LONGEST}, such as 256x256."
        raise BinarizeError(f"--size {size:.40}: {what}")
    height, width = map(int, match.groups())
    if type(network).__name__ != "SRUNet":
        from binarize.conversion.summary import default_inputs

        inputs = default_inputs(network)
        if not isinstance(inputs, dict):
            raise BinarizeError(f"--size {size}: a {type(network).__name__} has one size; leave it out.")
        return {**inputs, "sample": torch.empty(1, inputs["sample"].shape[1], height, width, device="meta")}
    if height % (multiple := network.size_multiple) or width % multiple:
        raise BinarizeError(f"--size {size}: this network needs a multiple of {multiple} for both sides.")
    channels = network.config["out_channels"]
    sample = torch.empty(1, channels, height, width, device="meta")
    condition = torch.empty(1, network.config["in_channels"] - channels, height, width, device="meta")
    return sample, torch.zeros(1, dtype=torch.long, device="meta"), condition
