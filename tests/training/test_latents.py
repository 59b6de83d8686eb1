"""Generation in the latents of an autoencoder: what is encoded, trained, saved, resumed and decoded."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_case import succeeds
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel
from errors_case import assert_error
from generation_case import CLASSES, CONDITIONAL, tiny, write_images
from PIL import Image
from training_case import RESUME, assert_same

import binarize
from binarize.models import GenerationPipeline
from binarize.models.loading import load_generator
from binarize.training import TrainResult, train
from binarize.training.image_folder import LabelledImages, Latents

SCALING, SHIFT = 0.4, 0.1


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
    return tiny(images, output, CONDITIONAL, f"vae={vae}", "model.in_channels=2", "model.out_channels=2", *overrides)


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
    out = succeeds("evaluate", run.output_dir, "--data", symbols, "--steps", "2", "-n", "8", "--features", "pixels")
    assert "8x8" in out or "pixels" in out


def test_a_resumed_run_equals_an_uninterrupted_one(
    run: TrainResult, symbols: Path, vae_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(run.output_dir / "checkpoint-3", tmp_path / "cut" / "checkpoint-3")
    resumed = train(latent(symbols, tmp_path / "cut", vae_folder, RESUME), progress=False)
    assert_same(resumed.checkpoint, run.checkpoint)
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copytree(vae_folder, weights.parent)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    shutil.copytree(weights.parent, vae_folder, dirs_exist_ok=True)
    try:
        again = latent(symbols, tmp_path / "cut", vae_folder, RESUME, "max_train_steps=8")
        assert_error("1 changed, such as vae/diffusion_pytorch_model.safetensors", train, again, progress=False)
    finally:
        content[-1] ^= 1
        (vae_folder / weights.name).write_bytes(content)


def test_what_does_not_fit_is_named(symbols: Path, vae_folder: Path, tmp_path: Path) -> None:
    def refused(message: str, *overrides: str, vae: Path = vae_folder) -> None:
        assert_error(message, lambda: train(latent(symbols, tmp_path / "run", vae, *overrides), progress=False))

    refused("center_crop: .*must be true with vae", "center_crop=false")
    refused("resolution: is 9; the autoencoder needs a multiple of 2", "resolution=9")
    refused("resolution: is 8, 4 in latents, but the network's sample_size is 8", "model.sample_size=8")
    refused("has 3 channels, but the latents of vae have 2", "model.in_channels=3", "model.out_channels=3")
    refused("vae: .*absent: no such file or folder", vae=tmp_path / "absent")
    shape: dict[str, Any] = {
        "sample_size": 4, "block_out_channels": (8, 16), "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2,
    }  # fmt: skip
    unet = UNet2DModel(**shape)
    unet.save_pretrained(tmp_path / "unet")
    refused("holds a UNet2DModel; needed: diffusers' AutoencoderKL", vae=tmp_path / "unet")
    broken = Path(shutil.copytree(vae_folder, tmp_path / "broken"))
    (broken / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    refused("vae: .*cannot be read", vae=broken)
    pipe = GenerationPipeline(unet, DDIMScheduler(), vae=AutoencoderKL.from_pretrained(vae_folder))
    assert_error("has 3 channels, but the latents have 2", lambda: pipe.image_shape)
