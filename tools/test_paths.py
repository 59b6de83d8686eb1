"""Run the numeric tests with the code that other x86 processors run.

PyTorch, oneDNN and numba select their code by the instruction sets of the processor. Each entry of `PROCESSORS` limits
all three to those of an older processor. Every run uses one thread; ``--jobs`` runs are in progress at a time.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from numba.core.codegen import get_host_cpu_features

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ("tests/kernels", "--ignore=tests/kernels/test_cuda.py")
PACKED = ("tests/packed", "--ignore-glob=*/test_files*")  # without the tests of the file format
NUMERIC = (*KERNELS, *PACKED, "tests/layers", "tests/methods", "tests/models/test_parity.py")


@dataclass(frozen=True)
class Processor:
    """A processor and the tests that run with its code.

    Attributes:
        name: Name of the processor in LLVM.
        without: Regular expression for the names of instruction sets that the processor lacks.
        needs: Instruction sets that this machine must have to run code for the processor.
        aten: Value of ``ATEN_CPU_CAPABILITY``.
        onednn: Value of ``ONEDNN_MAX_CPU_ISA``.
        tests: Arguments for pytest.
    """

    name: str
    without: str
    needs: tuple[str, ...]
    aten: str
    onednn: str
    tests: tuple[str, ...] = NUMERIC

    def environment(self, features: str) -> dict[str, str]:
        """Return the environment variables that limit the libraries, given the instruction sets of this machine."""
        return {
            "ATEN_CPU_CAPABILITY": self.aten,
            "ONEDNN_MAX_CPU_ISA": self.onednn,
            "NUMBA_CPU_NAME": self.name,
            "NUMBA_CPU_FEATURES": re.sub(rf"\+(?=(?:{self.without})\b)", "-", features),
            "OMP_NUM_THREADS": "1",
        }


# Instruction sets that the first processors with AVX-512 lack.
NEWER = r"avx512(?!(?:f|bw|cd|dq|vl|vnni)\b)\w+|avx10[\w.-]*|avxvnni\w*|amx[\w-]*|vaes|vpclmulqdq|gfni"
PROCESSORS = (
    Processor("nehalem", r"avx[\w.-]*|fma|f16c|bmi2?|lzcnt|movbe|" + NEWER, ("sse4.2",), "default", "SSE41"),
    Processor("haswell", r"avx512\w*|" + NEWER, ("avx2", "fma"), "avx2", "AVX2"),
    Processor("skylake-avx512", r"avx512vnni|" + NEWER, ("avx512bw",), "avx512", "AVX512_CORE", KERNELS),
    Processor("cascadelake", NEWER, ("avx512vnni",), "avx512", "AVX512_CORE_VNNI", KERNELS),
)


def run(processor: Processor, features: str, arguments: list[str]) -> bool:
    """Run the tests of one processor, print their report, and return whether they passed."""
    started = time.monotonic()
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "not long",
        "--color=no",
        *processor.tests,
        *arguments,
    ]
    environment = {**os.environ, **processor.environment(features)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    passed = done.returncode == 0
    report = done.stdout.strip().splitlines()[-1:] if passed else [done.stdout, done.stderr]
    print(f"{processor.name}: " + "\n".join(report) + f" ({time.monotonic() - started:.0f} s)", flush=True)
    return passed


def main() -> int:
    """Run the tests of every processor whose code this machine can run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="number of runs in progress at a time")
    parser.add_argument("--only", action="append", help="name of a processor; may be repeated")
    options, arguments = parser.parse_known_args()
    features = get_host_cpu_features()
    processors = [p for p in PROCESSORS if options.only is None or p.name in options.only]
    able = [p for p in processors if all(f"+{need}" in features.split(",") for need in p.needs)]
    for processor in processors:
        if processor not in able:
            print(f"{processor.name}: skipped, because this machine lacks {' or '.join(processor.needs)}")
    with ThreadPoolExecutor(max(1, options.jobs)) as pool:
        passed = list(pool.map(lambda p: run(p, features, arguments), able))
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
