"""The packed file: bits, full-precision tensors and everything needed to rebuild the network, in safetensors.

The file's metadata hold ``binarize_packed`` (the format's version), ``config`` (JSON: the host and its conversion) and
the digest of the whole file, see `binarize.digests`. In version 1 it was ``sha256``, of the configuration's text and
the tensors' bytes alone. A binary layer NAME has ``NAME.bits`` (uint8, dense, see `binarize.kernels.bitpack`) and,
where its method has scales, ``NAME.scales``; everything else has the names that it has in the unpacked model.

Reading checks the header, every name, shape and dtype against the network that the configuration describes, and the
digest, before the first tensor is made.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from binarize.digests import check_sealed, chunks, damaged, header_size, seal, sealed_header
from binarize.errors import BinarizeError, one_line
from binarize.files import write_atomic
from binarize.json_files import parse_json, read_json
from binarize.modules import aligned
from binarize.packed.int8 import has_int8_weights, writing
from binarize.packed.layers import freeze

PACKED_FORMAT, INT8_FORMAT, READABLE_FORMATS = 2, 3, (1, 2, 3)  # 3: with weights in 8 bits
VERSION, CONFIG = "binarize_packed", "config"
WEIGHTS = "diffusion_pytorch_model.safetensors"
_HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download")
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_UNREADABLE = (OSError, SafetensorError, MemoryError, RuntimeError)  # the last two: larger than what can be mapped
_HALVES = (torch.float16, torch.bfloat16)


def write_packed(model: nn.Module, path: Path, config: Mapping[str, Any], dtype: torch.dtype | None = None) -> None:
    """Write the weights of a packed model; an earlier file is replaced in one step.

    ``config`` describes the host and its conversion, fit for JSON. Full-precision tensors are stored as ``dtype``, or
    as what they are if it is None.
    """
    if dtype is not None and dtype not in _FLOATS.values():
        allowed = ", ".join(str(d).removeprefix("torch.") for d in _FLOATS.values())
        raise BinarizeError(f"a packed file stores full-precision tensors as {allowed}; got {dtype}.")
    config = {key: value for key, value in config.items() if key != "_name_or_path"}  # where it was loaded from
    # A tied tensor is the same object under each of its names, and is stored under the first.
    first: dict[int, tuple[str, Tensor]] = {}
    with writing():
        held = model.state_dict(keep_vars=True)
    for name, value in held.items():
        first.setdefault(id(value), (name, value))
    state = {name: stored_as(name, value.detach(), dtype).cpu().contiguous() for name, value in first.values()}
    plain = memoryview(serialize(state))
    start = 8 + header_size(plain[:8])
    version = INT8_FORMAT if any(map(has_int8_weights, model.modules())) else PACKED_FORMAT
    metadata = {"format": "pt", VERSION: str(version), CONFIG: json.dumps(config)}
    header = sealed_header(metadata, json.loads(bytes(plain[8:start])), [plain[start:]])
    data = b"".join([header, plain[start:]])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda temporary: temporary.write_bytes(data), force=True)


def stored_as(name: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a tensor in the dtype of a file; raise BinarizeError if it cannot hold the values. None: as it is."""
    if dtype is None or not value.is_floating_point():
        return value
    stored = value.to(dtype)
    if bool((value.isfinite() & ~stored.isfinite()).any()):
        code = str(dtype).removeprefix("torch.")
        raise BinarizeError(
            f"{name} has values up to {value.abs().max().item():.3g}, which {code} cannot hold (its largest is "
            f"{torch.finfo(dtype).max:.3g}); store it as bfloat16, or leave dtype out."
        )
    return stored


def read_config(path: Path) -> dict[str, Any]:
    """Return the configuration in a packed file."""
    return parse_json(_metadata(path).get(CONFIG, ""), f"{path}: its configuration")


def check_same_config(config: Mapping[str, Any], path: Path) -> None:
    """Raise BinarizeError if the content of a ``config.json`` differs from what the packed file beside it says."""
    if found := config_differences(config, read_config(path)):
        beside, what = path.with_name("config.json"), f"the configuration in {path.name}: {'; '.join(found[:3])}"
        fix = "The packed file's is its own: copy both files again, or change the model before it is packed."
        raise BinarizeError(f"{beside}: differs from {what}. {fix}")


