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
    sides = None if size is None else _sides(size)
    with code_of(model, trust, inspecting=True):
        network = _network(model, revision)

    import binarize

    found = binarize.summary(network, None if sides is None else _inputs(network, *sides))
    if style == "json":
        echo(found.to_json())
    else:
        echo((found.to_markdown if style == "markdown" else found.to_text)(layers=layers))


def _network(model: str, revision: str | None) -> nn.Module:
    """Return the network of a recipe or a model. A recipe's name wins; a folder of that name needs a ``./``."""
    from binarize.models.location import at_revision, generates, generator_of, network_of
    from binarize.recipes import load_recipe, recipe_path
    from binarize.recipes.load import YAML_SUFFIXES, installed_recipes

    path, recipes = at_revision(Path(model), revision), installed_recipes()
    if model in recipes or path.suffix in YAML_SUFFIXES:
        recipe = load_recipe(model)

        import torch

        from binarize.recipes import build

        with torch.device("meta"):  # no count depends on the weights' values
            return build(recipe)
    folders = {name.partition("/")[0] for name in recipes if "/" in name}
    if not path.exists() and ("/" not in model or model.partition("/")[0] in folders):
        recipe_path(model)  # its error names the recipes and the nearest one
    draws = generates(path)
    generator_of(path) if draws else network_of(path)

    from binarize.models.loading import load_generator, load_network

    return load_generator(path).unet if draws else load_network(path)


def _sides(size: str) -> tuple[int, int]:
    """Return height and width of ``--size``."""
    match = re.fullmatch(r"([1-9]\d{0,9})[x×]([1-9]\d{0,9})", size)
    if match is None or max(map(int, match.groups())) > _LONGEST:
        what = f"must be height and width in pixels, from 1 to {_LONGEST}, such as 256x256."
        raise BinarizeError(f"--size {size:.40}: {what}")
    height, width = map(int, match.groups())
    return height, width


def _inputs(network: Any, height: int, width: int) -> Any:
    """Return meta tensors of a height and width for `binarize.summary`."""
    import torch

    size = f"{height}x{width}"
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
