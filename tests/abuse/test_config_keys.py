"""Misspelt and unknown keys in the configurations of models."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMScheduler, UNet2DModel

import binarize
from binarize.errors import BinarizeError
from binarize.models import GenerationPipeline
from binarize.models.loading import load_generator, load_network, load_pipeline

FILES = ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json")


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = UNet2DModel(8, 1, 1, block_out_channels=(8,), norm_num_groups=4, down_block_types=["DownBlock2D"],
        up_block_types=["UpBlock2D"], layers_per_block=1)  # fmt: skip
    binarize.convert(network, "bnn", structure="keep")
    folder = tmp_path_factory.mktemp("generator")
    GenerationPipeline(network, DDIMScheduler(100)).save_pretrained(folder)
    return folder


def rename(path: Path, key: str, other: str) -> None:
    config = json.loads(path.read_text())
    path.write_text(json.dumps({other if name == key else name: value for name, value in config.items()}))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["model", "generator"])
def test_misspelt_keys_are_refused(kind: str, name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    whole: Path = request.getfixturevalue(kind)
    load = load_pipeline if kind == "model" else load_generator
    for key in json.loads((whole / name).read_text()):
        # `_class_name` and its like are diffusers', and without the record of a conversion the weights do not fit.
        if key.startswith("_") or key in ("conversion", "quantization_config"):
            continue
        own = shutil.copytree(whole, tmp_path / key)
        rename(own / name, key, key[:-2] + key[-1] if key[-2] != key[-1] else key[:-1])
        with pytest.raises(BinarizeError, match="Did you mean" if kind == "generator" else None):
            load(own)
        shutil.rmtree(own)


@pytest.mark.parametrize("load", [load_network, binarize.load])
def test_misspelt_keys_of_a_network_alone_are_refused(load: Any, model: Path, tmp_path: Path) -> None:
    own = shutil.copytree(model / "unet", tmp_path / "own")
    rename(own / "config.json", "num_train_timesteps", "num_train_timestep")
    with pytest.raises(BinarizeError, match="Did you mean 'num_train_timesteps'"):
        load(own)


def test_a_key_of_another_version_is_a_warning(
    generator: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = shutil.copytree(generator, tmp_path / "own")
    for name in FILES:
        path = own / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {f"of_the_future_{i}": 1 for i in range(9)}))
    # Keys of related schedulers are no mistake: pipelines exchange their schedulers.
    path = own / FILES[1]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"skip_prk_steps": True}))
    with caplog.at_level(logging.WARNING, "binarize"):
        load_generator(own)
    assert sorted(record.getMessage().partition(": ")[0] for record in caplog.records) == sorted(
        str(own / name) for name in FILES
    )
    assert all(len(record.getMessage()) < 300 + len(str(own)) for record in caplog.records)


def test_a_class_that_is_no_network_is_refused(generator: Path, tmp_path: Path) -> None:
    own = shutil.copytree(generator, tmp_path / "own")
    path = own / FILES[0]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"unet": ["builtins", "dict"]}))
    with pytest.raises(BinarizeError):
        GenerationPipeline.from_pretrained(own)
