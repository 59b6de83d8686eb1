"""Damaged and hostile model files: one error, or a network that gives a finite image."""

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from abuse_case import amount, assert_bounded, assert_refused, forked
from abuse_images import mutate
from cli_case import WEIGHTS, edit_json
from packed_files import put_together, take_apart

from binarize.digests import seal
from binarize.errors import BinarizeError
from binarize.models import SuperResolutionPipeline
from binarize.models.loading import load_pipeline

KINDS = ("model", "packed")
FILES = ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json")
ODD: tuple[Any, ...] = (None, "x", "", -1, 0, 2**70, 1.5, float("nan"), 1e400, [], [0], [[1]], {}, True, [1] * 100)


def damage(data: bytes, how: str, random: np.random.Generator) -> bytes:
    """Return a file as a bad disk or a broken copy leaves it."""
    at, size = int(random.integers(len(data))), int(random.integers(1, 64))
    if how == "bit":
        return data[:at] + bytes([data[at] ^ 1 << size % 8]) + data[at + 1 :]
    if how == "cut":
        return data[:at]
    if how == "zeros":
        return data[:at] + bytes(size) + data[at + size :]
    if how == "missing":
        return data[:at] + data[at + size :]
    return data[:at] + random.bytes(size) + data[at:]  # "longer"


@pytest.mark.parametrize("how", ["bit", "cut", "zeros", "missing", "longer"])
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_weights_are_refused(kind: str, how: str, request: Any, tmp_path: Path, record_property: Any) -> None:
    own = shutil.copytree(request.getfixturevalue(kind), tmp_path / "own")
    path, random, count = own / "unet" / WEIGHTS, np.random.default_rng(0), amount(0.5)
    whole = path.read_bytes()

    def load_all() -> None:
        for _ in range(count):
            data = damage(whole, how, random)
            if data == whole:  # zeros over zeros
                continue
            path.write_bytes(data)
            with pytest.raises(BinarizeError, match=WEIGHTS.replace(".", r"\.")):
                load_pipeline(own)

    record_property("cases", count)
    finish(load_all)


def use(folder: Path) -> bool:
    """Load and use a model; return whether it was refused."""
    try:
        pipe = load_pipeline(folder)
        image = pipe(torch.full((1, 3, 8, 8), 0.5), num_inference_steps=1, output_type="pt").images
    except BinarizeError as error:
        message = str(error)
    else:
        assert bool(image.isfinite().all())
        return False
    assert message.isprintable(), message
    assert len(message) < 2000, message
    return True


def finish(call: Callable[[], None]) -> None:
    result = forked(call)
    assert (result.status, result.out) == (0, ""), result
    assert_bounded(result)


def changed_headers(header: dict[str, Any], count: int) -> Iterator[dict[str, Any]]:
    """Headers of which an entry, a shape, a type or a part of the configuration was changed."""
    random = np.random.default_rng(1)
    names = sorted(name for name in header if name != "__metadata__")
    for _ in range(count):
        new = json.loads(json.dumps(header))
        one, other = (names[int(random.integers(len(names)))] for _ in range(2))
        kind = int(random.integers(6))
        if kind == 0:
            new[one], new[other] = new[other], new[one]
        elif kind == 1:
            new[one]["shape"] = [int(random.integers(-1, 2**20)) for _ in range(int(random.integers(5)))]
        elif kind == 2:
            new[one]["dtype"] = ("F64", "I64", "BF16", "U8", "BOOL", "F8_E4M3", "x")[int(random.integers(7))]
        elif kind == 3:
            new[one + "x"] = new.pop(one)
        elif kind == 4:
            new[one]["data_offsets"] = [int(random.integers(2**16)), int(random.integers(2**16))]
        else:
            text = bytearray(new["__metadata__"].get("config", "{}").encode())
            mutate(text, random)
            new["__metadata__"]["config"] = text.decode(errors="replace")
        yield new


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_headers_with_a_right_digest(kind: str, request: Any, tmp_path: Path, record_property: Any) -> None:
    own = shutil.copytree(request.getfixturevalue(kind), tmp_path / "own")
    path, count = own / "unet" / WEIGHTS, amount()
    header, data = take_apart(path)

    def use_all() -> None:
        for changed in changed_headers(header, count):
            put_together(path, changed, data)
            seal(path)
            use(own)

    record_property("cases", count)
    finish(use_all)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38, -3e38])
