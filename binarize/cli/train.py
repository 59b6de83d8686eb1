"""`binarize train`: run a recipe."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from binarize.cli.options import ForceOption, OverridesArgument
from binarize.cli.streams import echo
from binarize.cli.trust import TrustOption, code_of
from binarize.errors import BinarizeError


def train(
    recipe: Annotated[str, typer.Argument(help="Name of an installed recipe, or a YAML file.")],
    overrides: OverridesArgument = None,
    resume: Annotated[
        str | None, typer.Option(metavar="latest|FOLDER", help="Continue from the newest checkpoint, or from this one.")
    ] = None,
    trust: TrustOption = False,
    force: ForceOption = False,
) -> None:
    """Train the network that a recipe describes.

    Ctrl-C saves a checkpoint and stops; `--resume latest` continues exactly there.

    ```
    binarize train demo train_data_dir=photos
    binarize train bidiffsr_x2 train_data_dir=DF2K/HR output_dir=runs/first train_batch_size=8
    binarize train generation/digits train_data_dir=digits
    binarize train mine.yaml model.base_channels=32 method.groups=10 seed=1
    binarize train bidiffsr_x2 train_data_dir=DF2K/HR --resume latest
    accelerate launch --num_processes 4 -m binarize train bidiffsr_x2 train_data_dir=DF2K/HR train_batch_size=4
    ```
    """
    from binarize.recipes import load_recipe
    from binarize.recipes.load import check_folders
    from binarize.training.checkpoint import Checkpoints
    from binarize.training.errors import TrainingInterrupted
    from binarize.training.folder import find_start

    changes = list(overrides or ())
    if resume is not None:
        if any(change.partition("=")[0].strip() == "resume_from_checkpoint" for change in changes):
            raise BinarizeError("--resume and resume_from_checkpoint=... mean the same; give one of them.")
        changes.append(f"resume_from_checkpoint={resume}")
    try:
        with code_of(recipe, trust):
            loaded = load_recipe(recipe, changes)
            check_folders(loaded, recipe)
            find_start(loaded, Checkpoints(loaded.output_dir, loaded.checkpoints_total_limit), force)

            from binarize.training.loop import train as run

            result = run(loaded, force=force)
    except TrainingInterrupted as stop:
        echo(str(stop), err=True)
        raise typer.Exit(stop.exit_code) from None
    if os.environ.get("RANK", "0") != "0":
        return  # of several processes, only the first reports
    if result.history:
        echo(f"trained to step {result.steps} in {result.seconds:.0f} s, loss {result.history[-1].loss:.4f}")
    else:
        echo(f"step {result.steps} was already reached; raise max_train_steps to continue")
    echo(f"model: {result.model_dir}")
    command = "generate OUT" if loaded.task == "generation" else "upscale IN -o OUT"
    echo(f"next:  binarize {command} --model {result.model_dir}")
