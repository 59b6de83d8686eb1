"""Packed files that are damaged, foreign or made to do harm: one clear error each, before anything large is made."""

from __future__ import annotations

import copy
import importlib
import json
import os
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hosts_zoo import unet2d
from packed_case import scatter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import binarize
from binarize.errors import BinarizeError
from binarize.imaging import files as imaging_files
from binarize.models import SRUNet

WEIGHTS, HOST_WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "model.safetensors", "config.json"
SMALL: dict[str, Any] = {"base_channels": 16, "channel_mults": (1, 2), "res_blocks": 1, "norm_groups": 4}
BITS = "middle.0.conv1.bits"


def take_apart(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return a safetensors file's header and its tensors' bytes, as the format is published."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def put_together(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def change_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    header, data = take_apart(path)
    change(header)
    put_together(path, header, data)


def change_config(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    def inside(header: dict[str, Any]) -> None:
        config = json.loads(header["__metadata__"]["config"])
        change(config)
        header["__metadata__"]["config"] = json.dumps(config)

    change_header(path, inside)


def flip(path: Path, position: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = binarize.convert(SRUNet(**SMALL), "bidiffsr")
    scatter(model)
    return binarize.save(binarize.pack(model), tmp_path_factory.mktemp("packed"))


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    for path in good.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def refused(folder: Path, message: str, *, everywhere: bool = True) -> None:
    """Every way to read a file gives the same error, the file alone as well."""
    ways: list[Callable[[], Any]] = [lambda: binarize.load(folder), lambda: binarize.load(folder / WEIGHTS)]
    if everywhere:
        ways += [lambda: SRUNet.from_pretrained(folder), lambda: SRUNet.from_pretrained(folder / WEIGHTS)]
    for way in ways:
        with pytest.raises(BinarizeError, match=message):
            way()


# What the format says


def test_a_file_is_what_the_format_says(good: Path) -> None:
    header, data = take_apart(good / WEIGHTS)
    metadata = header.pop("__metadata__")
    assert metadata["binarize_packed"] == "1"
    assert json.loads(metadata["config"]) == json.loads((good / CONFIG).read_text())
    model = binarize.load(good)
    codes = binarize.binary_state(model)["middle.0.conv1"].codes
    begin, end = header[BITS]["data_offsets"]
    assert (header[BITS]["dtype"], header[BITS]["shape"]) == ("U8", [1, 32 * 32 * 9 // 8])
    assert data[begin:end] == np.packbits(codes.numpy() > 0).tobytes()  # dense, the most significant bit first
    latent = {f"{name.removesuffix('.bits')}.weight" for name in header if name.endswith(".bits")}
    assert latent
    assert not latent & header.keys()


def test_the_same_model_gives_the_same_file(good: Path, tmp_path: Path) -> None:
    binarize.save(binarize.load(good), tmp_path)
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / name).read_bytes() == (good / name).read_bytes()


def test_a_file_is_as_large_as_summary_says(good: Path) -> None:
    header, data = take_apart(good / WEIGHTS)
    assert len(data) == binarize.summary(binarize.load(good)).bytes
    assert (good / WEIGHTS).stat().st_size < len(data) + 120 * len(header) + 4096


def test_half_precision_becomes_float32_again(good: Path, tmp_path: Path) -> None:
    model = binarize.load(good)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        binarize.save(model, tmp_path, dtype=dtype)
        loaded = binarize.load(tmp_path)
        dtypes = {t.dtype for t in loaded.state_dict().values() if t.is_floating_point()}
        assert dtypes == {torch.float64 if dtype == torch.float64 else torch.float32}
        for name, value in loaded.state_dict().items():
            expected = model.state_dict()[name]
            expected = expected.to(dtype).to(value.dtype) if expected.is_floating_point() else expected
            assert torch.equal(value, expected), name


# Damage


def test_every_flipped_byte_of_the_tensors_is_found(folder: Path) -> None:
    path = folder / WEIGHTS
    size, data = path.stat().st_size, len(take_apart(path)[1])
    for position in (size - data, size - data // 2, size - data // 3, size - 1):
        flip(path, position)
        refused(folder, "is damaged: its content does not have the digest that its header says")
        flip(path, position)
    assert binarize.is_packed(binarize.load(folder))


def test_flipped_bytes_of_the_header_give_one_kind_of_error_or_none(folder: Path) -> None:
    path = folder / WEIGHTS
    size = path.stat().st_size - len(take_apart(path)[1])
    failed = 0
    for position in range(0, size, size // 60):
        flip(path, position)
        try:
            binarize.load(path)
        except BinarizeError:
            failed += 1
        flip(path, position)
    assert failed > 30


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 5000, -1])
def test_a_truncated_file_is_refused(folder: Path, kept: int) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    refused(folder, "cannot be read as a safetensors file")


def test_a_missing_file_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    for read in (binarize.load, SRUNet.from_pretrained):
        with pytest.raises(BinarizeError, match="cannot be read as a safetensors file"):
            read(folder)


# Other files


@pytest.mark.parametrize("version", ["2", "0", "", "one"])
def test_another_version_is_refused(folder: Path, version: str) -> None:
    change_header(folder / WEIGHTS, lambda h: h["__metadata__"].update(binarize_packed=version))
    refused(folder, f"has packed format '{version}'; this version of binarize reads 1")


def test_a_foreign_file_is_refused(folder: Path) -> None:
    save_file({"weight": torch.zeros(3)}, folder / WEIGHTS)
    with pytest.raises(BinarizeError, match=r"holds no packed model; binarize\.pack makes one"):
        binarize.load(folder)
    with pytest.raises(BinarizeError, match=r"holds no packed model; binarize\.pack makes one"):
        binarize.load(folder / WEIGHTS)


def test_bits_beside_a_configuration_of_floats_are_refused(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    del config["conversion"]["packed"]
    (folder / CONFIG).write_text(json.dumps(config))
    for read in (binarize.load, SRUNet.from_pretrained):
        with pytest.raises(BinarizeError, match=r"weights and config\.json do not belong together"):
            read(folder)


# Files made to do harm


@pytest.mark.parametrize("size", [2**63, 2**40, 200_000_000, 5])
def test_a_header_that_says_it_is_long_is_refused(folder: Path, size: int) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", size) + raw[8:])
    refused(folder, "cannot be read as a safetensors file")


def entry(shape: list[int], dtype: str = "F32", offsets: tuple[int, int] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets or (0, 0))}


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["conv_in.bias"].update(shape=[2**40]),  # more than its bytes
        lambda h: h["conv_in.bias"].update(shape=[2**62, 2**62]),  # more than an integer holds
        lambda h: h["conv_in.bias"].update(shape=[-1]),
        lambda h: h["conv_in.bias"].update(data_offsets=[0, 2**50]),
        lambda h: h["conv_in.bias"].update(data_offsets=[64, 0]),
        lambda h: h["conv_in.bias"].update(data_offsets=h[BITS]["data_offsets"]),
        lambda h: h["conv_in.bias"].update(dtype="F3"),
        lambda h: h.update(extra=entry([4], offsets=(0, 16))),  # over another's bytes
        lambda h: h.pop("conv_in.bias"),  # bytes that belong to no tensor
    ],
)
def test_a_header_that_contradicts_itself_is_refused(folder: Path, change: Any) -> None:
    change_header(folder / WEIGHTS, change)
    refused(folder, "cannot be read as a safetensors file")


def swap_shape(header: dict[str, Any], name: str, **fields: Any) -> None:
    header[name].update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: swap_shape(h, "conv_in.bias", shape=[4, 4]), r"1 of another shape or dtype, such as conv_in\.bias "),
        (lambda h: swap_shape(h, "conv_in.bias", dtype="I32"), r"conv_in\.bias \(I32 \(16,\) for F32 \(16,\)\)"),
        (lambda h: swap_shape(h, "conv_in.bias", dtype="F16", shape=[32]), r"conv_in\.bias \(F16 \(32,\) for F32"),
        (lambda h: swap_shape(h, BITS, dtype="I8"), r"conv1\.bits \(I8 \(1, 1152\) for U8 \(1, 1152\)\)"),
        (lambda h: swap_shape(h, BITS, dtype="F32", shape=[1, 288]), r"conv1\.bits \(F32 \(1, 288\) for U8"),
        (lambda h: swap_shape(h, BITS, shape=[1152]), r"conv1\.bits \(U8 \(1152,\) for U8"),
        (lambda h: h.update(other=h.pop(BITS)), r"1 missing, such as middle\.0\.conv1\.bits; 1 unexpected, such as o"),
        (lambda h: h.update(extra=entry([0])), "1 unexpected, such as extra"),
        (lambda h: h["__metadata__"].pop("sha256"), "is damaged"),
        (lambda h: h["__metadata__"].update(sha256="0" * 64), "is damaged"),
        (lambda h: h["__metadata__"].pop("config"), "its configuration is not valid JSON"),
        (lambda h: h["__metadata__"].update(config="{"), "its configuration is not valid JSON"),
        (lambda h: h["__metadata__"].update(config="[" * 100_000), "its configuration is not valid JSON"),
        (lambda h: h["__metadata__"].update(config='{"a": ' + "9" * 5000 + "}"), "its configuration is not valid JSON"),
        (lambda h: h["__metadata__"].update(config="[1]"), "must be a JSON object; got list"),
        (lambda h: h["__metadata__"].update(config='"SRUNet"'), "must be a JSON object; got str"),
    ],
)
def test_tensors_and_configuration_have_to_fit(folder: Path, change: Any, message: str) -> None:
    change_header(folder / WEIGHTS, change)
    refused(folder, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # What the file has no tensors for is found in the header ...
        ({"base_channels": 2**20}, r"do not fit its configuration: \d+ of another shape"),
        ({"channel_mults": [1, 2, 4, 8, 16, 32, 64]}, r"do not fit its configuration: \d+ missing"),
        ({"in_channels": 10**9}, "do not fit its configuration: 1 of another shape"),
        # ... and what no tensor can be is not built.
        ({"base_channels": 2**40}, "its configuration builds no SRUNet: Storage size calculation overflowed"),
        ({"base_channels": 10**30}, "its configuration builds no SRUNet"),
        ({"base_channels": -16}, "base_channels and norm_groups must be at least 1; got -16"),
        ({"norm_groups": -1}, "base_channels and norm_groups must be at least 1"),
        ({"norm_groups": 0}, "base_channels and norm_groups must be at least 1"),
        ({"base_channels": "wide"}, "its configuration builds no SRUNet"),
        ({"base_channels": None}, "its configuration builds no SRUNet"),
        ({"channel_mults": 5}, "its configuration builds no SRUNet"),
        ({"channel_mults": [1] * 10**4}, "at most 12 levels of 64 ResBlocks"),
        ({"res_blocks": 10**9}, "at most 12 levels of 64 ResBlocks"),
        ({"norm_groups": 10**12}, "a multiple of norm_groups=1000000000000"),
        ({"conversion": "packed"}, "its configuration builds no SRUNet"),
        ({"conversion": None}, "do not fit its configuration: 24 missing"),
        ({"conversion": {"format": 1, "packed": 1, "method": {"name": "bidiffsr", "groups": 10**9}}},
         "num_train_timesteps|do not fit its configuration"),
        ({"conversion": {"format": 1, "packed": 7, "method": {"name": "bidiffsr"}}},
         "has packed format 7; this version of binarize reads 1"),
        ({"conversion": {"format": 1, "packed": 1, "method": {"name": "future"}}}, "unknown method 'future'"),
    ],
)  # fmt: skip
def test_a_configuration_of_something_else_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    change_config(folder / WEIGHTS, lambda config: config.update(changes))
    refused(folder, message)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
