"""How long commands take that do no work, and a small image, each in a new process, beside ``import torch``."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROUNDS = 5
BINARIZE = ("-m", "binarize")


def seconds(*arguments: str) -> float:
    """Return the time of an interpreter with these arguments."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


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
            "binarize upscale 128x128": (*BINARIZE, "upscale", str(photo), str(result), "--force"),
        }
        # The first round warms the file cache, compiles kernels and is not counted. All cases alternate.
        rounds = [[seconds(*arguments) for arguments in cases.values()] for _ in range(ROUNDS + 1)][1:]
    for name, column in zip(cases, zip(*rounds, strict=True), strict=True):
        print(f"{name:<30} {statistics.median(column):6.2f} s")
    print(f"(medians of {ROUNDS})")


if __name__ == "__main__":
    main()
