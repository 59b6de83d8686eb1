"""Digests: a flipped bit of anything that this package writes is an error; files of version 1 and foreign ones load."""

import hashlib
import json
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from errors_case import assert_error
from hosts_zoo import unet2d
from packed_case import SMALL
from packed_files import BITS, CONFIG, HOST_WEIGHTS, WEIGHTS, change_header, flip, put_together, refused, take_apart
from safetensors.torch import load_file, save_file

import binarize
from binarize.digests import KEY, check_sums, check_torch_file, write_sums
from binarize.errors import BinarizeError
from binarize.models import SRUNet

MISFIT = "is damaged|do not fit|cannot be read"


def test_the_digest_is_that_of_the_whole_file(good: Path) -> None:
    raw = (good / WEIGHTS).read_bytes()
    digest = take_apart(good / WEIGHTS)[0]["__metadata__"][KEY]
    assert raw.count(digest.encode()) == 1
    assert hashlib.sha256(raw.replace(digest.encode(), b"0" * 64)).hexdigest() == digest


@pytest.mark.slow
def test_no_flipped_byte_of_a_header_gives_another_model(folder: Path) -> None:
    path, expected = folder / WEIGHTS, binarize.load(folder).state_dict()
    size = path.stat().st_size - len(take_apart(path)[1])
    for position in range(0, size, max(1, size // 200)):
        flip(path, position)
        with pytest.raises(BinarizeError):
            binarize.load(path)
        flip(path, position)
    assert all(torch.equal(value, expected[name]) for name, value in binarize.load(path).state_dict().items())


def swap(header: dict[str, Any], one: str, other: str) -> None:
    header[one], header[other] = header[other], header[one]


@pytest.mark.parametrize(
    "change",
    [
        lambda h: swap(h, BITS, BITS.replace("conv1", "conv2")),
        lambda h: swap(h, "middle.0.norm1.weight", "middle.0.norm2.weight"),
        lambda h: swap(h, "middle.0.norm1.weight", "middle.0.norm1.bias"),
        lambda h: h["__metadata__"].update(extra="1"),
        lambda h: h["__metadata__"].update(
            config=h["__metadata__"]["config"].replace('"norm_groups": 8', '"norm_groups": 4')
        ),
    ],
)
def test_a_header_that_was_changed_is_refused(change: Any, folder: Path) -> None:
    before = take_apart(folder / WEIGHTS)[0]
    change_header(folder / WEIGHTS, change)
    if take_apart(folder / WEIGHTS)[0] == before:
        pytest.skip("the small network has no such entry")
    refused(folder, "is damaged|differs from the configuration in")


def test_a_file_of_version_1_still_loads(folder: Path) -> None:
    expected = binarize.load(folder).state_dict()
    header, data = take_apart(folder / WEIGHTS)
    metadata = header["__metadata__"]
    del metadata[KEY]
    config = metadata["config"].replace('"packed": 2', '"packed": 1')
    metadata |= {"binarize_packed": "1", "config": config}
    metadata["sha256"] = hashlib.sha256(config.encode() + data).hexdigest()
    put_together(folder / WEIGHTS, header, data)
    (folder / CONFIG).write_text(config)
    for place in (folder, folder / WEIGHTS):
        found = binarize.load(place).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
    flip(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 1)
    refused(folder, "is damaged")


@pytest.mark.parametrize("hosted", [False, True])
def test_a_configuration_beside_a_packed_file_must_be_its_own(
    hosted: bool, good: Path, good_host: Path, tmp_path: Path
) -> None:
    for path in (good_host if hosted else good).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    described = json.loads((tmp_path / CONFIG).read_text())
    (described["host"]["config"] if hosted else described)["norm_num_groups" if hosted else "norm_groups"] = 2
    (tmp_path / CONFIG).write_text(json.dumps(described))
    assert_error(r"config\.json: differs from the configuration in .*(norm_groups|host) is", binarize.load, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("hosted", [False, True])
def test_latent_weights_have_a_digest_and_foreign_files_need_none(hosted: bool, tmp_path: Path) -> None:
    model = binarize.convert(unet2d((8, 16)) if hosted else SRUNet(**SMALL), "bidiffsr")
    folder, name = binarize.save(model, tmp_path / "model"), HOST_WEIGHTS if hosted else WEIGHTS
    expected = model.state_dict()
    path, size = folder / name, (folder / name).stat().st_size
    header = size - len(take_apart(path)[1])
    assert not [other for other in folder.iterdir() if other.name not in (name, CONFIG)]
    for position in [*range(0, header, header // 40), header, header + 3, size // 2, size - 1]:
        flip(path, position)
        try:
            found = binarize.load(folder).state_dict()
        except BinarizeError:
            pass
        else:  # the name of the digest was hit
            assert KEY not in take_apart(path)[0]["__metadata__"]
            assert all(torch.equal(value, expected[key]) for key, value in found.items())
        flip(path, position)
    save_file(load_file(path), path, metadata={"format": "pt"})  # as other programs write it
    assert KEY not in take_apart(path)[0]["__metadata__"]
    assert all(torch.equal(value, expected[key]) for key, value in binarize.load(folder).state_dict().items())


def test_a_pipeline_is_saved_with_a_digest(tmp_path: Path) -> None:
    from binarize.models import SuperResolutionPipeline

    pipe = SuperResolutionPipeline(SRUNet(**SMALL), scale=2)
    pipe.save_pretrained(tmp_path)
    path = tmp_path / "unet" / WEIGHTS
    SuperResolutionPipeline.from_pretrained(tmp_path)
    flip(path, path.stat().st_size - 100)
    with pytest.raises(BinarizeError, match="is damaged"):
        SuperResolutionPipeline.from_pretrained(tmp_path)


def test_flipped_bits_of_torch_files_are_found(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"params": {"w": torch.randn(50, 40), "v": torch.randn(7)}}, path)
    check_torch_file(path)
    size, expected = path.stat().st_size, torch.load(path)["params"]
    found = 0
    for position in range(0, size, size // 150):
        flip(path, position)
        try:
            check_torch_file(path)
            loaded = torch.load(path)["params"]
            assert all(torch.equal(loaded[name], expected[name]) for name in expected)  # padding, or a header's extra
        except (BinarizeError, RuntimeError, KeyError):
            found += 1
        flip(path, position)
    assert found > 100
    for content in (path.read_bytes()[: size // 2], b"PK\3\4", b""):
        (tmp_path / "b.pth").write_bytes(content)
        with suppress(BinarizeError):  # or it is no zip file at all, and torch says what is wrong
            check_torch_file(tmp_path / "b.pth")


def test_compressed_torch_files_are_refused(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data/0", b"\0" * 10_000_000)
    assert_error("has compressed parts", check_torch_file, tmp_path / "bomb.pth")


def test_sums_of_a_folder(tmp_path: Path) -> None:
    assert not check_sums(tmp_path, ["a"])
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    write_sums(tmp_path)
    sums = tmp_path / "SHA256SUMS"
    text = sums.read_text()
    assert text.splitlines()[0] == f"{hashlib.sha256(b'1').hexdigest()}  a"
    assert check_sums(tmp_path, ["a"])
    assert_error("must have the SHA-256 of c", check_sums, tmp_path, ["c"])
    for content in (text[:-9], text.replace("a", "\n"), "", "\xff", text.upper()):
        sums.write_text(content)
        assert_error("damaged|must have", check_sums, tmp_path, ["a", "b"])
    sums.write_text(text)
    (tmp_path / "b").write_text("3")
    assert_error(r"b: is damaged: .* SHA256SUMS", check_sums, tmp_path, ["a"])
    (tmp_path / "b").unlink()
    assert_error(r"b: is damaged", check_sums, tmp_path, ["a"])


def test_the_models_that_come_with_the_package_are_sound() -> None:
    from binarize.models.default import FOLDER

    for path in FOLDER.rglob("*.safetensors"):
        assert binarize.is_packed(binarize.load(path.parent))


def test_a_header_of_any_length_is_refused(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", struct.unpack("<Q", raw[:8])[0] - 8) + raw[8:])
    refused(folder, MISFIT)
