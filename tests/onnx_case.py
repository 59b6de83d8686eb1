"""Running exported files with onnxruntime."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def run_all(path: Path, **inputs: Tensor) -> list[Tensor]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return [torch.from_numpy(value) for value in found]


def run(path: Path, **inputs: Tensor) -> Tensor:
    return run_all(path, **inputs)[0]


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the mean difference over the mean magnitude."""
    assert found.shape == expected.shape
    return float((found - expected).abs().mean() / expected.abs().mean())


def inputs(batch: int, height: int, width: int, seed: int = 0, steps: int = 2000) -> dict[str, Tensor]:
    """Return the inputs of an SRUNet, with a timestep for each sample."""
    generator = torch.Generator().manual_seed(seed)
    sample, condition = torch.randn(2, batch, 3, height, width, generator=generator)
    timestep = torch.randint(0, steps, (batch,), generator=generator).float()
    return {"sample": sample, "timestep": timestep, "condition": condition}
