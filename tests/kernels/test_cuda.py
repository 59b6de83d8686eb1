"""Triton's kernels against the counting oracle and plain torch: on a GPU, or interpreted on a CPU (without races)."""

import copy
import dataclasses
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from packed_case import CLOSE, SMALL, Problem, inputs, network, on_each, problems, with_everything
from torch import Tensor, nn

import binarize
from binarize.kernels import backends
from binarize.kernels.binary_conv import BinaryConv, Geometry, OutputTransform, Shortcut
from binarize.kernels.bitpack import FilterShape, from_bits
from binarize.kernels.ops import binary_conv2d, norm_factors, norm_silu
from binarize.layers import BinaryConv2d, BinaryLinear
from binarize.methods import Method
from binarize.models import SRUNet, SuperResolutionPipeline
from binarize.packed import PackedConv2d, PackedLinear

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
EITHER = ("triton", "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["interpreted", pytest.param("cuda", marks=pytest.mark.gpu)], scope="module")
def device(request: pytest.FixtureRequest) -> str:
    """Where the kernels run; conftest.py has them interpreted where there is no GPU."""
    if request.param == "interpreted" and torch.cuda.is_available():
        pytest.skip("the kernels are compiled for the GPU, where the same tests run")
    return "cuda" if request.param == "cuda" else "cpu"


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no convolution round its input to TF32, which turns signs over further on."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def moved(conv: BinaryConv, options: dict[str, Tensor | None], device: str) -> tuple[BinaryConv, dict[str, Any]]:
    tensors = ("filters", "padding_correction", "thresholds", "coefficients")
    conv = dataclasses.replace(conv, **{name: getattr(conv, name).to(device) for name in tensors}, compiled={})
    return conv, {name: None if value is None else value.to(device) for name, value in options.items()}


@settings(max_examples=12)
@given(problem=problems(DTYPES))
def test_dot_products_equal_the_oracle_bit_for_bit(device: str, problem: Problem) -> None:
    with backends.use("triton"):
        conv, options = moved(problem.conv, problem.options, device)
        found = binary_conv2d(problem.x.to(device), conv, **options)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found.cpu(), torch.from_numpy(problem.expected).to(problem.x.dtype))


def found_and_expected(x: Tensor, conv: BinaryConv, options: dict[str, Any], device: str) -> tuple[Tensor, Tensor]:
    with backends.use("triton"):
        there, given_there = moved(conv, options, device)
        found = binary_conv2d(x.to(device), there, **given_there).cpu()
    with backends.use("torch"):
        return found, binary_conv2d(x, conv, **options)


@settings(max_examples=12)
@given(case=with_everything(DTYPES))
def test_they_do_what_plain_torch_does(device: str, case: Any) -> None:
    torch.testing.assert_close(*found_and_expected(*case, device), **CLOSE[case[0].dtype])