def config_differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Return how a ``config.json`` (there) differs from the configuration in the packed file (here)."""
    keys = sorted(key for key in there.keys() | here.keys() if not key.startswith("_"))
    pairs = [(key, there.get(key), here.get(key)) for key in keys]
    return [f"{key} is {one!r:.60} there, {other!r:.60} in the file" for key, one, other in pairs if one != other]


def count_tensors(path: Path) -> int:
    """Return how many tensors a packed file holds."""
    _metadata(path)
    with safe_open(path, framework="pt") as file:
        return len(file.keys())


def find_packed(name: str | PathLike[str], options: Mapping[str, Any]) -> Path | None:
    """Return the packed file that ``from_pretrained(name, **options)`` means, or None if it is no packed model.

    ``name`` is a file, a folder, or a repository on the Hugging Face hub; ``options`` are diffusers' own.
    """
    path, subfolder = Path(name), options.get("subfolder") or ""
    if path.is_file():  # diffusers loads no single files, so that reading it says what is wrong with it
        return path if path.suffix == ".safetensors" or is_packed_file(path) else None
    if path.is_dir():
        folder = path / subfolder
        config = _packed_config(folder / "config.json")
        if config is None:
            return None
        check_same_config(config, folder / WEIGHTS)
        return folder / WEIGHTS
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    given = {key: options[key] for key in _HUB_OPTIONS if options.get(key) is not None}
    try:  # not there, not reachable, not packed: diffusers' own loading says what is wrong
        if _packed_config(Path(hf_hub_download(str(name), "config.json", subfolder=subfolder, **given))) is None:
            return None
        return Path(hf_hub_download(str(name), WEIGHTS, subfolder=subfolder, **given))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError):
        return None


def _packed_config(path: Path) -> dict[str, Any] | None:
    """Return the content of a ``config.json`` that says that its network is packed, or None."""
    if not path.is_file():
        return None
    config = read_json(path)
    with suppress(TypeError):
        return config if "packed" in (config.get("conversion") or ()) else None
    return None


def seal_folder(folder: Path, variant: str | None = None) -> None:
    """Give the weights that diffusers saved in a folder their digests; ``variant`` is that of ``save_pretrained``."""
    for path in _weights(folder, variant):
        seal(path)


def check_folder(folder: Path, variant: str | None = None, *, own: bool) -> None:
    """Compare the weights that diffusers would load from a folder of this machine with their digests, if they have one.

    Files that cannot be opened are an error for networks of this package, and left to diffusers otherwise.
    """
    for path in _weights(folder, variant):
        try:
            with _opened(path) as file:
                metadata = file.metadata() or {}
        except BinarizeError:
            if own:
                raise
            return
        check_sealed(path, metadata)


def _weights(folder: Path, variant: str | None) -> list[Path]:
    stem = "diffusion_pytorch_model" + ("" if variant is None else f".{variant}")
    shard = re.compile(re.escape(stem) + r"(-\d{5}-of-\d{5})?\.safetensors")
    return sorted(path for path in folder.glob("*.safetensors") if shard.fullmatch(path.name))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        file = safe_open(path, framework="pt")
    except _UNREADABLE as error:
        raise BinarizeError(f"{path}: cannot be read as a safetensors file: {one_line(error)}") from error
    with file as opened:
        yield opened


def is_packed_file(path: Path) -> bool:
    """Say whether a file is a safetensors file that says it holds a packed model."""
    try:
        with safe_open(path, framework="pt") as file:
            return VERSION in (file.metadata() or {})
    except _UNREADABLE:
        return False


def read_packed(
    model: nn.Module, path: Path, dtype: torch.dtype | None = None,
    unsaved: Callable[[], Mapping[str, Tensor]] | None = None,
) -> None:  # fmt: skip
    """Load the weights of a file into a packed model that was built on the meta device.

    Full-precision tensors become ``dtype``; None keeps what the file has, but half precision becomes float32.
    ``unsaved`` returns the host's buffers that no state dict holds, by name; it is called once the file has been
    checked, and only if there are such buffers.
    """
    metadata = _metadata(path)
    expected = model.state_dict(keep_vars=True)
    with safe_open(path, framework="pt") as file:
        held = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        shapes = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in held.items()}
        _check_fit(expected, shapes, path)
        _check_digest(path, metadata)
        state = {}
        for name in held:
            value = aligned(file.get_tensor(name))
            if value.is_floating_point():
                value = value.to(dtype or (torch.float32 if value.dtype in _HALVES else value.dtype))
            if isinstance(expected[name], nn.Parameter):  # of which loading makes no copy, so that ties hold
                value = nn.Parameter(value, requires_grad=False)
            state[name] = value
    for name, twin in _tied(expected, state).items():
        state[name] = state[twin]
    model.load_state_dict(state, strict=True, assign=True)
    for layer in filter(has_int8_weights, model.modules() if dtype is not None else ()):
        layer.to(dtype)
    if unsaved is not None and any(buffer.is_meta for buffer in model.buffers()):
        _fill(model, unsaved(), dtype)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise BinarizeError(f"{path}: has no value for {name}, which its network needs.")
    freeze(model)
    model.eval()


def _fill(model: nn.Module, buffers: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    for name, tensor in list(model.named_buffers(remove_duplicate=False)):
        given = buffers.get(name)
        if tensor.is_meta and given is not None and given.shape == tensor.shape:
            parent, _, attribute = name.rpartition(".")
            made = given.detach().clone()
            made = made.to(dtype) if dtype is not None and made.is_floating_point() else made
            model.get_submodule(parent)._buffers[attribute] = made


def _check_fit(expected: Mapping[str, Tensor], shapes: Mapping[str, tuple[tuple[int, ...], str]], path: Path) -> None:
    tied = {id(t) for name, t in expected.items() if name in shapes}
    missing = [name for name, tensor in expected.items() if name not in shapes and id(tensor) not in tied]
    unexpected = [name for name in shapes if name not in expected]
    wrong = []
    for name, (shape, dtype) in shapes.items():
        if name in expected:
            tensor, wanted, code = expected[name], tuple(expected[name].shape), _code(expected[name].dtype)
            if shape != wanted or not (dtype in _FLOATS if tensor.is_floating_point() else dtype == code):
                wrong.append(f"{name} ({dtype} {shape} for {code} {wanted})")
    if missing or unexpected or wrong:
        kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape or dtype", wrong))
        faults = "; ".join(f"{len(found)} {kind}, such as {found[0]}" for kind, found in kinds if found)
        raise BinarizeError(f"{path}: its tensors do not fit its configuration: {faults}.")


def _tied(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, str]:
    first = {id(expected[name]): name for name in state}
    return {name: first[id(t)] for name, t in expected.items() if name not in state and id(t) in first}


def _code(dtype: torch.dtype) -> str:
    codes = {torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64"}
    named = {**codes, torch.bool: "BOOL", **{d: name for name, d in _FLOATS.items()}}
    return named.get(dtype, str(dtype))


def _metadata(path: Path) -> dict[str, str]:
    with _opened(path) as file:
        metadata: dict[str, str] = dict(file.metadata() or {})
    version = metadata.get(VERSION)
    if version is None:
        raise BinarizeError(f"{path}: is a safetensors file, but holds no packed model; binarize.pack makes one.")
    if version not in map(str, READABLE_FORMATS):
        raise BinarizeError(
            f"{path}: has packed format {version!r}; this version of binarize reads 1 to 3; install a newer binarize, "
            "or save the model again with this one."
        )
    return metadata


def _check_digest(path: Path, metadata: Mapping[str, str]) -> None:
    if metadata[VERSION] != "1":
        if not check_sealed(path, metadata):
            raise damaged(path, "the digest in its header")
        return
    digest = hashlib.sha256(metadata.get(CONFIG, "").encode())
    with path.open("rb") as file:
        file.seek(8 + header_size(file.read(8)))
        for chunk in chunks(file):
            digest.update(chunk)
    if metadata.get("sha256") != digest.hexdigest():
        raise damaged(path, "the digest in its header")
