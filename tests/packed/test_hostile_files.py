"""Files made to do harm: one clear error each, before anything large is made, imported or called."""

import importlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import packed_files
import pytest
from errors_case import assert_error
from packed_case import SMALL
from packed_files import BITS, CONFIG, HOST_WEIGHTS, WEIGHTS, change_config
from torch import Tensor, nn

import binarize
from binarize.models import SRUNet

UNREADABLE = "cannot be read as a safetensors file"


def entry(shape: list[int], dtype: str = "F32", offsets: tuple[int, int] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets or (0, 0))}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        *[
            (change, UNREADABLE)
            for change in (
                lambda h: h["conv_in.bias"].update(shape=[2**40]),  # more than its bytes
                lambda h: h["conv_in.bias"].update(shape=[2**62, 2**62]),  # more than an integer holds
                lambda h: h["conv_in.bias"].update(shape=[-1]),
                lambda h: h["conv_in.bias"].update(data_offsets=[0, 2**50]),
                lambda h: h["conv_in.bias"].update(data_offsets=[64, 0]),
                lambda h: h["conv_in.bias"].update(data_offsets=h[BITS]["data_offsets"]),
                lambda h: h["conv_in.bias"].update(dtype="F3"),
                lambda h: h.update(extra=entry([4], offsets=(0, 16))),  # over another's bytes
                lambda h: h.pop("conv_in.bias"),  # bytes that belong to no tensor
            )
        ],
        (lambda h: h["conv_in.bias"].update(shape=[4, 4]), r"1 of another shape or dtype, such as conv_in\.bias "),
        (lambda h: h["conv_in.bias"].update(dtype="I32"), r"conv_in\.bias \(I32 \(16,\) for F32 \(16,\)\)"),
        (lambda h: h["conv_in.bias"].update(dtype="F16", shape=[32]), r"conv_in\.bias \(F16 \(32,\) for F32"),
        (lambda h: h[BITS].update(dtype="I8"), r"conv1\.bits \(I8 \(1, 1152\) for U8 \(1, 1152\)\)"),
        (lambda h: h[BITS].update(dtype="F32", shape=[1, 288]), r"conv1\.bits \(F32 \(1, 288\) for U8"),
        (lambda h: h[BITS].update(shape=[1152]), r"conv1\.bits \(U8 \(1152,\) for U8"),
        (lambda h: h.update(other=h.pop(BITS)), r"1 missing, such as middle\.0\.conv1\.bits; 1 unexpected, such as o"),
        (lambda h: h.update(extra=entry([0])), "1 unexpected, such as extra"),
        (lambda h: h["__metadata__"].pop("binarize_sha256"), "is damaged"),
        (lambda h: h["__metadata__"].update(binarize_sha256="1" * 64), "is damaged"),
        (lambda h: h["__metadata__"].pop("config"), "its configuration is not valid JSON"),
        (lambda h: h["__metadata__"].update(config="{"), "its configuration is not valid JSON"),
        (lambda h: h["__metadata__"].update(config="[" * 100_000), "its configuration is not valid JSON"),
        (lambda h: h["__metadata__"].update(config='{"a": ' + "9" * 5000 + "}"), "its configuration is not valid JSON"),
        (lambda h: h["__metadata__"].update(config="[1]"), "must be a JSON object; got list"),
        (lambda h: h["__metadata__"].update(config='"SRUNet"'), "must be a JSON object; got str"),
    ],
)
def test_tensors_and_configuration_have_to_fit(folder: Path, change: Any, message: str) -> None:
    packed_files.change_header(folder / WEIGHTS, change)
    packed_files.refused(folder, message)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # What the file has no tensors for is found in the header ...
        ({"base_channels": 2**20}, r"do not fit its configuration: \d+ of another shape"),
        ({"channel_mults": [1, 2, 4, 8, 16, 32, 64]}, r"do not fit its configuration: \d+ missing"),
        ({"in_channels": 10**9}, "do not fit its configuration: 1 of another shape"),
        # ... and what no tensor can be is not built.
        ({"base_channels": 2**40}, "its configuration builds no SRUNet: Storage size calculation overflowed"),
        ({"base_channels": 10**18}, "its configuration builds no SRUNet"),
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
        ({"conversion": None}, "do not fit its configuration: 24 missing|is damaged"),
        ({"conversion": {"format": 1, "packed": 1, "method": {"name": "bidiffsr", "groups": 10**9}}},
         "num_train_timesteps|do not fit its configuration"),
        ({"conversion": {"format": 1, "packed": 7, "method": {"name": "bidiffsr"}}},
         "has packed format 7; this version of binarize reads 1 to 3"),
        ({"conversion": {"format": 1, "packed": 1, "method": {"name": "future"}}}, "unknown method 'future'"),
    ],
)  # fmt: skip
def test_a_configuration_of_something_else_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    change_config(folder / WEIGHTS, lambda config: config.update(changes))
    packed_files.refused(folder, message)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
