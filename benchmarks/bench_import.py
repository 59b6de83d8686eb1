"""The import time of binarize beyond that of torch, each measured in a new interpreter."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

ROUNDS = 5


def seconds(statement: str) -> float:
    """Return the time of an interpreter that executes one statement."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main() -> None:
    # The first round warms the file cache and is not counted. The two imports alternate, so drift affects both.
    rounds = [(seconds("import torch"), seconds("import torch, binarize")) for _ in range(ROUNDS + 1)][1:]
    torch, both = (statistics.median(column) for column in zip(*rounds, strict=True))
    print(f"import torch            {torch * 1e3:6.0f} ms")
    print(f"import torch, binarize  {both * 1e3:6.0f} ms  ({(both - torch) * 1e3:+.0f} ms, median of {ROUNDS})")


if __name__ == "__main__":
    main()
