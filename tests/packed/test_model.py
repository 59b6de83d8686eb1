"""Packed networks as a whole: what they compute, what they weigh, and where they have to run."""

import copy
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts_zoo import HOSTS, ZooHost, output_of, unet2d_condition
from packed_case import CLOSE, SMALL, MadeTensors, inputs, needs_inductor, network, scatter
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset

import binarize
from binarize.conversion.export import binary_layers, packed_layers
from binarize.errors import BinarizeError
from binarize.kernels import backends
from binarize.kernels.cpu import threads as cpu_threads
from binarize.kernels.ops import norm_silu
from binarize.layers import BinaryConv2d, delayed
from binarize.layers.method import Method
from binarize.layers.parts import levels_of
from binarize.models import SRUNet
from binarize.packed import PackedConv2d
from binarize.packed.blocks import norm_silu_conv

WEIGHTS = "diffusion_pytorch_model.safetensors"


@contextmanager
def signs_of(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect, for each layer whose input can be seen from outside, whether its activations are +1."""
    found: dict[str, Tensor] = {}
    handles = []
    for name, layer in model.named_modules():
        if isinstance(layer, BinaryConv2d | PackedConv2d):

            def collect(layer: Any, args: Any, name: str = name) -> None:
                x = args[0]
                if len(args) > 1 and args[1] is not None:  # a packed layer normalises its input itself
                    x = norm_silu(x, args[1])
                found[name] = layer.activation(x if layer.pre is None else layer.pre(x)) > 0

            handles.append(layer.register_forward_pre_hook(collect))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


SIZES = [pytest.param(SMALL, id="small"), pytest.param({}, marks=pytest.mark.slow, id="released")]


@pytest.mark.parametrize("options", [*SIZES, *({**SMALL, "resampling": name} for name in ("pixel", "conv"))])
def test_a_network_computes_the_same(options: dict[str, Any]) -> None:
    fusion = "wide" if options.get("resampling") == "conv" else "cs"
    model, given = network(**options, fusion=fusion).double(), inputs(16, dtype=torch.float64)
    with torch.no_grad():
        expected = model(*given).sample
        found = binarize.pack(model)(*given).sample
        other = model(given[0], given[1].flip(0), given[2]).sample
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert (found - other).abs().mean() > 1e-3  # each sample has its own timestep


@pytest.mark.parametrize("options", SIZES)
def test_a_network_in_float32_flips_hardly_a_sign(options: dict[str, Any]) -> None:
    model = network(**options)
    packed = binarize.pack(copy.deepcopy(model))
    difference = scale = flipped = counted = 0.0
    for _ in range(20):
        given = inputs(16)
        with torch.no_grad(), signs_of(model) as plain, signs_of(packed) as bits:
            expected, found = model(*given).sample, packed(*given).sample
        difference += (found - expected).abs().mean().item()
        scale += expected.abs().mean().item()
        assert plain.keys() == bits.keys() == {name for name, _ in packed_layers(packed)}
        flipped += sum(int((plain[name] != bits[name]).sum()) for name in plain)
        counted += sum(signs.numel() for signs in plain.values())
    assert difference < 1e-4 * scale
    assert flipped < 1e-6 * counted


@pytest.mark.parametrize("parts", [{}, {"weight": "two_basis"}, {"post": lambda spec: nn.Tanh()}])
def test_a_layer_takes_over_the_norm_before_it_and_the_sum_after_it(parts: dict[str, Any]) -> None:
    conv, norm = BinaryConv2d.from_float(nn.Conv2d(8, 8, 3, padding=1, bias=False), Method(**parts)), nn.GroupNorm(2, 8)
    x, residual = torch.randn(2, 2, 8, 6, 6)
    with torch.no_grad():
        expected = residual + conv(torch.nn.functional.silu(norm(x)))
        found = norm_silu_conv(norm, PackedConv2d(conv), x, residual=residual)
    torch.testing.assert_close(found, expected, **CLOSE[torch.float32])


def test_bfloat16_is_close_to_float32() -> None:
    packed = binarize.pack(copy.deepcopy(network(**SMALL)))
    half = copy.deepcopy(packed).bfloat16()
    given = inputs()
    with torch.no_grad(), signs_of(packed) as single, signs_of(half) as rounded:
        expected = packed(*given).sample
        found = half(given[0].bfloat16(), given[1], given[2].bfloat16()).sample
    assert found.dtype == torch.bfloat16
    # 8 bits of mantissa flip the signs within some thousandths of zero.
    flipped = sum(int((single[n] != rounded[n]).sum()) for n in single) / sum(s.numel() for s in single.values())
    assert 0 < flipped < 0.02
    assert (found.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(HOSTS) - {"srunet"}))
def test_other_hosts_are_packed_saved_and_loaded(name: str, tmp_path: Path) -> None:
    host: ZooHost = HOSTS[name]
    pytest.importorskip(host.library)
    method = "bidiffsr" if host.timed else "reactnet"
    model = scatter(binarize.convert(host.build(), method, **host.options)).eval()
    given = host.inputs(3)
    wide = tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, given)
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        expected = output_of(exact, wide)
        binarize.pack(exact)
        torch.testing.assert_close(output_of(exact, wide), expected, rtol=1e-10, atol=1e-10)
        packed = output_of(binarize.pack(model), given)
        binarize.save(model, tmp_path)
        rebuilt = type(model).__module__.startswith("diffusers.")
        loaded = binarize.load(tmp_path) if rebuilt else binarize.load(tmp_path, model=host.build())
        assert binarize.is_packed(loaded)
        assert torch.equal(output_of(loaded, given), packed)
        torch.testing.assert_close(output_of(binarize.unpack(loaded.double()), wide), expected, rtol=1e-5, atol=1e-5)


class Offset(nn.Module):
    """A host with a buffer that no state dict holds, one tensor under two names, and one convolution used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.again = self.twice
        self.norm, self.other = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.other.weight = self.norm.weight
        self.register_buffer("offset", torch.linspace(0, 1, 8).view(8, 1, 1), persistent=False)
        self.last = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.twice(self.first(x)) + self.offset)
        return self.last(self.other(self.again(x)))


