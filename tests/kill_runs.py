"""Kills training runs with SIGKILL at random moments, resumes them, and compares what they end with.

A run is killed in two ways: by the clock, or by itself inside the writing of a checkpoint or a model (half a state
file, or any fsync or rename). It runs in forked children of this process, which has imported everything, so that a
run takes a second and not ten.

    python tests/kill_runs.py PICTURES WORK --runs 20 --processes 2
"""

from __future__ import annotations

import argparse
import io
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from binarize.recipes import load_recipe
from binarize.training import Checkpoints, checkpoint, load_checkpoint, train

OPTIONS = (
    "model.base_channels=8",
    "model.channel_mults=[1, 2]",
    "model.norm_groups=4",
    "model.dropout=0.1",
    "resolution=16",
    "max_train_steps=12",
    "learning_rate=1e-3",
    "lr_warmup_steps=2",
    "ema_decay=0.9",
    "checkpointing_steps=2",
    "checkpoints_total_limit=2",
    "validation_steps=4",
    "num_inference_steps=1",
    "resume_from_checkpoint=latest",
)


class Killer:
    """Counts the steps of writing, and kills its process at one of them.

    Args:
        at: Which one; 0 never kills.
    """

    def __init__(self, at: int) -> None:
        self.at, self.seen = at, 0
        self._save = torch.save
        for name in ("fsync", "rename"):
            setattr(os, name, self._counted(getattr(os, name)))
        torch.save = self._half_saved  # type: ignore[assignment]

    def _due(self) -> bool:
        self.seen += 1
        return self.seen == self.at

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if self._due():
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        return call

    def _half_saved(self, state: Any, path: Path) -> None:
        if self._due():
            buffer = io.BytesIO()
            self._save(state, buffer)
            path.write_bytes(buffer.getvalue()[: buffer.tell() // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        self._save(state, path)


def run(pictures: Path, folder: Path, processes: int, rank: int, port: int, at: int, report: int) -> None:
    """Train in this process, one of several, and write how many steps of writing there were into ``report``."""
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if processes > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(processes),
            LOCAL_WORLD_SIZE=str(processes),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    killer = Killer(at if rank == 0 else 0)
    data = (f"train_data_dir={pictures}", f"validation_data_dir={pictures}", f"output_dir={folder}")
    recipe = load_recipe("small_x2", [*OPTIONS, *data, f"train_batch_size={4 // processes}"])
    train(recipe, progress=False)
    if rank == 0:
        os.write(report, str(killer.seen).encode())


def launch(pictures: Path, folder: Path, processes: int, *, after: float | None = None, at: int = 0) -> int | None:
    """Run to the end, or be killed ``after`` seconds or ``at`` a step of writing; return the steps of writing.

    Returns:
        The steps of writing of a run that came to its end, or None for one that was killed.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    reading, writing = os.pipe()
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            try:
                run(pictures, folder, processes, rank, port, at, writing)
                os._exit(0)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
        children.append(child)
    os.close(writing)
    deadline = None if after is None else time.monotonic() + after
    killed, failed, left = False, False, set(children)
    while left:
        for child in list(left):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                left.discard(child)
                failed |= os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0
                killed |= os.WIFSIGNALED(status)
        if killed or failed or (deadline is not None and time.monotonic() > deadline):
            for child in left:
                os.kill(child, signal.SIGKILL)
            deadline = None
        time.sleep(0.002)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    if failed and not killed:
        raise SystemExit("a run failed by itself")
    return int(text) if text and not killed else None


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Return where two nested states differ, by the last bit."""
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [where]
    if isinstance(one, dict):
        if not isinstance(other, dict) or one.keys() != other.keys():
            return [where]
        return [line for key in one for line in differences(one[key], other[key], f"{where}.{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [where]
        return [
            line for i, pair in enumerate(zip(one, other, strict=True)) for line in differences(*pair, f"{where}.{i}")
        ]
    return [] if one == other else [where]


def main() -> None:
    """Kill and compare as the command line says; leave with status 1 if a run ends otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pictures, work, processes = arguments.pictures, arguments.work, arguments.processes
    draw = random.Random(arguments.seed)

    began = time.monotonic()
    steps = launch(pictures, work / "whole", processes)
    duration = time.monotonic() - began
    assert steps
    expected = load_checkpoint(work / "whole" / "checkpoint-12")[0]
    kills = {"by the clock": 0, "while writing": 0}
    for number in range(arguments.runs):
        folder = work / f"killed-{number}"
        for _ in range(draw.randint(1, 3)):
            if draw.random() < 0.5:
                ended = launch(pictures, folder, processes, after=draw.uniform(0, duration))
                kills["by the clock"] += ended is None
            else:
                ended = launch(pictures, folder, processes, at=draw.randint(1, steps))
                kills["while writing"] += ended is None
            kept = list(Checkpoints(folder, None).list().values())
            for path in kept:
                load_checkpoint(path)  # whatever has its name is whole
        launch(pictures, folder, processes)
        found = load_checkpoint(folder / "checkpoint-12")[0]
        wrong = differences(expected, found)
        if wrong:
            raise SystemExit(f"run {number} ends otherwise: {', '.join(wrong[:5])}")
        left = [path.name for path in folder.rglob(".*")]
        if left:
            raise SystemExit(f"run {number} leaves {left}")
        for name in ("model", "best"):
            for path in (work / "whole" / name).rglob("*.safetensors"):
                if path.read_bytes() != (folder / path.relative_to(work / "whole")).read_bytes():
                    raise SystemExit(f"run {number}: {path.name} of {name} differs")
    seconds = time.monotonic() - began
    told = ", ".join(f"{count} {how}" for how, count in kills.items())
    print(f"{arguments.runs} runs on {processes} processes, killed {told}: all identical; {seconds:.0f} s")


if __name__ == "__main__":
    assert checkpoint.torch is torch  # what Killer replaces is what checkpoints are written with
    sys.exit(main())
