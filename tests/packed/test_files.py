"""Packed files: what they hold, how they are written, and one clear error for damaged and foreign ones."""

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import packed_files
import pytest
import torch
from errors_case import assert_error
from packed_case import SMALL
from packed_files import BITS, CONFIG, HOST_WEIGHTS, WEIGHTS, change_header, flip, refused, take_apart
from safetensors.torch import load_file, save_file
from torch import nn

import binarize
from binarize.errors import BinarizeError
from binarize.imaging import files as imaging_files
from binarize.models import SRUNet

DAMAGES: list[Callable[[bytes], bytes]] = [  # the file is cut off; its header says that it is long
    *(lambda raw, kept=kept: raw[:kept] for kept in (0, 4, 8, 100, 5000, -1)),
    *(lambda raw, size=size: struct.pack("<Q", size) + raw[8:] for size in (2**63, 2**40, 200_000_000, 5)),
]


def test_a_file_is_what_the_format_says(good: Path, tmp_path: Path) -> None:
    header, data = take_apart(good / WEIGHTS)
    metadata = header.pop("__metadata__")
    assert metadata["binarize_packed"] == "2"
    assert json.loads(metadata["config"]) == json.loads((good / CONFIG).read_text())
    model = binarize.load(good)
    codes = binarize.binary_state(model)["middle.0.conv1"].codes
    begin, end = header[BITS]["data_offsets"]
    assert (header[BITS]["dtype"], header[BITS]["shape"]) == ("U8", [1, 32 * 32 * 9 // 8])
    assert data[begin:end] == np.packbits(codes.numpy() > 0).tobytes()  # dense, the most significant bit first
    latent = {f"{name.removesuffix('.bits')}.weight" for name in header if name.endswith(".bits")}
    assert latent
    assert not latent & header.keys()
    assert set(load_file(good / WEIGHTS)) == set(model.state_dict())  # read without this package
    assert len(data) == binarize.summary(model).bytes
    assert (good / WEIGHTS).stat().st_size < len(data) + 120 * len(header) + 4096
    binarize.save(model, tmp_path)  # the same model gives the same file
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / name).read_bytes() == (good / name).read_bytes()


@pytest.mark.slow
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


def test_every_flipped_byte_of_the_tensors_is_found(folder: Path) -> None:
    path = folder / WEIGHTS
    size, data = path.stat().st_size, len(take_apart(path)[1])
    for position in (size - data, size - data // 2, size - data // 3, size - 1):
        flip(path, position)
        refused(folder, "is damaged: its content does not have the digest in its header")
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


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_of_another_length_is_refused(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    (folder / WEIGHTS).write_bytes(damage((folder / WEIGHTS).read_bytes()))
    refused(folder, "cannot be read as a safetensors file")


@pytest.mark.parametrize("version", ["4", "0", "", "one"])
def test_another_version_is_refused(folder: Path, version: str) -> None:
    change_header(folder / WEIGHTS, lambda h: h["__metadata__"].update(binarize_packed=version))
    refused(folder, f"has packed format '{version}'; this version of binarize reads 1 to 3")


def describe_floats(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    del config["conversion"]["packed"]
    (folder / CONFIG).write_text(json.dumps(config))


def save_foreign(folder: Path) -> None:
    save_file({"weight": torch.zeros(3)}, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / WEIGHTS).unlink(), "cannot be read as a safetensors file"),
        (save_foreign, r"holds no packed model; binarize\.pack makes one"),
        (describe_floats, r"weights and config\.json do not belong together"),
    ],
)
def test_a_folder_without_its_packed_file_is_refused(folder: Path, change: Any, message: str) -> None:
    change(folder)
    for read in (binarize.load, SRUNet.from_pretrained):
        assert_error(message, read, folder)


def test_another_class_is_refused(folder: Path) -> None:
    packed_files.change_config(folder / WEIGHTS, lambda config: config.update(_class_name="UNet2DModel"))
    assert_error("holds a UNet2DModel, not an SRUNet", SRUNet.from_pretrained, folder / WEIGHTS)
    for given in (folder, folder / WEIGHTS):
        assert_error("has binarize_format None; this version reads 1", binarize.load, given)


def test_a_changed_configuration_is_noticed(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    assert data.count(b'\\"dropout\\": 0.2') == 1
    (folder / WEIGHTS).write_bytes(data.replace(b'\\"dropout\\": 0.2', b'\\"dropout\\": 0.3'))
    assert_error("is damaged", binarize.load, folder / WEIGHTS)


def plain(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.Conv2d(width, width, 3), nn.Conv2d(width, 3, 3))


def test_a_host_that_does_not_fit_stays_as_it_was(tmp_path: Path) -> None:
    binarize.save(binarize.pack(binarize.convert(plain(), "bbcu")), tmp_path)
    other = plain(16)
    before = {name: (id(p), p.clone()) for name, p in other.named_parameters()}
    with pytest.raises(BinarizeError, match=r"do not fit its configuration: \d+ of another shape or dtype, such as"):
        binarize.load(tmp_path, model=other)
    flip(tmp_path / HOST_WEIGHTS, -1)
    host = plain()
    assert_error("is damaged", binarize.load, tmp_path, model=host)
    for model in (other, host):
        assert [type(layer) for layer in model] == [nn.Conv2d] * 3
    assert all(id(p) == before[name][0] and torch.equal(p, before[name][1]) for name, p in other.named_parameters())
    assert_error("which only its own code can build", binarize.load, tmp_path)


@pytest.mark.parametrize("failing", ["write", "rename"])
def test_a_failing_write_leaves_the_earlier_model(good: Path, tmp_path: Path, failing: str, monkeypatch: Any) -> None:
    binarize.convert(SRUNet(**SMALL), "bbcu").save_pretrained(tmp_path)
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
            assert_error(r"cannot be written: .*No space left on device", write, tmp_path)
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
