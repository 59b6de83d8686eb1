"""How much longer `import binarize` takes than `import torch`, each in a fresh interpreter."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

ROUNDS = 5


def seconds(statement: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main() -> None:
    # One round that is not counted, so that both read their files from memory; then alternate, so that drift hits both.
    rounds = [(seconds("import torch"), seconds("import torch, binarize")) for _ in range(ROUNDS + 1)][1:]
    torch, both = (statistics.median(column) for column in zip(*rounds, strict=True))
    print(f"import torch            {torch * 1e3:6.0f} ms")
    print(f"import torch, binarize  {both * 1e3:6.0f} ms  ({(both - torch) * 1e3:+.0f} ms, median of {ROUNDS})")


if __name__ == "__main__":
    main()
