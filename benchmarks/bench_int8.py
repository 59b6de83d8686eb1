"""Packed inference compared with what a user would pick instead: the full-precision twin in OpenVINO and ONNX Runtime.

    python benchmarks/bench_int8.py                       three sizes, one and two threads; needs the extra "bench"
    python benchmarks/bench_int8.py --sizes 256 --threads 2

The networks of a size and a number of threads take turns. Each is called three times in a row, as in a denoising loop.
A cell is the median, so ratios are reliable.
int8 is post-training quantization, calibrated on noisy photographs as sampling meets them, by NNCF or ONNX Runtime. In
OpenVINO the rest runs in float32 or bfloat16. The quality of the quantized twin is not measured.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import onnxruntime
import openvino
import torch
from common import RESULTS, TIMESTEP, Job, forward, full_precision, interleaved, machine, networks
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from binarize.demo.run import TRAINING, image_folder
from binarize.imaging import degrade, read_image, upscale_bicubic
from binarize.models import SRUNet

CALIBRATION_IMAGES, CALIBRATION_SIDE = 4, 128
CALLS = 3  # consecutive calls of a network in each round
NAMES = ["sample", "timestep", "condition"]


class Twin(nn.Module):
    """The full-precision network with a tuple of tensors as its inputs and a tensor as its output."""

    def __init__(self, unet: SRUNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        """Predict."""
        out: Tensor = self.unet(sample, timestep, condition).sample
        return out


def calibration() -> Iterator[dict[str, np.ndarray]]:
    """Yield inputs of the network: photographs with the noise of several timesteps, and their upscaled reductions."""
    generator = torch.Generator().manual_seed(0)
    for name in TRAINING[:CALIBRATION_IMAGES]:
        high = read_image(image_folder() / name).rgb[:, :CALIBRATION_SIDE, :CALIBRATION_SIDE]
        low = degrade((high * 255).round().to(torch.uint8), 2)
        condition = upscale_bicubic(low, 2)[None].float() / 255
        for timestep in (100, 700, 1300, 1900):
            noise = torch.randn(condition.shape, generator=generator)
            share = 1 - timestep / 2000
            sample = share * (high[None] - condition) * 10 + (1 - share**2) ** 0.5 * noise
            yield {"sample": sample.numpy(), "timestep": np.array([timestep]), "condition": condition.numpy()}


class Reader(CalibrationDataReader):
    """Feeds `calibration` to ONNX Runtime."""

    def __init__(self) -> None:
        self.inputs = calibration()

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next inputs."""
        return next(self.inputs, None)


def export(folder: Path) -> Path:
    """Write the full-precision network as ONNX with a free image size."""
    path, side = folder / "float.onnx", CALIBRATION_SIDE
    given = (torch.randn(1, 3, side, side), torch.tensor([TIMESTEP]), torch.rand(1, 3, side, side))
    image = {2: "height", 3: "width"}
    torch.onnx.export(
        Twin(full_precision()), given, str(path), input_names=NAMES, opset_version=17, dynamo=False,
        dynamic_axes={"sample": image, "condition": image},
    )  # fmt: skip
    return path


def quantize(path: Path, folder: Path) -> tuple[openvino.Model, Path]:
    """Return the network in int8 for OpenVINO, and the file of that for ONNX Runtime."""
    dataset = nncf.Dataset(list(calibration()))
    by_nncf = nncf.quantize(openvino.Core().read_model(path), dataset, subset_size=4 * CALIBRATION_IMAGES)
    prepared, by_ort = folder / "prepared.onnx", folder / "int8.onnx"
    quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
    quantize_static(str(prepared), str(by_ort), Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
    return by_nncf, by_ort


def jobs(models: dict[str, Any], size: int, threads: int) -> dict[str, Job]:
    """Return a function for each network that runs one denoising step of one image on so many threads."""
    torch.set_num_threads(threads)
    made: dict[str, Job] = {}
    for name, (model, dtype) in models["torch"].items():
        made[name] = forward(model, dtype, size)
    given = {
        "sample": np.random.default_rng(0).standard_normal((1, 3, size, size), np.float32),
        "timestep": np.array([TIMESTEP]),
        "condition": np.random.default_rng(1).random((1, 3, size, size), np.float32),
    }
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    for name, path in models["onnxruntime"].items():
        session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        made[name] = lambda session=session: session.run(None, given)
    for name, (model, precision) in models["openvino"].items():
        fixed = model.clone()
        fixed.reshape({key: value.shape for key, value in given.items()})
        options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision, "NUM_STREAMS": 1}
        request = openvino.Core().compile_model(fixed, "CPU", options).create_infer_request()
        made[name] = lambda request=request: request.infer(given)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 512])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=2, help=f"rounds of {CALLS} calls (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="also torch.compile, which takes minutes a size")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = export(folder)
        int8, int8_path = quantize(path, folder)
        float_model = openvino.Core().read_model(path)
        models: dict[str, Any] = {
            "torch": networks(),
            "onnxruntime": {"onnxruntime float32": path, "onnxruntime int8": int8_path},
            "openvino": {
                "openvino float32": (float_model, "f32"),
                "openvino bfloat16": (float_model, "bf16"),
                "openvino int8, rest float32": (int8, "f32"),
                "openvino int8, rest bfloat16": (int8, "bf16"),
            },
        }
        if options.compile:
            models["torch"]["torch.compile float32"] = (torch.compile(full_precision()), torch.float32)
        rows = []
        for size in options.sizes:
            for threads in options.threads:
                times = interleaved(jobs(models, size, threads), options.rounds, calls=CALLS)
                rows.append({"size": size, "threads": threads, "seconds": times})
                print(f"-- {size}x{size}, {threads} thread(s)")
                for label, seconds in times.items():
                    print(f"{label:<30} {seconds:8.4f} s  {seconds / times['packed float32']:6.2f} x packed float32")
    found = {"machine": machine() | {"openvino": openvino.__version__, "nncf": nncf.__version__}, "networks": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "int8.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
