"""Kill training runs with SIGKILL at chosen moments, resume them, and compare their results.

Runs are forked from this process, which has imported everything, so a run takes a second and not ten. Four things are
checked in float64: a killed run ends bit for bit as an uninterrupted one, on one process and on two; two processes give
the result of one; and a run of one resumes on the other.

    python tests/kill_runs.py IMAGES WORK [super_resolution|generation]
"""

import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from generation_case import CONDITIONAL, TINY_NETWORK
from training_case import RESUME, assert_close, differences

from binarize import files
from binarize.recipes import load_recipe
from binarize.training import Checkpoints, generation, load_checkpoint, objective, super_resolution, train

OPTIONS = (
    "max_train_steps=10", "learning_rate=1e-3", "lr_warmup_steps=2", "ema_decay=0.9", "checkpointing_steps=2",
    "checkpoints_total_limit=2", "validation_steps=4", "num_validation_images=1", "num_inference_steps=1", RESUME,
)  # fmt: skip
TASKS = {
    "super_resolution": ("small_x2", (
        "model.base_channels=8", "model.channel_mults=[1]", "model.res_blocks=1", "model.norm_groups=4",
        "model.dropout=0", "resolution=16",
    )),
    "generation": ("generation/digits", (
        *TINY_NETWORK, CONDITIONAL, "two_stage=0.5", "random_flip=true", "model.dropout=0",
    )),
}  # fmt: skip
END = "checkpoint-10"
# The event of a moment is counted in the killed process, which resumes from the checkpoint that the kill before left.
MOMENTS = (
    ("step", 3),  # in the forward pass of step 3, after checkpoint-2
    ("validation", 1),  # at step 4, after the model was saved
    ("half a state", 1),  # in checkpoint-4
    ("renamed model", 1),  # after the second model was exchanged for the first
    ("renamed checkpoint-4", 1),
    ("flushed", 2),  # between the files of checkpoint-6
    ("removed checkpoint-2", 1),  # checkpoint-2 was renamed and is not yet deleted
)


def kill_at(event: str, number: int) -> None:
    """Make this process kill itself at the n-th event."""
    seen = itertools.count(1)

    def happened(name: str) -> None:
        if name == event and next(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def after(owner: Any, name: str, describe: Callable[..., str]) -> None:
        real = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            result = real(*arguments, **options)
            happened(describe(*arguments))
            return result

        setattr(owner, name, call)

    def renamed(source: Path, target: Path) -> str:
        return f"removed {source.name}" if target.name.startswith(".") else f"renamed {target.name}"

    def half_saved(state: Any, target: Any) -> None:
        save(state, target)
        if event == "half a state":
            target.flush()
            os.truncate(target.file.name, os.path.getsize(target.file.name) // 2)
            happened("half a state")
            target.file.seek(0)
            save(state, target)

    save = torch.save
    torch.save = half_saved  # type: ignore[assignment]
    for owner, name, describe in (
        (os, "fsync", lambda *_: "flushed"),
        (os, "rename", renamed),
        (files, "_exchange", renamed),
        (Path, "rename", renamed),
        (objective, "sample_losses", lambda *_: "step"),
        (super_resolution, "psnr", lambda *_: "validation"),
        (generation, "image_grid", lambda *_: "validation"),
    ):
        after(owner, name, describe)


def run(
    task: str, images: Path, folder: Path, processes: int, rank: int, port: int, moment: tuple[str, int] | None
) -> None:
    """Train in this process, one of several; the first one is killed."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if moment is not None and rank == 0:
        kill_at(*moment)
    recipe, options = TASKS[task]
    data = [f"train_data_dir={images}", f"output_dir={folder}", f"train_batch_size={4 // processes}"]
    data += [f"validation_data_dir={images}"] if task == "super_resolution" else []
    train(load_recipe(recipe, [*OPTIONS, *options, *data]), progress=False)


def launch(task: str, images: Path, folder: Path, processes: int, moment: tuple[str, int] | None = None) -> None:
    """Run to the end, or until a kill at a moment; the other processes are then killed too."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ranks = range(processes)
    children = [fork.Process(target=run, args=(task, images, folder, processes, rank, port, moment)) for rank in ranks]
    for child in children:
        child.start()
    waiting = {child.sentinel: child for child in children}
    while waiting:
        for sentinel in multiprocessing.connection.wait(list(waiting)):
            child = waiting.pop(sentinel)
            child.join()
            if child.exitcode:
                for other in waiting.values():
                    other.kill()
    killed = any(child.exitcode == -signal.SIGKILL for child in children)
    if killed != (moment is not None) or (not killed and any(child.exitcode for child in children)):
        raise SystemExit(f"{folder.name}: the run ended with {[child.exitcode for child in children]}, moment {moment}")


def check_killed(task: str, images: Path, work: Path, processes: int, moments: tuple[tuple[str, int], ...]) -> None:
    """Kill one run at all moments, one after another, and compare its end with that of the uninterrupted run."""
    whole, folder = work / f"whole-{processes}", work / f"killed-{processes}"
    for moment in moments:
        launch(task, images, folder, processes, moment)
        for path in Checkpoints(folder, None).list().values():
            load_checkpoint(path)  # every checkpoint under its name is complete
    launch(task, images, folder, processes)
    wrong = differences(load_checkpoint(whole / END)[0], load_checkpoint(folder / END)[0])
    wrong += [str(path) for path in folder.rglob(".*")]
    for name in ("model", "best"):
        files = [path.relative_to(whole) for path in (whole / name).rglob("*.safetensors")]
        wrong += [str(file) for file in files if (whole / file).read_bytes() != (folder / file).read_bytes()]
    if wrong:
        raise SystemExit(f"the killed run on {processes} processes ends differently: {', '.join(wrong[:5])}")
    print(f"a run on {processes} processes, killed {len(moments)} times, ends as an uninterrupted one")


def main(images: Path, work: Path, task: str = "super_resolution") -> None:
    """Run all checks; exit with status 1 if one fails."""
    for processes in (1, 2):
        launch(task, images, work / f"whole-{processes}", processes)
    assert_close(work / "whole-1" / END, work / "whole-2" / END)
    thorough = task == "super_resolution"  # the other task shares the code of most moments
    check_killed(task, images, work, 1, MOMENTS if thorough else MOMENTS[1::3])
    if thorough:
        check_killed(task, images, work, 2, MOMENTS[::2])
    for first, second in ((1, 2), (2, 1)) if thorough else ((1, 2),):
        folder = work / f"{first} to {second}"
        launch(task, images, folder, first, ("step", 7))
        launch(task, images, folder, second)
        assert_close(work / "whole-1" / END, folder / END)
    print("one process and two give the same result and resume as each other")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
