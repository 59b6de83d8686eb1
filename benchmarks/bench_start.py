"""What commands take that do no work, and a small image, each in a new process, beside ``import torch``.

Seconds of all cores, which other programs change little, and seconds on the clock. *first* compiles the kernels.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROUNDS = 3
BINARIZE = ("-m", "binarize")


def seconds(first: bool, *arguments: str) -> tuple[float, float]:
    """Return the processor's time and the time of an interpreter with these arguments."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with tempfile.TemporaryDirectory() as empty:
        environment = os.environ | ({"NUMBA_CACHE_DIR": empty} if first else {})
        command = [sys.executable, *arguments]
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        photo, result = Path(folder, "photo.png"), Path(folder, "photo_x2.png")
        noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
        Image.fromarray(noise).save(photo)
        cases = {
            "import torch": ("-c", "import torch"),
            "import torch, binarize.layers": ("-c", "import torch, binarize.layers"),
            "binarize --version": (*BINARIZE, "--version"),
            "binarize --help": (*BINARIZE, "--help"),
            "binarize upscale missing.png": (*BINARIZE, "upscale", str(Path(folder, "missing.png"))),
            "binarize train missing": (*BINARIZE, "train", "missing"),
            "binarize upscale 128x128": (*BINARIZE, "upscale", str(photo), "-o", str(result), "--force"),
            "first binarize upscale 128x128": (*BINARIZE, "upscale", str(photo), "-o", str(result), "--force"),
        }
        # The first round warms the file cache, compiles kernels and is not counted. All cases alternate.
        rounds = [[seconds(name.startswith("first"), *case) for name, case in cases.items()] for _ in range(ROUNDS + 1)]
    for name, column in zip(cases, zip(*rounds[1:], strict=True), strict=True):
        cpu, wall = map(statistics.median, zip(*column, strict=True))
        print(f"{name:<32} {cpu:6.2f} s of all cores, {wall:6.2f} s")
    print(f"(medians of {ROUNDS})")


if __name__ == "__main__":
    main()
