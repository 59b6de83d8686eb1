"""Recipes, JSON, options and checkpoints that are broken or made to do harm: one short error each, and nothing written.

The tables below are the cases of this file; each is run in this process, which has imported everything.
"""

import copy
import json
import pickle
import random
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from abuse_case import amount, sampled

from binarize.errors import MAX_LINES, MAX_WIDTH, BinarizeError
from binarize.json_files import parse_json, read_json
from binarize.models import load_official
from binarize.models.official import OFFICIAL_CONFIG
from binarize.recipes import load_recipe, recipe_path, validate
from binarize.recipes.yaml_text import parse_yaml
from binarize.studies.schema import load_study
from binarize.training import Checkpoints
from binarize.training.checkpoint_state import read_state

_NAMES = "bcdefghijklm"
ALIASES = "a: &a [x, x]\n" + "\n".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in zip("a" + _NAMES, _NAMES, strict=False)
)
YAML = {
    "a list as a key": "? [1, 2]\n: 3",
    "a mapping as a key": "{? {a: 1} : 2}",
    "a tag of a number": "scale: !!int abc",
    "a tag of a float": "scale: !!float abc",
    "a tag of bytes": "scale: !!binary '***'",
    "a tag of a time": "scale: !!timestamp 2020-99-99",
    "a tag of Python": "scale: !!python/object/apply:os.system ['true']",
    "a tag of its own": "scale: !x 1",
    "an anchor of itself": "a: &a [*a]",
    "aliases of aliases": ALIASES,
    "a merge": "a: &a {x: 1}\nb:\n  <<: *a",
    "brackets": "a: " + "[" * 500 + "]" * 500,
    "braces": "{a: " * 500 + "1" + "}" * 500,
    "levels": "\n".join(f"{' ' * i}a:" for i in range(500)),
    "digits": "scale: " + "9" * 5000,
    "digits of a key": "9" * 5000 + ": 1",
    "a large file": "# " + "x" * 2_000_000,
    "a long key": "k" * 100_000 + ": 1",
    "a long value": "scale: " + "v" * 100_000,
    "a thousand unknown keys": "\n".join(f"key{i}: 1" for i in range(1000)),
    "two documents": "scale: 2\n---\nscale: 4",
    "a control character": "scale: \x01",
    "a tab": "a:\n\t- 1",
    "an open quote": "scale: '2",
    "nothing": "",
    "a number": "5",
    "a list": "- 1",
    "a number as a key": "5: 1",
    "null as a key": "~: 1",
    "a repeated key": "scale: 2\nscale: 2",
    "infinity": "scale: .inf",
    "not a number": "learning_rate: .nan\nscale: 2",
    "more than a float holds": "learning_rate: 1e999\nscale: 2",
    "a null character in a path": "scale: 2\ntrain_data_dir: \"a\\0b\"",
    "an unknown user": "scale: 2\ntrain_data_dir: ~no-such-user-x/images",
    "an unknown variable": "scale: 2\noutput_dir: $NO_SUCH_VARIABLE_X/run",
    "an empty path": "scale: 2\noutput_dir: ''",
    "two billion timesteps": "scale: 2\nscheduler: {num_train_timesteps: 2147483648}",
}  # fmt: skip

JSON = {
    "brackets": "[" * 100_000,
    "levels": '{"a":' * 200 + "1" + "}" * 200,
    "digits": '{"a": ' + "9" * 5000 + "}",
    "a large file": '{"a": "' + "x" * 5_000_000 + '"}',
    "a repeated key": '{"a": 1, "a": 2}',
    "a repeated key inside": '{"b": {"a": 1, "a": 2}}',
    "a list": "[1]",
    "a string": '"SRUNet"',
    "null": "null",
    "nothing": "",
    "half": '{"a": 1',
    "a comment": "{} // x",
    "two": "{}{}",
    "a surrogate": '{"a": "\\ud800"',
}


def is_short(error: BaseException) -> None:
    lines = str(error).splitlines()
    assert 1 <= len(lines) <= MAX_LINES
    assert max(map(len, lines)) <= MAX_WIDTH + 200, lines  # and the path of the file


def refused(call: Callable[[], Any]) -> bool:
    """Call something that may raise a short BinarizeError, and nothing else."""
    try:
        call()
    except BinarizeError as error:
        is_short(error)
        return True
    return False


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KB