@pytest.mark.parametrize("changes", [{"base_channels": 0}, {"norm_groups": 0}, {"num_train_timesteps": float("inf")}])
def test_a_configuration_that_no_arithmetic_survives_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    change_config(folder / WEIGHTS, lambda config: config.update(changes))
    packed_files.refused(folder, "does not hold a readable SRUNet|builds no SRUNet|SRUNet: ", everywhere=False)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "5"], ids=range(4))
def test_a_broken_config_json_is_refused(folder: Path, text: str) -> None:
    (folder / CONFIG).write_text(text)
    assert_error("must be a JSON object; got int" if text == "5" else "is not valid JSON", binarize.load, folder)


@pytest.mark.slow
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
        ({"class": "StableDiffusionPipeline"}, "names 'StableDiffusionPipeline', which is not a diffusers model"),
        ({"class": None}, "names None, which is not a diffusers model"),
        ({"library": "os"}, "which only its own code can build"),
    ],
)
def test_a_configuration_of_another_host_is_refused(good_host, tmp_path, changes, message):
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
        assert_error(message, binarize.load, given)


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
    header, _ = packed_files.take_apart(good / WEIGHTS)
    size = 2**43
    hole = {"__metadata__": header["__metadata__"], "conv_in.bias": entry([size], "U8", (0, size))}
    packed_files.put_together(paths[-1], hole, b"")
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


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"name": "pydoc:pipepager", "cmd": "touch {mark}"}, "post part 'pydoc:pipepager', and a file may not"),
        ({"name": "{module}:nothing"}, r"Import touched_by_import first"),
        ({"name": "os:system"}, "names the post part 'os:system'"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_file_has_nothing_imported_and_no_function_called(part, words, packed, tmp_path, monkeypatch):
    mark = tmp_path / "mark"
    (tmp_path / "touched_by_import.py").write_text(f"open({str(mark)!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("pydoc")
    network = binarize.convert(SRUNet(**SMALL), "bidiffsr")
    binarize.save(binarize.pack(network) if packed else network, tmp_path / "model")
    hostile = {key: text.format(mark=mark, module="touched_by_import") for key, text in part.items()}
    described = tmp_path / "model" / CONFIG
    config = json.loads(described.read_text())
    config["conversion"]["method"]["post"] = hostile
    described.write_text(json.dumps(config))
    if packed:  # which keeps its own
        change_config(tmp_path / "model" / WEIGHTS, lambda config: config["conversion"]["method"].update(post=hostile))
    for read in (binarize.load, SRUNet.from_pretrained):
        assert_error(words, read, tmp_path / "model")
    assert not mark.exists()
    assert "touched_by_import" not in sys.modules


class Half(nn.Module):
    """A part of this module, which the program has imported."""

    def __init__(self, spec: Any) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def test_a_class_that_the_program_has_imported_is_found_again(tmp_path: Path) -> None:
    network = SRUNet(**SMALL)
    binarize.convert(network, "bidiffsr", overrides={"middle.*": {"post": f"{__name__}:Half"}})
    binarize.save(network, tmp_path / "model")
    assert any(type(module).__name__ == "Half" for module in binarize.load(tmp_path / "model").modules())