@pytest.mark.parametrize(
    ("shortcut", "dtype", "tile"),
    [(1, torch.float32, 64), (2, torch.float32, 128), (1, torch.bfloat16, 128), (2, torch.float16, 64)],
)
def test_a_layer_with_everything_around_it(device, shortcut, dtype, tile, monkeypatch) -> None:
    monkeypatch.setattr("binarize.kernels.cuda.FEW_TILES", 0 if tile == 128 else math.inf)
    shape, geometry = FilterShape(40, 20, (3, 3), 2), Geometry(pad=(1, 1, 1, 1))
    x = torch.randn(3, 40, 12, 13).to(dtype).contiguous(memory_format=torch.channels_last)
    words = from_bits(torch.randint(0, 2, (1, 40, 20, 3, 3), dtype=torch.uint8), shape)[0]
    affine, rprelu = torch.randn(3, 40), torch.randn(3, 2, 40)
    transform = OutputTransform(*affine, *rprelu, -3.0, 3.0, Shortcut(shortcut))
    conv = BinaryConv.lay_out(words, shape, geometry, torch.full((2, 40), 0.01), transform)
    options = {"timestep_group": torch.tensor([1, 0, 1]), "input_norm": torch.randn(2, 3, 40)}
    options |= {"channel_bias": torch.randn(3, 40), "residual": torch.randn(3, 40, 12, 13).to(dtype)}
    found, expected = found_and_expected(x, conv, options, device)
    # exp rounds differently here and there, which flips the signs of values near a threshold.
    difference = (found.float() - expected.float()).abs()
    assert difference.median() < {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert (difference > 0.1).float().mean() < 0.01


def test_what_is_not_a_number_stays_none_behind_a_clamp(device: str) -> None:
    layer = PackedConv2d(BinaryConv2d(32, 32, 1, method=Method(weight="sign", post="relu", shortcut=True)))
    x = torch.ones(1, 32, 2, 2, device=device)
    x[0, 3, 1, 1] = math.nan
    results = on_each(EITHER, lambda: layer.to(device)(x).isnan())
    assert torch.equal(*results)
    assert results[0].any()


@pytest.mark.parametrize(("channels", "groups"), [(32, 1), (48, 4), (10, 5)])
@pytest.mark.parametrize("added", [False, True])
def test_group_norm_and_silu_are_torchs_own(device: str, channels: int, groups: int, added: bool) -> None:
    x = 3 * torch.randn(2, channels, 7, 9, device=device) + 5
    norm = nn.GroupNorm(groups, channels, device=device)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    bias = torch.randn(2, channels, device=device) if added else None
    with torch.no_grad(), backends.use("triton"):
        found = norm_silu(x, norm_factors(x, bias, groups, norm.weight, norm.bias, norm.eps))
        shifted = (x if bias is None else x + bias[:, :, None, None]).double()
        expected = nn.functional.silu(copy.deepcopy(norm).double()(shifted))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


# A batch may be longer than an axis of a grid.
@pytest.mark.parametrize("size", [(2, 6, 40), pytest.param((70_000, 40), marks=pytest.mark.gpu)])
def test_a_linear_layer_runs_on_tokens(device: str, size: tuple[int, ...]) -> None:
    layer, x = PackedLinear(BinaryLinear(40, 24, method="bbcu")).to(device), torch.randn(size, device=device)
    torch.testing.assert_close(*on_each(EITHER, lambda: layer(x)), rtol=1e-5, atol=1e-5)


def test_a_network_is_the_one_that_was_packed(device: str) -> None:
    model = network(**SMALL).to(device)
    given = [t.to(device) for t in inputs(8)]
    with torch.no_grad():
        expected = model(*given).sample
        packed = binarize.pack(copy.deepcopy(model))
        with backends.use("triton"):
            found = packed(*given).sample
    # A sign turned over by rounding moves some outputs; most must not move at all.
    difference = (found - expected).abs() / expected.abs().mean()
    assert difference.mean() < 1e-2
    assert difference.median() < 1e-5


def test_asking_for_them_where_they_cannot_run_leaves_cpus_to_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    with backends.use("triton"):  # which imports the kernels while they are still interpreted, for the tests after it
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        assert backends.kernels_for(torch.empty(0)) is None
        assert backends.cpu_kernels() is None


@pytest.mark.long
@pytest.mark.parametrize("capability", [80, 90])
def test_the_compiler_takes_them(capability: int, tmp_path: Path) -> None:
    given = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compile_triton.py")
    done = subprocess.run([sys.executable, script, str(capability)], env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_the_kernels_run_where_nothing_is_asked_for() -> None:
    assert backends.kernels_for(torch.empty(0, device="cuda")).__name__.endswith("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_layers_equal_the_cpu(dtype: torch.dtype) -> None:
    # Several tiles of pixels and of filters, which the drawn problems are too small for.
    layer = PackedConv2d(BinaryConv2d(192, 320, 3, padding=1, method="bbcu"))
    x = torch.randn(2, 192, 45, 67).to(dtype)
    with torch.no_grad():
        with backends.use("torch"):
            expected = layer(x.float())
        found = layer.cuda()(x.cuda())
    close = {"rtol": 1e-5, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(found.cpu().float(), expected, **close)


@pytest.mark.gpu
def test_a_loaded_pipeline_keeps_its_bits_there(tmp_path: Path) -> None:
    SuperResolutionPipeline(network(**SMALL), scale=2).save_pretrained(tmp_path)
    pipe = SuperResolutionPipeline.from_pretrained(tmp_path).to("cuda")
    assert binarize.is_packed(pipe.unet)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(torch.rand(1, 3, 8, 8), num_inference_steps=1, output_type="pt").images.shape == (1, 3, 16, 16)
    assert not binarize.is_packed(pipe.to("cuda", torch.float64).unet)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TensorFloat32 tensor cores")  # of the compiler
@pytest.mark.parametrize("mode", ["export", "inductor"])
def test_export_and_compile_take_a_packed_network(mode: str) -> None:
    model = binarize.pack(network(**SMALL)).cuda()
    given = tuple(t.cuda() for t in inputs())
    with torch.no_grad():
        exported = mode == "export"
        fast: Any = torch.export.export(model, given).module() if exported else torch.compile(model, fullgraph=True)
        expected = model(*given).sample
        difference = (fast(*given).sample - expected).abs() / expected.abs().mean()
    assert difference.mean() < 1e-2


@pytest.mark.gpu
def test_a_float64_network_is_exact_without_kernels() -> None:
    model = network(**SMALL).double()
    given = inputs(16, dtype=torch.float64)
    with torch.no_grad():
        expected = model(*given).sample
        found = binarize.pack(model).cuda()(*[t.cuda() for t in given]).sample.cpu()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.gpu
def test_gradients_of_a_binary_network_are_those_of_a_cpu() -> None:
    model = binarize.convert(SRUNet(**SMALL, dropout=0), "bidiffsr").double().train()
    given = inputs(16, dtype=torch.float64)
    grads = []
    for device in ("cpu", "cuda"):
        copied = copy.deepcopy(model).to(device)
        copied(*[t.to(device) for t in given]).sample.square().mean().backward()
        grads.append({name: p.grad.cpu() for name, p in copied.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-6, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