@pytest.mark.parametrize("name", YAML)
def test_yaml(name: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(YAML[name], encoding="utf-8")
    assert refused(lambda: load_recipe(path))
    assert refused(lambda: load_study(path))
    refused(lambda: load_recipe("small_x2", [f"description={YAML[name][:50_000]}"]))
    refused(lambda: load_recipe("small_x2", [YAML[name][:50_000].replace(": ", "=")]))


@pytest.mark.parametrize("key", ["in_channels", "out_channels", "base_channels"])
def test_more_channels_than_a_tensor_has(key: str) -> None:
    for channels in (2**62, 2**70):
        assert refused(lambda channels=channels: validate("small_x2", [f"model.{key}={channels}"]))


def test_a_chain_of_bases(tmp_path: Path) -> None:
    for number in range(3000):
        (tmp_path / f"r{number}.yaml").write_text(f"base: r{number + 1}.yaml\n")
    (tmp_path / "r3000.yaml").write_text("scale: 2\n")
    assert refused(lambda: load_recipe(tmp_path / "r0.yaml"))
    assert load_recipe(tmp_path / "r2990.yaml").scale == 2


@pytest.mark.parametrize("values", [10**4, 3000])
def test_a_grid_of_too_many_cells(values: int, pictures: Path, tmp_path: Path) -> None:
    grid = {"learning_rate": [1e-4 * n for n in range(1, values)], "seed_": list(range(values))}
    study = {"base": "small_x2", "grid": grid, "output_dir": str(tmp_path)}
    loaded, _ = load_study(study)
    assert refused(loaded.recipes)


@pytest.mark.parametrize("name", JSON)
def test_json(name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(JSON[name], encoding="utf-8")
    assert refused(lambda: read_json(path))
    assert refused(lambda: parse_json(JSON[name], "text"))


@pytest.mark.parametrize("reader", [read_json, load_recipe])
def test_what_is_no_file(reader: Callable[[Path], Any], tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "folder.yaml").mkdir()
    for name in ("pipe", "loop", "zero", "folder", "missing"):
        assert refused(lambda name=name: reader(tmp_path / f"{name}.yaml"))


def mutated(text: str, seed: int) -> str:
    """Return a text with a few characters removed, repeated, exchanged or replaced."""
    source, letters = random.Random(seed), list(text)
    for _ in range(source.randint(1, 4)):
        at = source.randrange(len(letters))
        match source.randrange(4):
            case 0:
                del letters[at : at + source.randint(1, 8)]
            case 1:
                letters[at:at] = letters[at : at + source.randint(1, 30)]
            case 2:
                letters[at] = source.choice("[]{}:,'\"-#&*!|>%@`\n\t 0189.eE\0\x7f\ufeffé")
            case _:
                other = source.randrange(len(letters))
                letters[at], letters[other] = letters[other], letters[at]
    return "".join(letters)


def test_mutated_recipes(tmp_path: Path, record_property: Any) -> None:
    count = amount(3)
    record_property("cases", count)
    text, path = load_recipe("bidiffsr_x2").to_yaml(), tmp_path / "mine.yaml"
    found = 0
    for seed in range(count):
        path.write_text(mutated(text, seed), encoding="utf-8")
        found += refused(lambda: load_recipe(path))
    assert found > count // 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.yaml"]


def test_mutated_yaml_and_json(record_property: Any) -> None:
    count = amount(6)
    record_property("cases", 2 * count)
    text = recipe_path("small_x2").read_text(encoding="utf-8")
    config = json.dumps({"a": [1, 2.5, None, "x"], "b": {"c": {"d": True}}, "e": "\u00e9"}, indent=1)
    for seed in range(count):
        refused(lambda seed=seed: parse_yaml(mutated(text, seed), "text"))
        refused(lambda seed=seed: parse_json(mutated(config, seed), "text"))


VALUES: tuple[Any, ...] = (None, "x", "", -1, 0, 2**70, 1.5, float("nan"), [], [0], ["x"], [[1]], {}, True, [1] * 100)


@pytest.mark.parametrize("key", OFFICIAL_CONFIG)
def test_configurations_of_released_checkpoints(key: str, tmp_path: Path, record_property: Any) -> None:
    record_property("cases", len(sampled(VALUES)))
    path = tmp_path / "a.pth"
    torch.save({"params": {"w": torch.zeros(1)}}, path)
    for value in sampled(VALUES):
        assert refused(lambda value=value: load_official(path, **{key: value}))


PARAMS: dict[str, Any] = {
    "a number as a name": {5: torch.zeros(1)}, "an empty name": {"": torch.zeros(1)},
    "a long name": {"a" * 100_000: torch.zeros(1)}, "no tensor": {"a": 5}, "nothing": {},
    "no mapping": [torch.zeros(1)],
    "a sparse tensor": {"a": torch.zeros(3).to_sparse()}, "a large view": {"a": torch.zeros(1).expand(2**40)},
    "whole numbers": {"downs.0.weight": torch.zeros(64, 6, 3, 3, dtype=torch.int64)},
    "complex numbers": {"downs.0.weight": torch.zeros(64, 6, 3, 3, dtype=torch.complex64)},
    "many tensors": {f"m{number}": torch.zeros(1) for number in range(5000)},
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMS)
def test_contents_of_released_checkpoints(name: str, tmp_path: Path) -> None:
    torch.save({"params": PARAMS[name]}, tmp_path / "a.pth")
    assert refused(lambda: load_official(tmp_path / "a.pth"))


def test_a_pickle_of_another_protocol_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"params": print}, protocol=4))
    assert refused(lambda: load_official(tmp_path / "a.pth"))  # where warnings are errors