@pytest.mark.parametrize("kind", KINDS)
def test_values_that_no_arithmetic_survives(kind: str, value: float, request: Any, small: Path, tmp_path: Path) -> None:
    own = shutil.copytree(request.getfixturevalue(kind), tmp_path / "own")
    path = own / "unet" / WEIGHTS
    header, data = take_apart(path)
    start = header["conv_in.weight"]["data_offsets"][0]
    put_together(path, header, data[:start] + struct.pack("<f", value) + data[start + 4 :])
    seal(path)
    assert_refused(["upscale", small, tmp_path / "a.png", "--model", own, "--steps", "2"], tmp_path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", KINDS)
def test_values_of_json(kind: str, name: str, request: Any, tmp_path: Path, record_property: Any) -> None:
    own = shutil.copytree(request.getfixturevalue(kind), tmp_path / "own")
    good = json.loads((own / name).read_text())
    pairs = [(key, value) for key in good for value in (..., *ODD)]
    chosen = np.random.default_rng(0).permutation(len(pairs))[: amount(1.5)]

    def use_all() -> None:
        for number in chosen:
            key, value = pairs[number]
            config = {k: v for k, v in good.items() if k != key} | ({} if value is ... else {key: value})
            (own / name).write_text(json.dumps(config))
            use(own)

    record_property("cases", len(chosen))
    finish(use_all)


SCHEDULE = {
    "no JSON": "{", "a list": "[]", "another class's": '{"_class_name": "UNet2DModel"}',
    "beta_schedule": '{"beta_schedule": "liner", "num_train_timesteps": 2000}',
    "prediction_type": '{"prediction_type": "epsilom", "num_train_timesteps": 2000}',
    "timestep_spacing": '{"timestep_spacing": "x", "num_train_timesteps": 2000}',
    "betas": '{"trained_betas": [0.1], "num_train_timesteps": 2000}',
    "words": '{"beta_start": "small", "num_train_timesteps": 2000}',
    "null": '{"beta_end": null, "num_train_timesteps": 2000}',
    "a huge schedule": '{"num_train_timesteps": 2147483648}',
    "another schedule": '{"num_train_timesteps": 1000}',
}  # fmt: skip
INDEX: dict[str, Any] = {
    "no scheduler's class": {"scheduler": ["diffusers", "DDIMSheduler"]}, "no pair": {"scheduler": "DDIMScheduler"},
    "no network": {"unet": None}, "another network": {"unet": ["diffusers", "DDIMScheduler"]},
    "a function": {"scheduler": ["os", "system"]}, "words": {"scale": "two"}, "a negative scale": {"scale": -2},
}  # fmt: skip


@pytest.mark.parametrize("case", [*SCHEDULE, *INDEX])
def test_wrong_files_of_a_pipeline_in_python(model: Path, case: str, tmp_path: Path) -> None:
    own = shutil.copytree(model, tmp_path / "own")
    if case in SCHEDULE:
        (own / "scheduler" / "scheduler_config.json").write_text(SCHEDULE[case])
    else:
        edit_json(own / "model_index.json", **INDEX[case])
    with pytest.raises(BinarizeError):
        SuperResolutionPipeline.from_pretrained(own)
    (own / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(BinarizeError):
        SuperResolutionPipeline.from_pretrained(own)


@pytest.mark.parametrize("name", FILES)
def test_mutated_json(model: Path, name: str, tmp_path: Path, record_property: Any) -> None:
    own, random, count = shutil.copytree(model, tmp_path / "own"), np.random.default_rng(0), amount(0.5)
    whole = (own / name).read_bytes()

    def use_all() -> None:
        refused = 0
        for _ in range(count):
            data = bytearray(whole)
            mutate(data, random)
            (own / name).write_bytes(data)
            refused += use(own)
        assert refused > 0

    record_property("cases", count)
    finish(use_all)