def test_a_host_with_shared_and_unsaved_tensors_is_saved_and_loaded(tmp_path: Path) -> None:
    model = binarize.pack(scatter(binarize.convert(Offset(), "reactnet")))
    assert model.again is model.twice
    loaded = binarize.load(binarize.save(model, tmp_path), model=Offset())
    assert loaded.again is loaded.twice
    assert loaded.other.weight is loaded.norm.weight
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded(x), model(x))


def test_a_diffusers_host_with_unsaved_buffers_is_saved_and_loaded(tmp_path: Path) -> None:
    blocks = {"down_block_types": ("KDownBlock2D",) * 2, "up_block_types": ("KUpBlock2D",) * 2}
    options = {"mid_block_type": None, "resnet_time_scale_shift": "scale_shift", "act_fn": "gelu"}
    host = unet2d_condition((32, 32), norm_num_groups=16, **blocks, **options)
    assert {name for name, _ in host.named_buffers()} - host.state_dict().keys()
    model = binarize.pack(scatter(binarize.convert(host, "bbcu")))
    loaded = binarize.load(binarize.save(model, tmp_path))
    given = HOSTS["stable_diffusion"].inputs(2)
    assert torch.equal(output_of(loaded, given), output_of(model, given))


def size_of(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


@pytest.mark.slow
def test_the_released_network_is_small_in_memory_and_on_disk(tmp_path: Path) -> None:
    model = binarize.pack(network())
    expected = binarize.summary(model).bytes
    assert size_of([*model.parameters(), *model.buffers()]) <= 20e6
    for dtype, most in ((None, 18.5e6), (torch.float16, 12.5e6)):
        written = (binarize.save(model, tmp_path, dtype=dtype) / WEIGHTS).stat().st_size
        assert written <= most
        if dtype is None:
            assert written == pytest.approx(expected, rel=0.01)
    with torch.no_grad():
        model(*inputs())
    # What the first forward lays out for the kernels comes on top, and stays.
    tables = [t for _, layer in packed_layers(model) for conv in layer.compiled().convs for t in conv.tensors[1:]]
    assert size_of(tables) <= 3.1e6


@pytest.mark.parametrize("activation", ["approx_sign", "unit_round"])
def test_the_first_call_does_not_unpack_the_bits(activation: str) -> None:
    layer = PackedConv2d(BinaryConv2d(128, 128, 3, padding=1, method=Method(activation=activation)).eval())
    with MadeTensors() as made:
        assert layer.compiled() is not None
    assert 0 < max(tensor.nbytes for tensor in made.tensors) <= layer.words.nbytes == 128 * 128 * 9 / 8


@pytest.mark.long
@pytest.mark.parametrize("mode", ["export", "aot_eager", pytest.param("inductor", marks=needs_inductor)])
def test_export_and_compile_equal_eager(mode: str) -> None:
    torch._dynamo.reset()
    # Inductor takes time in proportion to the network.
    model = binarize.pack(network(**SMALL | ({"channel_mults": (1,)} if mode == "inductor" else {})))
    given = inputs()
    moved = (given[0].flip(1), given[1].flip(0), given[2].flip(2))  # the graph is not bound to what it was made with
    with torch.no_grad():
        if mode == "export":
            fast: Any = torch.export.export(model, given).module()
        else:
            fast = torch.compile(model, fullgraph=True, backend=mode)
        for arguments in (given, moved):
            torch.testing.assert_close(fast(*arguments).sample, model(*arguments).sample, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model(*given).sample, model(*moved).sample)


def conversion_context(timestep: int, layer: PackedConv2d) -> Any:
    return layer.pre.context.using(timestep)  # type: ignore[union-attr]


class Predicted(Dataset[Tensor]):
    """Runs a network where it is read: in a worker process."""

    def __init__(self, model: nn.Module, given: tuple[Tensor, Tensor, Tensor]) -> None:
        self.model, self.given = model, given

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.model(*self.given).sample


@pytest.mark.timeout(60)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs the start method fork")
# Forking after threads have run is what is tested.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_it_runs_in_a_forked_worker_after_the_parent_ran_it_on_threads(threads: Any) -> None:
    threads(2)
    model = binarize.pack(network(**SMALL))
    given = inputs()
    with torch.no_grad():
        expected = model(*given).sample
    workers = {"num_workers": 2, "multiprocessing_context": "fork", "timeout": 30}
    loader = DataLoader(Predicted(model, given), batch_size=None, **workers)
    for _ in range(2):
        found = list(loader)
        assert len(found) == 3
        for prediction in found:
            torch.testing.assert_close(prediction, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # the parent's threads are as they were
        assert torch.equal(model(*given).sample, expected)


@pytest.fixture
def threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("runtime", ["openmp", "executor"])
def test_the_thread_count_is_that_of_torch(runtime: str, threads: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = binarize.pack(network(**SMALL)).middle[0].conv1
    x = torch.randn(2, 32, 24, 20)
    parallel, used = cpu_threads.openmp(), []
    executor = cpu_threads._executor

    def through_openmp(worker: int, parameters: int, count: int, flags: int) -> None:
        used.append(count)
        parallel(worker, parameters, count, flags)  # type: ignore[misc]

    def through_executor(count: int) -> ThreadPoolExecutor:
        used.append(count)
        return executor(count)

    if runtime == "openmp" and parallel is None:
        pytest.skip("torch's runtime has no GOMP_parallel")
    monkeypatch.setattr(cpu_threads, "openmp", lambda: through_openmp if runtime == "openmp" else None)
    monkeypatch.setattr(cpu_threads, "_executor", through_executor)
    outputs = []
    with torch.no_grad(), backends.use("numba"), conversion_context(3, layer):
        for count in (1, 2, 3):
            threads(count)
            used.clear()
            outputs.append(layer(x))
            assert set(used) == ({count} if count > 1 else set())  # one thread is a plain call
    assert all(torch.equal(out, outputs[0]) for out in outputs)


FIRST_RUN = """
import logging, sys, torch
from binarize.layers import BinaryConv2d, delayed
from binarize.packed import PackedConv2d
from binarize.packed.blocks import norm_silu_conv
from binarize.kernels import backends
logging.basicConfig(stream=sys.stdout, format="%(name)s: %(message)s")
logging.getLogger("binarize").setLevel(logging.DEBUG)
layer = PackedConv2d(BinaryConv2d(8, 8, 3, padding=1, method="bbcu").eval())
x = torch.randn(1, 8, 9, 9)
print("importing and packing compiles nothing")
with torch.no_grad(), backends.use("numba"):
    layer(x), layer(x)
"""


@pytest.mark.long
def test_compiled_kernels_are_kept_and_compiling_them_is_logged(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    seconds, kept = [], []
    for run in range(2):
        done = subprocess.run([sys.executable, "-c", FIRST_RUN], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stdout.splitlines() if line.startswith(("binarize: ", "importing"))]
        assert lines.pop(0).startswith("importing")
        if run == 0:
            assert lines.pop(0).startswith("binarize: Compiling CPU kernels")
        # This one alone, and once, however often the layer runs.
        found = re.fullmatch(r"binarize: CPU kernel conv ready after ([\d.]+) s\.", "".join(lines))
        assert found is not None
        seconds.append(float(found[1]))
        kept.append({path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb[ci]")})
    assert kept[0] == kept[1] != {}
    assert seconds[1] < seconds[0] / 3


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda: SRUNet(**SMALL), "is not converted"),
        (lambda: binarize.pack(network(**SMALL)), "is packed already"),
        (lambda: network({"name": "reactnet", "two_stage": 0.5}, **SMALL), "weights are still full precision"),
        (lambda: network({"name": "bbcu", "activation": delayed("ste", 0.5)}, **SMALL), "activations are still full"),
        (lambda: silent(network("bbcu", **SMALL)), "does not declare the two values"),
    ],
)
def test_a_model_that_cannot_be_packed_stays_as_it_was(prepare: Any, message: str) -> None:
    model = prepare().train()
    modules = {name: (id(module), module.training) for name, module in model.named_modules()}
    tensors = {name: (id(p), p.requires_grad, p.stride()) for name, p in model.named_parameters()}
    config, given = model.to_json_string(), inputs(batch=2)
    with pytest.raises(BinarizeError, match=message):
        binarize.pack(model)
    assert {name: (id(module), module.training) for name, module in model.named_modules()} == modules
    assert {name: (id(p), p.requires_grad, p.stride()) for name, p in model.named_parameters()} == tensors
    assert model.to_json_string() == config
    if not binarize.is_packed(model) and any(True for _ in binary_layers(model)):
        model(*given).sample.sum().backward()
        assert all(layer.weight.grad is not None for _, layer in binary_layers(model))


def silent(model: SRUNet) -> SRUNet:
    """Give the last binary layer an activation that does not declare its levels, so that all the others pass."""
    *_, (_, last) = binary_layers(model)
    last.activation = nn.Hardtanh()
    assert levels_of(last.activation) is None
    return model
