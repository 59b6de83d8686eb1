"""Generation as a task: its data, loss, validation, resuming, distillation, and the folder that it saves."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from errors_case import assert_error
from generation_case import CLASSES, CONDITIONAL, tiny, write_images
from PIL import Image
from training_case import RESUME, assert_same, weights

import binarize
from binarize.conversion.packing import is_packed
from binarize.models import GenerationPipeline
from binarize.models.loading import load_generator
from binarize.recipes import build_model, build_scheduler, load_recipe
from binarize.training import TrainResult, distill, train
from binarize.training.image_folder import LabelledImages
from binarize.training.objective import Objective
from binarize.trust import named_by_a_recipe

SCHEDULERS = [
    "DDPMScheduler",
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
]
DATA = {"resolution": 8, "channels": 1}


@pytest.fixture(scope="session")
def symbols(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("symbols"))


@pytest.fixture(scope="session")
def run(symbols: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """The run of the tiny recipe with classes."""
    output = tmp_path_factory.mktemp("generation") / "run"
    return train(tiny(symbols, output, CONDITIONAL, "checkpoints_total_limit=null"), progress=False)


def seeds(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def test_a_run_saves_a_grid_and_a_pipeline(run: TrainResult) -> None:
    assert (run.steps, run.validation, run.best) == (6, {}, None)
    assert not (run.output_dir / "best").exists()
    with Image.open(run.output_dir / "samples" / "step-0000006-samples.png") as grid:
        assert (grid.size, grid.mode) == ((18, 18), "L")  # two columns, one per class, with gaps
    pipe = load_generator(run.output_dir)
    assert (pipe.classes, pipe.image_shape, pipe.num_inference_steps) == (list(CLASSES), (1, 8, 8), 2)
    first = pipe(generator=seeds(4)).images
    with Image.open(run.output_dir / "samples" / "step-0000006-samples.png") as grid:
        np.testing.assert_array_equal(np.asarray(grid)[:8, :8], np.asarray(first[0]))
        np.testing.assert_array_equal(np.asarray(grid)[10:, 10:], np.asarray(first[3]))
    assert load_recipe(run.output_dir / "recipe.yaml") == tiny(
        Path(str(load_recipe(run.output_dir / "recipe.yaml").train_data_dir)),
        run.output_dir, CONDITIONAL, "checkpoints_total_limit=null",
    )  # fmt: skip


def test_a_resumed_run_equals_an_uninterrupted_one(run: TrainResult, symbols: Path, tmp_path: Path) -> None:
    shutil.copytree(run.output_dir / "checkpoint-3", tmp_path / "cut" / "checkpoint-3")
    resumed = train(tiny(symbols, tmp_path / "cut", CONDITIONAL, RESUME), progress=False)
    assert_same(resumed.checkpoint, run.checkpoint)
    Image.new("L", (8, 8), 9).save(symbols / "bars" / "new.png")
    try:
        again = tiny(symbols, tmp_path / "cut", CONDITIONAL, RESUME, "max_train_steps=8")
        assert_error("1 new, such as bars/new.png", train, again, progress=False)
    finally:
        (symbols / "bars" / "new.png").unlink()
    other = tiny(symbols, tmp_path / "cut", CONDITIONAL, RESUME, "class_dropout=0.2", "guidance_scale=2")
    assert_error(r"class_dropout: was 0\.1, is 0\.2\n", train, other, progress=False)


@pytest.mark.slow
def test_the_packed_pipeline_is_sampled_by_diffusers(symbols: Path, tmp_path: Path) -> None:
    result = train(tiny(symbols, tmp_path / "run", "max_train_steps=2"), progress=False)
    pipe = load_generator(result.model_dir)
    expected = pipe(2, num_inference_steps=5, generator=torch.Generator().manual_seed(3), output_type="pt").images
    binarize.pack(pipe.unet)
    pipe.save_pretrained(tmp_path / "packed")
    for cls in (diffusers.DDPMPipeline, diffusers.DDIMPipeline, GenerationPipeline):
        loaded: Any = cls.from_pretrained(tmp_path / "packed")
        assert is_packed(loaded.unet)
        loaded.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(3)
        images = loaded(
            2, num_inference_steps=5, generator=noise, output_type="pt" if cls is GenerationPipeline else "np"
        )
        found = torch.as_tensor(images.images)
        found = found if cls is GenerationPipeline else found.permute(0, 3, 1, 2)
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_objective_is_that_of_ddpm_for_any_scheduler(kind: str, scheduler: str) -> None:
    recipe = load_recipe("generation/digits", [f"scheduler.class={scheduler}", f"scheduler.prediction_type={kind}"])
    recipe = recipe.model_copy(update={"snr_gamma": None, "classes": CLASSES})
    a = torch.cumprod(1 - build_scheduler(recipe).betas.double(), 0)[[10, 700]].view(2, 1, 1, 1)
    clean, noise = torch.randn(2, 1, 8, 8).double(), torch.randn(2, 1, 8, 8).double()
    seen: dict[str, Any] = {}

    def model(noisy: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor) -> Any:
        seen.update(noisy=noisy, labels=class_labels)
        return SimpleNamespace(sample=torch.zeros_like(noisy))

    batch = {"image": clean, "noise": noise, "timestep": torch.tensor([10, 700]), "class_label": torch.tensor([1, 2])}
    losses = Objective(recipe, build_scheduler(recipe))(model, batch)
    torch.testing.assert_close(seen["noisy"], a.sqrt() * clean + (1 - a).sqrt() * noise, rtol=1e-4, atol=1e-4)
    target = {"epsilon": noise, "sample": clean, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * clean}[kind]
    torch.testing.assert_close(losses.total, target.square().mean((1, 2, 3)), rtol=1e-4, atol=1e-5)
    assert seen["labels"].tolist() == [1, 2]
    wrong = lambda noisy, *_, **__: SimpleNamespace(sample=noisy[:, :, :1])  # noqa: E731 -- it would broadcast
    assert_error("prediction has the shape", Objective(recipe, build_scheduler(recipe)), wrong, batch)


def test_images_are_functions_of_their_index(symbols: Path) -> None:
    options: dict[str, Any] = {**DATA, "classes": CLASSES, "class_dropout": 0.25, "seed": 3}
    images, again = (LabelledImages(symbols, **options) for _ in range(2))
    plain = LabelledImages(symbols, **{**options, "class_dropout": 0.0})
    items = [images[i] for i in range(600)]
    for i in (599, 0, 41):
        assert torch.equal(again[i]["image"], items[i]["image"])
        assert (again[i]["name"], again[i]["class_label"]) == (items[i]["name"], items[i]["class_label"])
    epochs = [Counter(item["name"] for item in items[at : at + 12]) for at in range(0, 600, 12)]
    assert set(map(len, epochs)) == {12}
    assert sum(item["class_label"] == 2 for item in items) / 600 == pytest.approx(0.25, abs=0.08)
    for i, item in enumerate(items[:100]):
        assert plain[i]["class_label"] == CLASSES.index(item["name"].partition("/")[0])
        source = np.asarray(Image.open(symbols / item["name"]))
        np.testing.assert_allclose(item["image"][0].numpy(), source / 127.5 - 1, atol=1e-6)
    assert "class_label" not in LabelledImages(symbols, **DATA)[0]


def test_large_images_are_resized_cropped_and_flipped(tmp_path: Path) -> None:
    ramp = np.repeat(np.linspace(0, 255, 48)[None, :, None], 16, axis=0).repeat(3, axis=2).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    middle = LabelledImages(tmp_path, resolution=8, channels=3)[0]["image"]
    assert middle.shape == (3, 8, 8)
    assert middle.mean().abs() < 0.02
    flipped = LabelledImages(tmp_path, resolution=8, channels=3, random_flip=True)
    rising = [float(flipped[i]["image"][0, 0].diff().mean()) > 0 for i in range(200)]
    assert sum(rising) / 200 == pytest.approx(0.5, abs=0.15)
    anywhere = LabelledImages(tmp_path, resolution=8, channels=3, center_crop=False)
    means = {round(float(anywhere[i]["image"].mean()), 2) for i in range(200)}
    assert len(means) == 17  # each place of 8 pixels in 24


def test_unusable_images_are_named(symbols: Path, tmp_path: Path) -> None:
    assert_error("there is no folder", LabelledImages, tmp_path / "no", **DATA)
    assert_error("holds no images", LabelledImages, tmp_path, **DATA)
    assert_error(
        "no sub-folder for the class 'stars'; it has bars, dots", LabelledImages, symbols, **DATA, classes=("stars",)
    )
    assert_error("1 or 3 channels, but the network has 4", LabelledImages, symbols, resolution=8, channels=4)
    shutil.copytree(symbols, tmp_path / "copy")
    Image.new("L", (7, 9)).save(tmp_path / "copy" / "bars" / "small.png")
    (tmp_path / "copy" / "dots" / "broken.png").write_bytes(b"\x89PNG")
    assert_error("2 images cannot be used: .*small.png: is 7x9 pixels", LabelledImages, tmp_path / "copy", **DATA)


@pytest.mark.slow
def test_a_run_starts_from_and_learns_from_a_twin(symbols: Path, tmp_path: Path) -> None:
    teacher = train(tiny(symbols, tmp_path / "teacher", CONDITIONAL, "method=null", "structure=auto"), progress=False)
    options = (CONDITIONAL, f"init_from={teacher.output_dir}", "max_train_steps=1")
    distilled = [f"distillation={{teacher: {teacher.output_dir}, features: 1}}"]
    result = train(tiny(symbols, tmp_path / "student", *options, *distilled), progress=False)
    assert result.history[0].parts.keys() == {"task", "output", "features"}
    first, name = weights(result.checkpoint), "down_blocks.0.resnets.0.conv1.weight"
    assert (first[name] - weights(teacher.checkpoint)[name]).abs().max() < 2e-3  # one step of 1e-3
    other = tiny(symbols, tmp_path / "other", *options, "model.block_out_channels=[8, 24]")
    assert_error("block_out_channels: .* 16.* there, .* 24.* here", train, other, progress=False)
    predicts = tiny(symbols, tmp_path / "other", CONDITIONAL, *distilled, "scheduler.prediction_type=epsilon")
    assert_error("was trained to predict something else", train, predicts, progress=False)


def test_stages_end_in_a_plain_network(symbols: Path, tmp_path: Path) -> None:
    options = ("method=reactnet", "two_stage=0.5", "progressive={blocks: [down_blocks, up_blocks]}", "use_ema=true")
    result = train(tiny(symbols, tmp_path / "run", *options), progress=False)
    unet = load_generator(result.model_dir).unet
    assert unet.state_dict().keys() == build_model(tiny(symbols, tmp_path, "method=reactnet")).state_dict().keys()


@pytest.mark.slow
def test_networks_of_every_source(symbols: Path, run: TrainResult, tmp_path: Path) -> None:
    code = "from diffusers import UNet2DModel\ndef small(width, **options):\n    return UNet2DModel("
    code += "8, 1, 1, block_out_channels=(width, 16), norm_num_groups=4, layers_per_block=1, down_block_types="
    code += "('DownBlock2D',) * 2, up_block_types=('UpBlock2D',) * 2, **options)\ndef wrong():\n    return 1\n"
    (tmp_path / "net.py").write_text(code)
    teacher = train(
        tiny(symbols, tmp_path / "fp", "method=null", "structure=auto", "max_train_steps=1"), progress=False
    )
    for model in (f"{{factory: '{tmp_path}/net.py:small', width: 8}}", f"{{from_pretrained: {teacher.model_dir}}}"):
        recipe = tiny(symbols, tmp_path / "run", f"model={model}", "max_train_steps=1", "learning_rate=1e-9")
        assert train(recipe, progress=False, force=True).steps == 1
    saved, first = weights(teacher.checkpoint), weights(tmp_path / "run" / "checkpoint-1")
    torch.testing.assert_close(first["conv_in.weight"], saved["conv_in.weight"])
    for model, message in (
        (f"{tmp_path}/net.py:wrong", "returns a int"),
        (f"{tmp_path}/net.py:none", "has no attribute 'none'"),
        ("no_such_module:net", "model.factory: cannot import 'no_such_module'"),
        ("{class: UNet2DModle}", "no model 'UNet2DModle'. Did you mean 'UNet2DModel'"),
        ("{class: UNet2DModel, layers: 3}", "model.layers: UNet2DModel has no such argument"),
        ("{class: UNet2DModel, in_channels: 1, block_out_channels: [8]}", "model: UNet2DModel cannot be built"),
        ("{class: UNet2DModel, in_channels: 1}", "takes 1 channels and predicts 3"),
        (f"{{from_pretrained: {run.model_dir}}}", "already binary; name it in init_from"),
        ("{class: UNet2DModel, num_class_embeds: 3}", "num_class_embeds is 3, but the recipe has no classes"),
    ):
        with torch.device("meta"):
            assert_error(message, build_model, load_recipe("generation/digits", [f"model={model}"]))


def test_wrong_recipes_are_named() -> None:
    for override, message in (
        ("task=generate", "unknown task 'generate'; tasks: super_resolution, generation. Did you mean 'generation'"),
        ("model={class: UNet2DModel, factory: a:b}", "one of class, from_pretrained and factory"),
        ("model=net", "factory must be module:function"),
        ("model={from_pretrained: x, in_channels: 3}", "in_channels cannot be changed with from_pretrained"),
        ("classes=[a, a]", "names a class twice"),
        ("guidance_scale=2", "has no effect without classes"),
        ("scale=2", "scale: unknown key"),
    ):
        assert_error(message, load_recipe, "generation/digits", [override])
    assert_error("make class_dropout positive", load_recipe, "generation/emoji_teacher", ["class_dropout=0"])
    for override, message in (
        ("scheduler.class=DDIMSchedule", "no scheduler 'DDIMSchedule'. Did you mean 'DDIMScheduler'"),
        ("scheduler.beta=1", "scheduler.beta: DDIMScheduler has no such argument"),
        ("scheduler.class=FlowMatchEulerDiscreteScheduler", "scheduler"),
    ):
        assert_error(message, build_scheduler, load_recipe("generation/digits", [override]))


def test_the_resolution_is_that_of_the_network(symbols: Path, tmp_path: Path) -> None:
    recipe = tiny(symbols, tmp_path / "run", "model.sample_size=16")
    assert_error("resolution: is 8, but the network's sample_size is 16", train, recipe, progress=False)


def test_a_strangers_factory_is_not_called(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("raise SystemExit('it ran')")
    recipe = load_recipe("generation/digits", [f"model={tmp_path}/net.py:build"])
    with named_by_a_recipe():
        assert_error("the recipe would run code: the network .*--trust", build_model, recipe)


def test_the_loss_of_an_own_loop_is_the_documented_sum() -> None:
    student, teacher = (torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.Conv2d(2, 1, 1)) for _ in range(2))
    x, target = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    loss = distill(student, teacher, task=0.5, output=2.0, features=3.0, blocks=("0",))
    found = loss(lambda network: network(x), target)
    blocks = [torch.nn.functional.normalize(network[0](x).flatten(1)) for network in (student, teacher)]
    expected = 0.5 * (student(x) - target).square().mean() + 2 * (student(x) - teacher(x)).square().mean()
    expected = expected + 3 * (blocks[0] - blocks[1]).square().sum(1).mean()
    torch.testing.assert_close(found, expected)
    found.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert student[0].weight.grad is not None
    assert_error("features: .* greater than or equal to 0", distill, student, teacher, features=-1)
    assert_error("matches no module that student and teacher both have", distill, student, teacher, features=1)


@pytest.mark.long
def test_the_example_trains_packs_and_writes_a_card(symbols: Path, tmp_path: Path) -> None:
    config: dict[str, Any] = {"_class_name": "UNet2DModel", "sample_size": 8, "in_channels": 1, "out_channels": 1}
    config |= {"block_out_channels": [8, 16], "norm_num_groups": 4, "layers_per_block": 1}
    config |= {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "config.json").write_text(json.dumps(config))
    script = Path(__file__).parents[2] / "examples" / "train_unconditional.py"
    options = (
        "--num_epochs",
        "1",
        "--train_batch_size",
        "6",
        "--eval_batch_size",
        "1",
        "--ddpm_num_inference_steps",
        "2",
    )
    options += ("--model_config_name_or_path", str(tmp_path / "net"), "--resolution", "8", "--use_ema")
    where = ("--train_data_dir", str(symbols), "--output_dir", str(tmp_path / "out"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run([sys.executable, str(script), *options, *where], env=environment, check=True, capture_output=True)
    assert is_packed(diffusers.DDPMPipeline.from_pretrained(tmp_path / "out").unet)
    assert "1-bit weights and activations (bidiffsr)" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "samples" / "00.png").is_file()
