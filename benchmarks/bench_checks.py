"""What the checks of files and numbers cost: the share of the processor time of loading models and upscaling."""

from __future__ import annotations

import contextlib
import functools
import io
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import Job, released
from PIL import Image

import binarize
from binarize.cli import app
from binarize.models import default_model

ROUNDS = 7
CHECKS = (  # digests, and the search for values that are not finite in weights, schedules and predictions
    "binarize.packed.files._check_digest",
    "binarize.quantizer.check_folder",
    "binarize.serialization.check_sealed",
    "binarize.models.checks.check_weights",
    "binarize.models.loading.check_weights",
    "binarize.models.upscaler._largest",
    "binarize.models.checks.check_samples",
)


def share(job: Job) -> tuple[float, float, float]:
    """Return the processor seconds of the calling thread, those of its checks, and those of checks in other threads."""
    inside, meanwhile, caller = 0.0, 0.0, threading.get_ident()

    def timed(check: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(check)
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside, meanwhile
            start = time.thread_time()
            try:
                return check(*args, **kwargs)
            finally:
                taken = time.thread_time() - start
                if threading.get_ident() == caller:
                    inside += taken
                else:
                    meanwhile += taken

        return run

    with contextlib.ExitStack() as stack:
        for name in CHECKS:
            module, _, function = name.rpartition(".")
            check = getattr(__import__(module, fromlist=[function]), function)
            stack.enter_context(mock.patch(name, timed(check)))
        start = time.thread_time()
        job()
        return time.thread_time() - start, inside, meanwhile


def upscale(*args: str) -> None:
    """Run `binarize upscale` in this process."""
    quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with contextlib.suppress(SystemExit), quiet[0], quiet[1]:
        app(["upscale", *args, "--force"])


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        latent, photo = Path(folder, "latent"), Path(folder, "photo.png")
        binarize.save(released(), latent)
        Image.effect_noise((128, 96), 90).convert("RGB").save(photo)
        packed = default_model(2) / "unet"
        jobs: dict[str, Job] = {
            "binarize.load, packed, 1 MB": lambda: binarize.load(packed),
            "binarize.load, latent weights, 206 MB": lambda: binarize.load(latent),
            "binarize upscale, 256x192, 4 steps": lambda: upscale(str(photo), f"{folder}/a.png", "--steps", "4"),
        }
        print("| job | seconds | of which checks | share | checks meanwhile |\n|---|---|---|---|---|")
        for name, job in jobs.items():
            measured = [share(job) for _ in range(ROUNDS + 1)][1:]
            total, inside, meanwhile = (statistics.median(column) for column in zip(*measured, strict=True))
            print(f"| {name} | {total:.3f} | {inside:.4f} | {inside / total:.2%} | {meanwhile:.3f} |", flush=True)


if __name__ == "__main__":
    main()
