"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

# The same as in binarize.models.loading, which imports torch and diffusers.
Device = Literal["auto", "cpu", "cuda", "mps"]
Dtype = Literal["float32", "bfloat16", "float16"]
Scheduler = Literal["ddim", "dpm++"]

TILE, UNTILED = 256, 512
"""The default tile, and the longest side of a result that is computed without tiles.

Attention takes time quadratic in the number of pixels: 256x256 tiles take a third of the time of a whole 1024x1024.
"""

MODEL = (
    "A trained model: a folder, a run's folder, a packed or released file, or user/repository[@revision] on the hub."
)
ModelArgument = Annotated[Path, typer.Argument(help=MODEL)]
_REVISION = "Branch, tag or commit of a model on the Hugging Face hub; the same as user/repository@REVISION."
RevisionOption = Annotated[str | None, typer.Option(show_default=False, help=_REVISION)]
MAX_SCALE, MAX_SEED, MAX_STEPS, MAX_SIDE = 64, 2**63 - 1, 100_000, 2**20
ScaleOption = Annotated[
    int | None,
    typer.Option(min=1, max=MAX_SCALE, help="Scale of models that do not store it: .pth files and bare networks."),
]
StepsOption = Annotated[
    int | None,
    typer.Option(min=1, max=MAX_STEPS, help="Denoising steps; by default the number stored with the model, or 50."),
]
_TILE_HELP = "Side of the network's tiles in output pixels, which bounds memory"
TileOption = Annotated[int | None, typer.Option(min=1, max=MAX_SIDE, help=f"{_TILE_HELP}; by default no tiles.")]
_AUTO_TILE = f"{_TILE_HELP}; 0: no tiles; by default {TILE} if a side of the result exceeds {UNTILED}."
AutoTileOption = Annotated[int | None, typer.Option(min=0, max=MAX_SIDE, help=_AUTO_TILE)]
OverlapOption = Annotated[
    int | None,
    typer.Option(min=0, max=MAX_SIDE, help="Output pixels that tiles share; by default 32, or a quarter of the tile."),
]
SeedOption = Annotated[
    int, typer.Option(min=0, max=MAX_SEED, help="Seed of the noise; each image starts from it anew.")
]
SchedulerOption = Annotated[Scheduler | None, typer.Option(help="The sampler; by default that of the model.")]
DeviceOption = Annotated[Device, typer.Option(help="Where to compute; auto uses a GPU if there is one.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Data type of the network's computations.")]
PackOption = Annotated[
    bool, typer.Option("--pack/--no-pack", help="On a CPU or CUDA, compute binary layers with bits, not with floats.")
]
ForceOption = Annotated[bool, typer.Option("--force", "-f", help="Overwrite existing results.")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the recipe to change; dots reach inside.")
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Use only the first N images.")]
OutputOption = Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the files that are written.")]