@pytest.mark.parametrize("changes", [{"base_channels": 0}, {"norm_groups": 0}, {"num_train_timesteps": float("inf")}])
def test_a_configuration_that_no_arithmetic_survives_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    change_config(folder / WEIGHTS, lambda config: config.update(changes))
    refused(folder, "does not hold a readable SRUNet|builds no SRUNet|SRUNet: ", everywhere=False)


def test_another_class_is_refused(folder: Path) -> None:
    change_config(folder / WEIGHTS, lambda config: config.update(_class_name="UNet2DModel"))
    for read in (lambda: binarize.load(folder), lambda: SRUNet.from_pretrained(folder / WEIGHTS)):
        with pytest.raises(BinarizeError, match="holds a UNet2DModel, not an SRUNet"):
            read()
    with pytest.raises(BinarizeError, match=f"{WEIGHTS} has binarize_format None; this version reads 1"):
        binarize.load(folder / WEIGHTS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "is not valid JSON"),
        ("5", "must hold a JSON object; got int"),
    ],
)
def test_a_broken_config_json_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / CONFIG).write_text(text)
    with pytest.raises(BinarizeError, match=message):
        binarize.load(folder)


# Hosts of other libraries


@pytest.fixture(scope="module")
def good_host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = binarize.pack(binarize.convert(unet2d((8, 16)), "bidiffsr"))
    return binarize.save(model, tmp_path_factory.mktemp("host"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"layers_per_block": 10**9}}, "its configuration has more layers than the file has weights for"),
        ({"config": {"block_out_channels": [2**20, 2**21]}}, r"do not fit its configuration: \d+ of another shape"),
        # CS-Fusion has a convolution for every 8 of the channels.
        ({"config": {"block_out_channels": [8, 2**20]}}, "has more layers than the file has weights for"),
        ({"config": {"block_out_channels": [8, 2**40]}}, "its configuration builds no network: Storage size"),
        ({"config": {"block_out_channels": None}}, "its configuration builds no network"),
        ({"config": {"down_block_types": ["Nothing", "DownBlock2D"]}}, "its configuration builds no network"),
        ({"config": None}, "has no configuration of its UNet2DModel; got None"),
        ({"class": "StableDiffusionPipeline"}, "names 'StableDiffusionPipeline', which is no diffusers model"),
        ({"class": None}, "names None, which is no diffusers model"),
        ({"library": "os"}, "which only its own code can build"),
    ],
)
def test_a_configuration_of_another_host_is_refused(
    good_host: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    weights = tmp_path / HOST_WEIGHTS
    weights.write_bytes((good_host / HOST_WEIGHTS).read_bytes())
    described = json.loads((good_host / CONFIG).read_text())
    host = described["host"]
    if isinstance(changes.get("config"), dict):
        changes = {"config": {**host["config"], **changes["config"]}}
    described["host"] = {**host, **changes}
    (tmp_path / CONFIG).write_text(json.dumps(described))
    change_config(weights, lambda config: config.update(host=described["host"]))
    for given in (tmp_path, weights):
        with pytest.raises(BinarizeError, match=message):
            binarize.load(given)


def plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 3, 3))


