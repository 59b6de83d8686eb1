"""`binarize summary` and `binarize methods`: what a network costs, and what can binarize it."""

from __future__ import annotations

import dataclasses
import inspect
import re
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from binarize.errors import BinarizeError

if TYPE_CHECKING:
    import torch

    from binarize.methods import Method
    from binarize.models import SRUNet


class Format(str, Enum):
    """How a summary is printed."""

    text = "text"
    markdown = "markdown"
    json = "json"


def summary(
    model: Annotated[str, typer.Argument(metavar="RECIPE|MODEL", help="A recipe's name or file, or a model.")],
    size: Annotated[
        str, typer.Option(metavar="HxW", help="Size of the enlarged picture that operations are counted for.")
    ] = "256x256",
    layers: Annotated[bool, typer.Option("--layers", help="A line for each layer, too; JSON always has them.")] = False,
    style: Annotated[Format, typer.Option("--format", help="How to print it.")] = Format.text,
) -> None:
    """Count parameters, operations and bytes.

    As the papers do: a binary weight is 1/32 of a parameter, a binary multiplication 1/64 of an operation.

    ```
    binarize summary bidiffsr_x2
    binarize summary sr3_x2 --layers
    binarize summary runs/bidiffsr_x2/model --size 512x512 --format markdown
    ```
    """
    import binarize

    network = _network(model)
    found = binarize.summary(network, _inputs(network, size))
    if style is Format.json:
        typer.echo(found.to_json())
    elif style is Format.markdown:
        typer.echo(found.to_markdown(layers=layers))
    else:
        typer.echo(found.to_text(layers=layers))


def methods(
    name: Annotated[str | None, typer.Argument(help="A method, to see its options.")] = None,
) -> None:
    """List the binarization methods and their options.

    ```
    binarize methods
    binarize methods bidiffsr
    ```
    """
    from binarize.methods import get_method, list_methods

    if name is None:
        names = list_methods()
        width = max(map(len, names))
        for each in names:
            typer.echo(f"{each:<{width}}  {_first_line(get_method(each))}")
        return
    method = get_method(name)
    typer.echo(f"{name}: {_first_line(method)}\n")
    described = _described_fields(type(method))
    width = max(len(field.name) for field in dataclasses.fields(method))
    for field in dataclasses.fields(method):
        typer.echo(f"  {field.name:<{width}}  {getattr(method, field.name)!r:<14}  {described.get(field.name, '')}")


def _network(model: str) -> SRUNet:
    """Return the network of a recipe or of a model; a recipe's name wins, a folder of that name needs a ``./``."""
    import torch

    import binarize
    from binarize.models.loading import load_network
    from binarize.recipes import list_recipes

    if model in list_recipes() or Path(model).suffix in (".yaml", ".yml"):
        # Without memory for the weights, whose values no count depends on.
        with torch.device("meta"):
            return binarize.build(model)
    if not Path(model).exists():
        binarize.recipes.recipe_path(model)  # its error names the recipes and the nearest one
    return load_network(Path(model))


def _inputs(network: SRUNet, size: str) -> tuple[torch.Tensor, ...]:
    import torch

    match = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)", size)
    if match is None:
        raise BinarizeError(f"--size {size}: must be height and width in pixels, such as 256x256.")
    height, width = int(match[1]), int(match[2])
    multiple = network.size_multiple
    if height % multiple or width % multiple:
        raise BinarizeError(f"--size {size}: this network needs a multiple of {multiple} for both sides.")
    channels = network.config["out_channels"]
    sample = torch.empty(1, channels, height, width, device="meta")
    condition = torch.empty(1, network.config["in_channels"] - channels, height, width, device="meta")
    return sample, torch.zeros(1, dtype=torch.long, device="meta"), condition


def _first_line(method: Method) -> str:
    return (inspect.getdoc(type(method)) or "").partition("\n")[0]


def _described_fields(cls: type[Method]) -> dict[str, str]:
    """Return what the docstrings of a method and of its bases say of each option."""
    described: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        attributes = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2]
        for name, text in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", attributes, flags=re.MULTILINE):
            described[name] = " ".join(text.split())
    return described
