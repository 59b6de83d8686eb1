"""Options that several commands share, and the objects that they describe."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from binarize.errors import BinarizeError

if TYPE_CHECKING:
    import torch


class Device(str, Enum):
    """Where to compute; `auto` takes a GPU where there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class Precision(str, Enum):
    """What the network computes in; sums over steps and tiles stay in float32."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Scheduler(str, Enum):
    """The sampler; unset, the one that was saved with the model."""

    ddim = "ddim"
    dpm = "dpm++"


TILE, UNTILED = 256, 512
"""The tile where none is asked for, and the longest side of a result that is given to the network at once.

Attention takes time by the square of the pixels, and tiles of 256 a third of the time that a whole 1024x1024 takes.
"""

MODEL = (
    "A trained model: a folder, a run's folder, a packed or a released file, or user/repository on the Hugging Face "
    "hub."
)
ModelArgument = Annotated[Path, typer.Argument(help=MODEL)]
ScaleOption = Annotated[
    int | None,
    typer.Option(min=1, help="How many times larger, for models that do not say it: .pth files and bare networks."),
]
StepsOption = Annotated[
    int | None, typer.Option(min=1, help="Denoising steps; by default the number that is saved with the model, or 50.")
]
TileOption = Annotated[
    int | None,
    typer.Option(min=1, help="Side, in output pixels, of the tiles that the network sees; bounds memory."),
]
AutoTileOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Side, in output pixels, of the tiles that the network sees, which bounds memory; 0: no tiles; by default "
        f"{TILE} where a side of the result is longer than {UNTILED}.",
    ),
]
OverlapOption = Annotated[
    int | None, typer.Option(min=0, help="Output pixels that tiles share; 32, or a quarter of the tile.")
]
SeedOption = Annotated[int, typer.Option(min=0, help="Decides the noise, anew for each picture.")]
SchedulerOption = Annotated[Scheduler | None, typer.Option(help="The sampler; by default that saved with the model.")]
DeviceOption = Annotated[Device, typer.Option(help="Where to compute.")]
PrecisionOption = Annotated[Precision, typer.Option("--dtype", help="What the network computes in.")]
PackOption = Annotated[
    bool,
    typer.Option(
        "--pack/--no-pack", help="On a CPU or CUDA, compute with the bits of a binary network, not with floats."
    ),
]
ForceOption = Annotated[bool, typer.Option("--force", "-f", help="Overwrite what is there.")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the recipe to change; dots reach inside.")
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Take only the first so many pictures.")]
OutputOption = Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the files that are written.")]


def torch_device(device: Device) -> torch.device:
    """Return the torch device that was asked for.

    Raises:
        BinarizeError: If this machine, or this build of PyTorch, does not have it.
    """
    import torch

    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device is Device.auto:
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if there[name]))
    if not there[device.value]:
        found = ", ".join(name for name, is_there in there.items() if is_there)
        raise BinarizeError(f"--device {device.value}: PyTorch finds no such device here; there is: {found}.")
    return torch.device(device.value)


def shows_progress() -> bool:
    """Whether a progress bar would be seen by a person."""
    return sys.stderr.isatty()
