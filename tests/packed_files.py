"""Packed files taken apart, changed and put together again."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import binarize
from binarize.errors import BinarizeError
from binarize.models import SRUNet

WEIGHTS, HOST_WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "model.safetensors", "config.json"
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
    header, data = take_apart(path)
    config = json.loads(header["__metadata__"]["config"])
    change(config)
    header["__metadata__"]["config"] = json.dumps(config)
    put_together(path, header, data)
    if (path.parent / CONFIG).is_file():  # which must say the same
        (path.parent / CONFIG).write_text(json.dumps(config))


def flip(path: Path, position: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)


def refused(folder: Path, message: str, *, everywhere: bool = True) -> None:
    """Every way to read a file gives the same error, the file alone as well."""
    ways: list[Callable[[], Any]] = [lambda: binarize.load(folder), lambda: binarize.load(folder / WEIGHTS)]
    if everywhere:
        ways += [lambda: SRUNet.from_pretrained(folder), lambda: SRUNet.from_pretrained(folder / WEIGHTS)]
    for way in ways:
        with pytest.raises(BinarizeError, match=message):
            way()
