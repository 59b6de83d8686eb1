"""Generation in the latents of an autoencoder: what is encoded, trained, saved, resumed and decoded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_case import edit_json, succeeds
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel
from errors_case import assert_error
from generation_case import CLASSES, CONDITIONAL, tiny, write_images
from PIL import Image
from safetensors.torch import load_file, save_file
from training_case import RESUME, assert_close, assert_same

import binarize
from binarize.models import GenerationPipeline
from binarize.models.latents import autoencoder_folder, decode
from binarize.models.loading import load_generator
from binarize.training import TrainResult, train
from binarize.training.image_folder import LabelledImages, Latents

SCALING, SHIFT = 4.0, 0.1
WEIGHTS = "diffusion_pytorch_model.safetensors"
LATENT = ("model.in_channels=2", "model.out_channels=2", "scheduler.clip_sample=false")


@pytest.fixture(scope="session")
def symbols(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("latent_symbols"))


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save an autoencoder of random weights, whose latents of 8x8 pixels are 2x4x4."""
    torch.manual_seed(1)
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    vae = AutoencoderKL(
        1, 1, down, up, (8, 16), layers_per_block=1, latent_channels=2, norm_num_groups=4, sample_size=8,
        scaling_factor=SCALING, shift_factor=SHIFT,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def run(symbols: Path, vae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    output = tmp_path_factory.mktemp("latent") / "run"
    return train(latent(symbols, output, vae_folder, "checkpoints_total_limit=null"), progress=False)


def latent(images: Path, output: Path, vae: Path, *overrides: str) -> Any:
    return tiny(images, output, CONDITIONAL, f"vae={vae}", *LATENT, *overrides)


def read(images: Path, **options: Any) -> LabelledImages:
    return LabelledImages(images, resolution=8, channels=1, classes=CLASSES, **options)


@pytest.mark.parametrize("flip", [False, True])
def test_items_are_drawn_from_the_posterior_of_each_image(flip: bool, symbols: Path, vae_folder: Path) -> None:
    vae = AutoencoderKL.from_pretrained(vae_folder).eval()
    images = read(symbols, random_flip=flip, class_dropout=0.3, seed=3)
    latents = Latents(images, AutoencoderKL.from_pretrained(vae_folder).eval())
    assert len(latents) == len(images)
    standard = []
    for index in range(600):
        item, image = latents[index], images[index]
        assert (item["name"], item["class_label"]) == (image["name"], image["class_label"])
        with torch.no_grad():
            posterior = vae.encode(image["image"][None]).latent_dist
        mean = (posterior.mean[0] - SHIFT) * SCALING
        standard.append((item["image"] - mean) / (posterior.std[0] * SCALING))
    noise = torch.stack(standard)
    assert noise.shape == (600, 2, 4, 4)
    assert abs(float(noise.mean())) < 0.03
    assert abs(float(noise.std()) - 1) < 0.03
    assert torch.equal(latents[7]["image"], latents[7]["image"])


def test_a_run_saves_a_pipeline_that_decodes(run: TrainResult, vae_folder: Path) -> None:
    pipe = load_generator(run.output_dir)
    assert (pipe.sample_shape, pipe.image_shape) == ((2, 4, 4), (1, 8, 8))
    with Image.open(run.output_dir / "samples" / "step-0000006-samples.png") as grid:
        assert (grid.size, grid.mode) == ((18, 18), "L")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    noise, labels = torch.randn(3, 2, 4, 4), torch.tensor([0, 1, 1])
    found = pipe(class_labels=labels.tolist(), latents=noise, num_inference_steps=3, output_type="pt").images
    vae, x = AutoencoderKL.from_pretrained(vae_folder), noise
    pipe.scheduler.set_timesteps(3)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            x = pipe.scheduler.step(pipe.unet(x, t, class_labels=labels).sample, t, x).prev_sample
        expected = (vae.decode(x / SCALING + SHIFT).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_packed_pipeline_keeps_its_autoencoder(run: TrainResult, tmp_path: Path) -> None:
    pipe = load_generator(run.output_dir)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(2, num_inference_steps=2, generator=torch.Generator().manual_seed(3), output_type="pt").images
    binarize.pack(pipe.unet)
    pipe.save_pretrained(tmp_path / "packed")
    packed = GenerationPipeline.from_pretrained(tmp_path / "packed")
    found = packed(2, num_inference_steps=2, generator=torch.Generator().manual_seed(3), output_type="pt").images
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


@pytest.mark.slow
def test_the_commands_generate_and_measure(run: TrainResult, symbols: Path, tmp_path: Path) -> None:
    succeeds("generate", "--model", run.output_dir, "-n", "4", "--steps", "2", tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.mode == "L"
    out = tmp_path / "out"
    succeeds("evaluate", run.output_dir, "--data", symbols, "--steps", "2", "-n", "8", "--output", out)
    report = json.loads((out / "evaluation.json").read_text())
    assert (report["images"], report["real"], report["steps"]) == (8, 12, 2)
    succeeds("pack", run.output_dir, tmp_path / "packed")
    assert load_generator(tmp_path / "packed").image_shape == (1, 8, 8)


def test_a_resumed_run_equals_an_uninterrupted_one(
    run: TrainResult, symbols: Path, vae_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(run.output_dir / "checkpoint-3", tmp_path / "cut" / "checkpoint-3")
    resumed = train(latent(symbols, tmp_path / "cut", vae_folder, RESUME), progress=False)
    assert_same(resumed.checkpoint, run.checkpoint)
    moved = Path(shutil.copytree(vae_folder, tmp_path / "moved"))
    again = latent(symbols, tmp_path / "cut", moved, RESUME, "max_train_steps=7")
    assert train(again, progress=False).steps == 7
    for name, old, new in (("config.json", b'"scaling_factor": 4.0', b'"scaling_factor": 4.5'), (WEIGHTS, None, None)):
        content = (moved / name).read_bytes()
        changed = content[:-1] + bytes([content[-1] ^ 1]) if old is None else content.replace(old, new)
        assert changed != content
        (moved / name).write_bytes(changed)
        message = f"the training data are not those of the run: 1 changed, such as vae/{name}"
        assert_error(message, train, again.model_copy(update={"max_train_steps": 8}), progress=False)
        (moved / name).write_bytes(content)


@pytest.mark.slow
def test_half_batches_train_as_whole_ones(run: TrainResult, symbols: Path, vae_folder: Path, tmp_path: Path) -> None:
    """The latents of a sample depend on its index alone; Adam's steps are 1e-3, and magnify rounding at first."""
    whole = latent(symbols, tmp_path / "whole", vae_folder)
    halves = latent(symbols, tmp_path / "halves", vae_folder, "train_batch_size=2", "gradient_accumulation_steps=2")
    results = [train(recipe, progress=False).checkpoint for recipe in (whole, halves)]
    assert_close(*results, atol=1e-4)


def test_an_autoencoder_is_found_in_a_run_and_a_pipeline(
    run: TrainResult, symbols: Path, vae_folder: Path, tmp_path: Path
) -> None:
    for place in (run.output_dir, run.model_dir):
        assert autoencoder_folder(place) == run.model_dir / "vae"
    student = latent(symbols, tmp_path / "run", run.output_dir, f"init_from={run.output_dir}", "max_train_steps=1")
    assert train(student, progress=False).steps == 1
    pixels = tiny(symbols, tmp_path / "pixels", CONDITIONAL, "max_train_steps=1")
    teacher = f"distillation={{teacher: {train(pixels, progress=False).output_dir}}}"
    other = latent(symbols, tmp_path / "other", vae_folder, teacher)
    assert_error("pixels generates pixels; set vae to null", train, other, progress=False)
    vae = AutoencoderKL.from_pretrained(vae_folder)
    vae.decoder.conv_in.bias.data += 1
    vae.save_pretrained(tmp_path / "another")
    twin = latent(symbols, tmp_path / "twin", tmp_path / "another", f"init_from={run.output_dir}")
    assert_error("generates latents of another autoencoder; set vae to", train, twin, progress=False)


def test_what_does_not_fit_is_named(symbols: Path, vae_folder: Path, tmp_path: Path) -> None:
    def refused(message: str, *overrides: str, vae: Path = vae_folder) -> None:
        assert_error(message, lambda: train(latent(symbols, tmp_path / "run", vae, *overrides), progress=False))

    refused("center_crop: .*must be true with vae", "center_crop=false")
    refused("resolution: is 9; the autoencoder needs a multiple of 2", "resolution=9")
    refused("resolution: is 8, 4 in latents, but the network's sample_size is 8", "model.sample_size=8")
    refused("has 3 channels, but the latents of vae have 2", "model.in_channels=3", "model.out_channels=3")
    refused("vae: .*absent: no such folder; give the folder of diffusers' AutoencoderKL", vae=tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    refused("vae: .*empty: holds no autoencoder", vae=tmp_path / "empty")
    refused("scheduler.clip_sample: is true in DDIMScheduler and would clip latents", "scheduler.clip_sample=true")
    refused("scheduler.thresholding: is true", "scheduler.thresholding=true")
    shape: dict[str, Any] = {
        "sample_size": 4, "block_out_channels": (8, 16), "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2,
    }  # fmt: skip
    unet = UNet2DModel(**shape)
    unet.save_pretrained(tmp_path / "unet")
    refused("holds a UNet2DModel; give the folder of diffusers' AutoencoderKL", vae=tmp_path / "unet")
    broken = Path(shutil.copytree(vae_folder, tmp_path / "broken"))
    (broken / WEIGHTS).write_bytes(b"no weights")
    refused("vae: .*cannot be read", vae=broken)
    edit_json(shutil.copytree(vae_folder, tmp_path / "four") / "config.json", in_channels=4, out_channels=4)
    refused("takes images of 4 channels and gives 4; needed: both 1", vae=tmp_path / "four")
    edit_json(tmp_path / "four" / "config.json", in_channels=1, out_channels=1, latent_channels="two")
    refused("its configuration has latent_channels='two'", vae=tmp_path / "four")
    lacking = Path(shutil.copytree(vae_folder, tmp_path / "lacking")) / WEIGHTS
    tensors = load_file(lacking)
    del tensors["decoder.conv_in.bias"]
    save_file(tensors, lacking)
    refused("its weights lack decoder.conv_in.bias", vae=lacking.parent)
    tensors["decoder.conv_in.bias"] = torch.full((16,), float("nan"))
    save_file(tensors, lacking)
    refused("the tensor decoder.conv_in.bias has values", vae=lacking.parent)
    vae = AutoencoderKL.from_pretrained(vae_folder)
    message = "its latents have 2 channels, but the network has 3; give the autoencoder"
    assert_error(message, GenerationPipeline, unet, DDIMScheduler(), vae=vae)
    assert_error("vae: is a UNet2DModel", GenerationPipeline, unet, DDIMScheduler(), vae=unet)


def test_images_that_are_not_finite_are_refused(run: TrainResult) -> None:
    pipe = load_generator(run.output_dir)
    pipe.vae.decoder.conv_out.bias.data.fill_(float("nan"))
    assert_error("the autoencoder of .* gives values up to nan", pipe, 1, num_inference_steps=1)


def test_decoding_in_half_precision_is_upcast_where_the_autoencoder_needs_it(vae_folder: Path) -> None:
    vae = AutoencoderKL.from_pretrained(vae_folder)
    latents = torch.randn(2, 2, 4, 4)
    expected = decode(vae, latents)
    half = decode(vae.to(torch.float16), latents)
    assert vae.dtype == torch.float32  # AutoencoderKL has force_upcast by default
    torch.testing.assert_close(half, expected, rtol=0, atol=0.1)