STATE: dict[str, Any] = {
    "step": 3, "samples_per_step": 4, "model": {"w": torch.zeros(2)}, "optimizer": {}, "lr_scheduler": {}, "ema": None,
    "scaler": None, "validated": 3, "best": (3, 20.5), "images": {"a.png": "00"},
}  # fmt: skip


def test_checkpoints(tmp_path: Path, record_property: Any) -> None:
    values = (..., *sampled(VALUES))
    record_property("cases", len(STATE) * len(values) + 10)
    checkpoints = Checkpoints(tmp_path, None)
    folder = checkpoints.save(3, STATE, "scale: 2\n")
    assert read_state(folder)[0].best == (3, 20.5)
    for key in STATE:
        for value in values:
            state = copy.copy(STATE)
            if value is ...:
                del state[key]
            else:
                state[key] = value
            folder = checkpoints.save(3, state, "scale: 2\n")
            allowed = {"ema": (None, {}), "scaler": (None, {}), "best": (None,), "images": (None, {}, ...)}
            allowed |= {"step": (0, 2**70), "validated": (0, 2**70), "samples_per_step": (2**70,)}
            allowed |= dict.fromkeys(("model", "optimizer", "lr_scheduler"), ({},))
            fine = any(value is one or (type(value) is type(one) and value == one) for one in allowed.get(key, ()))
            assert refused(lambda folder=folder: read_state(folder)) != fine, (key, value)
    for state in (None, 5, [], "x", torch.zeros(3)):
        folder = checkpoints.save(3, state, "scale: 2\n")  # type: ignore[arg-type]
        assert refused(lambda folder=folder: read_state(folder))
    for recipe in ("", "- 1", "{", "5", "[" * 500):
        folder = checkpoints.save(3, STATE, recipe)
        assert refused(lambda folder=folder: read_state(folder))


def test_flipped_bits_and_cuts_of_checkpoints(tmp_path: Path, record_property: Any) -> None:
    folder = Checkpoints(tmp_path, None).save(3, STATE, "scale: 2\n")
    record_property("cases", 80 * len(list(folder.iterdir())) + 100)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for at in range(0, len(whole), max(1, len(whole) // 40)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            assert refused(lambda: read_state(folder)), (path.name, at)
            path.write_bytes(whole[:at])
            assert refused(lambda: read_state(folder)), (path.name, at)
        path.write_bytes(whole)
    read_state(folder)
    (folder / "SHA256SUMS").unlink()  # as version 0.1 wrote it: the zip file's own checksums are left
    path = folder / "state.pt"
    whole, found = path.read_bytes(), 0
    for at in range(0, len(whole), max(1, len(whole) // 100)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        found += refused(lambda: read_state(folder))
    assert found > 40
