"""`binarize generate`, `binarize pack` and `binarize summary` of models that generate images."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_case import WEIGHTS, edit_json, fails, pixels, succeeds
from diffusers import DDIMScheduler, UNet2DModel
from generation_case import CLASSES, CONDITIONAL, tiny, write_images

import binarize
from binarize.errors import BinarizeError
from binarize.models import GenerationPipeline
from binarize.training import train


def trained(folder: Path, *overrides: str) -> Path:
    """Return the folder of a run with two classes."""
    recipe = tiny(write_images(folder / "images"), folder / "run", CONDITIONAL, "max_train_steps=1", *overrides)
    return train(recipe, progress=False).output_dir


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in full precision, where rounding flips no sign."""
    return trained(tmp_path_factory.mktemp("generators"), "method=null", "structure=auto")


def test_a_grid_holds_the_images_of_a_folder(generator: Path, tmp_path: Path) -> None:
    options = ("--model", str(generator), "--seed", "5", "--steps", "3", "--no-pack")
    succeeds("generate", str(tmp_path / "grid.png"), *options, "-n", "5")
    out = succeeds("generate", str(tmp_path / "each"), *options, "-n", "5", "--batch-size", "2")
    assert "5 images, " in out
    grid, each = pixels(tmp_path / "grid.png"), [pixels(tmp_path / "each" / f"{i}.png") for i in range(5)]
    assert grid.shape == (18, 28)  # three columns
    for number, image in enumerate(each):
        row, column = divmod(number, 3)
        assert abs(grid[10 * row : 10 * row + 8, 10 * column : 10 * column + 8] - image).max() <= 1
    succeeds("generate", str(tmp_path / "dots.png"), *options, "--class", "dots", "-n", "1")
    second = ("--seed", "6", "--steps", "3", "-n", "1", "--class", CLASSES[1])
    succeeds("generate", str(tmp_path / "second"), "--model", str(generator), *second)
    assert abs(pixels(tmp_path / "second" / "0.png") - each[1]).max() <= 1  # one more seed, the second class
    assert abs(pixels(tmp_path / "dots.png") - each[0]).max() > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--class", "bar"), "unknown class 'bar'; classes: bars, dots. Did you mean 'bars'?"),
        (("--steps", "2000"), "num_inference_steps=2000"),
        (("--columns", "2"), "is a folder for single images"),
    ],
)
def test_wrong_options_are_named(options: tuple[str, ...], message: str, generator: Path, tmp_path: Path) -> None:
    for target in [tmp_path / "out"] if "--columns" in options else [tmp_path / "out", tmp_path / "out.png"]:
        assert message in fails("generate", str(target), "--model", str(generator), *options)
        assert not target.exists()


def test_an_unknown_suffix_is_no_folder(generator: Path, tmp_path: Path) -> None:
    assert "cannot write images with the suffix '.tga'" in fails("generate", tmp_path / "a.tga", "--model", generator)
    assert not (tmp_path / "a.tga").exists()


def test_half_precision_that_cannot_hold_a_weight_is_refused(generator: Path, tmp_path: Path) -> None:
    pipe = GenerationPipeline.from_pretrained(generator / "model")
    pipe.unet = binarize.convert(pipe.unet, "bnn")
    with torch.no_grad():
        pipe.unet.conv_in.weight[0, 0, 0, 0] = 1e6
    pipe.save_pretrained(tmp_path / "large")
    message = fails("pack", tmp_path / "large", tmp_path / "packed", "--dtype", "float16")
    assert "conv_in.weight has values up to 1e+06, which float16 cannot hold" in message
    assert not (tmp_path / "packed").exists()


def test_a_model_that_upscales_is_named(model: Path, tmp_path: Path) -> None:
    message = fails("generate", tmp_path / "a.png", "--model", model)
    assert "upscales images; use `binarize upscale`." in message


@pytest.mark.parametrize("size", [None, 0, "x", [8], [8, 8, 8], 2**40, 8.5])
def test_a_wrong_size_in_the_configuration_is_named(generator: Path, tmp_path: Path, size: object) -> None:
    own = shutil.copytree(generator / "model", tmp_path / "own")
    edit_json(own / "unet" / "config.json", sample_size=size)
    assert "sample_size" in fails("generate", tmp_path / "a.png", "--model", own, "--steps", "1", "-n", "1")


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        (None, ["a", "b"], "the network has no classes, but the pipeline has 2"),
        (3, None, "the network has classes; name them"),
        (3, ["a", "b", "c", "d"], "the network has 3 labels, but the pipeline has 4 classes"),
        (3, [], "the network has 3 labels, but the pipeline has 0 classes"),
    ],
)
def test_classes_that_the_network_does_not_have_are_named(labels, classes, message) -> None:
    network = UNet2DModel(sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",),
                          up_block_types=("UpBlock2D",), num_class_embeds=labels)  # fmt: skip
    with pytest.raises(BinarizeError, match=message):
        GenerationPipeline(network, DDIMScheduler(), classes=classes)


def test_labels_and_generators_of_other_types(generator: Path) -> None:
    pipe = GenerationPipeline.from_pretrained(generator / "model")
    options = {"num_inference_steps": 1, "output_type": "np"}
    assert pipe(1, class_labels=np.int64(1), **options).images.shape[0] == 1
    with pytest.raises(BinarizeError, match=r"generator holds 1; allowed: None, a torch.Generator"):
        pipe(2, generator=[1, 2], **options)


def test_existing_files_are_kept(generator: Path, tmp_path: Path) -> None:
    (tmp_path / "out.png").write_text("mine")
    assert "already exists" in fails("generate", str(tmp_path / "out.png"), "--model", str(generator))


@pytest.mark.slow
def test_a_packed_generator_draws_the_same(tmp_path: Path) -> None:
    binary = trained(tmp_path)
    assert "binarize generate OUT" in succeeds("pack", binary, tmp_path / "packed")
    succeeds("pack", binary, tmp_path / "half", "--dtype", "float16")
    sizes = [(tmp_path / name / "unet" / WEIGHTS).stat().st_size for name in ("packed", "half")]
    assert sizes[1] < 0.7 * sizes[0]
    succeeds("generate", tmp_path / "half.png", "--model", tmp_path / "half", "-n", "1")
    for name, source in (("one", binary), ("two", tmp_path / "packed")):
        succeeds("generate", tmp_path / f"{name}.png", "--model", source, "-n", "2", "--steps", "2")
    assert abs(pixels(tmp_path / "one.png") - pixels(tmp_path / "two.png")).mean() < 2
    assert "generates images; leave it out" in fails("pack", binary, tmp_path / "again", "--scale", "2")
    assert "1x1x8x8" in succeeds("summary", binary)
    assert "1x1x16x16" in succeeds("summary", binary, "--size", "16x16")


def test_a_generator_is_measured(generator: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    options = ("--data", generator.parent / "images", "--steps", "2")
    out = succeeds("evaluate", generator, *options, "-n", "8", "--output", tmp_path / "out")
    assert "8 images in 2 steps against 12, by pixels" in out
    assert (tmp_path / "out" / "nearest.png").is_file()
    assert "--tile: " in fails("evaluate", generator, *options, "--tile", "8")