def test_a_host_that_does_not_fit_stays_as_it_was(tmp_path: Path) -> None:
    binarize.save(binarize.pack(binarize.convert(plain(), "bbcu")), tmp_path)
    other = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 3, 3))
    before = {name: (id(p), p.clone()) for name, p in other.named_parameters()}
    with pytest.raises(BinarizeError, match=r"do not fit its configuration: \d+ of another shape or dtype, such as"):
        binarize.load(tmp_path, model=other)
    flip(tmp_path / HOST_WEIGHTS, -1)
    host = plain()
    with pytest.raises(BinarizeError, match="is damaged"):
        binarize.load(tmp_path, model=host)
    for model in (other, host):
        assert [type(layer) for layer in model] == [nn.Conv2d] * 3
    assert all(id(p) == before[name][0] and torch.equal(p, before[name][1]) for name, p in other.named_parameters())
    with pytest.raises(BinarizeError, match="which only its own code can build"):
        binarize.load(tmp_path)


# Memory

BOUNDED = """
    import resource, sys
    import torch, binarize
    from binarize.errors import BinarizeError
    from binarize.models import SRUNet

    torch.set_num_threads(1)
    binarize.load(sys.argv[1])  # what any load needs is there
    with open("/proc/self/status") as status:
        in_use = next(int(line.split()[1]) for line in status if line.startswith("VmData")) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (in_use + 200_000_000,) * 2)
    try:
        torch.zeros(100_000_000)
    except RuntimeError:
        print("the limit holds")
    for path in sys.argv[2:]:
        try:
            binarize.load(path)
        except BinarizeError as error:
            print("refused:", error)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and limits memory as Linux does")
def test_hostile_files_are_refused_within_little_memory(good: Path, good_host: Path, tmp_path: Path) -> None:
    def wide(config: dict[str, Any]) -> None:
        config["base_channels"] = 2**16  # whose middle alone has 5 TB of weights in float32

    def wide_host(config: dict[str, Any]) -> None:
        config["host"]["config"]["block_out_channels"] = [2**16, 2**17]

    paths = []
    for number, (source, change) in enumerate([(good / WEIGHTS, wide), (good_host / HOST_WEIGHTS, wide_host)]):
        paths.append(tmp_path / f"{number}.safetensors")
        paths[-1].write_bytes(source.read_bytes())
        change_config(paths[-1], change)
    # A file of 8 TB, all but its first bytes a hole: its header is sound, and its tensor is not what is expected.
    paths.append(tmp_path / "hole.safetensors")
    header, _ = take_apart(good / WEIGHTS)
    size = 2**43
    put_together(
        paths[-1], {"__metadata__": header["__metadata__"], "conv_in.bias": entry([size], "U8", (0, size))}, b""
    )
    try:
        os.truncate(paths[-1], paths[-1].stat().st_size + size)
    except OSError:  # a file system without such files
        paths.pop()
    command = [sys.executable, "-c", textwrap.dedent(BOUNDED), str(good), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "the limit holds" in done.stdout
    assert done.stdout.count("refused: ") == len(paths), done.stdout + done.stderr
    assert done.stdout.count(": its tensors do not fit its configuration") >= 2  # the hole may be too large to map


# Writing


@pytest.mark.parametrize("failing", ["write", "rename"])
def test_a_failing_write_leaves_the_earlier_model(good: Path, tmp_path: Path, failing: str, monkeypatch: Any) -> None:
    earlier = binarize.convert(SRUNet(**SMALL), "bbcu")
    earlier.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    def write_some(path: Path, data: bytes) -> None:
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        fail()

    packed = binarize.load(good)
    with monkeypatch.context() as patch:
        if failing == "write":
            patch.setattr(Path, "write_bytes", write_some)
        else:
            patch.setattr(imaging_files.os, "replace", fail)
        for write in (packed.save_pretrained, lambda folder: binarize.save(packed, folder)):
            with pytest.raises(BinarizeError, match=r"cannot be written: .*No space left on device"):
                write(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert not binarize.is_packed(SRUNet.from_pretrained(tmp_path))
    binarize.save(packed, tmp_path)
    assert binarize.is_packed(SRUNet.from_pretrained(tmp_path))


def test_what_cannot_be_stored_is_refused_before_writing(good: Path, tmp_path: Path) -> None:
    model = binarize.load(good)
    for dtype in (torch.int8, torch.complex64):
        with pytest.raises(BinarizeError, match=r"as float64, float32, float16, bfloat16; got torch\."):
            binarize.save(model, tmp_path / "out", dtype=dtype)
    large = copy.deepcopy(model)
    with torch.no_grad():
        large.conv_in.bias[3] = 1e5
    with pytest.raises(BinarizeError, match=r"conv_in\.bias has values up to 1e\+05, which float16 cannot hold"):
        binarize.save(large, tmp_path / "out", dtype=torch.float16)
    with pytest.raises(BinarizeError, match="dtype is for packed models"):
        binarize.save(binarize.unpack(large), tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()


def test_the_file_can_be_read_without_this_package(good: Path) -> None:
    state = load_file(good / WEIGHTS)
    assert set(state) == set(binarize.load(good).state_dict())


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (
            {"name": "pydoc:pipepager", "cmd": "touch {mark}"},
            "names the post part 'pydoc:pipepager', and a file may not",
        ),
        ({"name": "{module}:nothing"}, r"Import touched_by_import first"),
        ({"name": "os:system"}, "names the post part 'os:system'"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_file_has_nothing_imported_and_no_function_called(
    part: dict[str, str], words: str, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "touched_by_import.py").write_text(f"open({str(mark)!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("pydoc")
    network = SRUNet(base_channels=8, channel_mults=(1, 2), res_blocks=1, norm_groups=4)
    binarize.convert(network, "bidiffsr")
    binarize.save(binarize.pack(network) if packed else network, tmp_path / "model")
    hostile = {key: text.format(mark=mark, module="touched_by_import") for key, text in part.items()}

    def poisoned(text: str) -> str:
        config = json.loads(text)
        config["conversion"]["method"]["post"] = hostile
        return json.dumps(config)

    described = tmp_path / "model" / CONFIG
    described.write_text(poisoned(described.read_text()))
    if packed:  # which keeps its own

        def poison(header: dict[str, Any]) -> None:
            header["__metadata__"]["config"] = poisoned(header["__metadata__"]["config"])

        change_header(tmp_path / "model" / WEIGHTS, poison)
    with pytest.raises(BinarizeError, match=words):
        binarize.load(tmp_path / "model")
    with pytest.raises(BinarizeError, match=words):
        SRUNet.from_pretrained(tmp_path / "model")
    assert not mark.exists()
    assert "touched_by_import" not in sys.modules


class Half(nn.Module):
    """A part of this module, which the program has imported."""

    def __init__(self, spec: Any) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def test_a_class_that_the_program_has_imported_is_found_again(tmp_path: Path) -> None:
    network = SRUNet(base_channels=8, channel_mults=(1, 2), res_blocks=1, norm_groups=4)
    binarize.convert(network, "bidiffsr", overrides={"middle.*": {"post": f"{__name__}:Half"}})
    binarize.save(network, tmp_path / "model")
    loaded = binarize.load(tmp_path / "model")
    assert any(type(module).__name__ == "Half" for module in loaded.modules())


def test_a_changed_configuration_is_noticed(tmp_path: Path) -> None:
    network = SRUNet(base_channels=8, channel_mults=(1, 2), res_blocks=1, norm_groups=4)
    binarize.save(binarize.pack(binarize.convert(network, "bidiffsr")), tmp_path / "model")
    (file,) = (tmp_path / "model").glob("*.safetensors")
    data = file.read_bytes()
    assert data.count(b'\\"dropout\\": 0.2') == 1
    file.write_bytes(data.replace(b'\\"dropout\\": 0.2', b'\\"dropout\\": 0.3'))
    with pytest.raises(BinarizeError, match="is damaged"):
        binarize.load(file)
