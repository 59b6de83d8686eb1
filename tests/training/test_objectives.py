"""The training loss: targets, residuals, Min-SNR, timesteps, and the condition's fine detail."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from errors_case import assert_error
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import uniform_filter

from binarize.errors import BinarizeError
from binarize.imaging import ImagePairs, degrade, read_image, upscale_bicubic
from binarize.models import SRUNet, SuperResolutionPipeline
from binarize.models.blocks import fine_detail
from binarize.recipes import build_pipeline, build_scheduler, load_recipe
from binarize.training import train
from binarize.training.data import PairedPatches, residual_std
from binarize.training.loop import open_task
from binarize.training.objective import Objective, prediction_target, sample_losses, snr_weights
from binarize.training.perceptual import perceptual_loss
from binarize.training.samples import BatchPlan

UNCLIPPED = ("target=residual", "scheduler.clip_sample=false")
KINDS = ["epsilon", "sample", "v_prediction"]


def small(**options: Any) -> SRUNet:
    return SRUNet(base_channels=8, channel_mults=(1, 2), res_blocks=1, norm_groups=4, dropout=0.0, **options)


def targets(a: torch.Tensor, clean: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return prediction type -> training target for the cumulative product a."""
    return {"epsilon": noise, "sample": clean, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * clean}


def test_the_residual_scale_is_the_standard_deviation_of_residuals(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    whole = []
    for number in range(3):
        levels = random.normal(128, 25, (96, 96, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(levels).save(tmp_path / f"{number}.png")
        small = degrade(levels, 2).astype(np.float32) / 255
        enlarged = upscale_bicubic(torch.from_numpy(small).permute(2, 0, 1)[None], 2)[0].permute(1, 2, 0).numpy()
        whole.append((levels / 255 - enlarged).ravel())
    found = residual_std(PairedPatches(tmp_path, scale=2, patch_size=32, length=64), 64)
    assert found == pytest.approx(np.concatenate(whole).std(), rel=0.02)
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (32, 32), (90, 90, 90)).save(tmp_path / "flat" / "flat.png")
    with pytest.raises(BinarizeError, match=r"the training images equal their upscaled versions"):
        residual_std(PairedPatches(tmp_path / "flat", scale=2, patch_size=16, length=8), 8)


@pytest.mark.parametrize("kind", KINDS)
def test_the_objective_of_residuals(kind: str) -> None:
    options = [*UNCLIPPED, "residual_scale=0.05", f"scheduler.prediction_type={kind}", "loss=l2"]
    recipe = load_recipe("small_x2", options)
    scheduler = build_scheduler(recipe)
    hr, condition = torch.rand(2, 3, 8, 8).double(), torch.rand(2, 3, 8, 8).double()
    noise, timestep = torch.randn(2, 3, 8, 8).double(), torch.tensor([100, 1500])
    seen: dict[str, torch.Tensor] = {}

    def model(noisy: torch.Tensor, timesteps: torch.Tensor, given: torch.Tensor) -> Any:
        seen["noisy"] = noisy
        return SimpleNamespace(sample=torch.zeros_like(noisy))

    batch = {"hr": hr, "condition": condition, "noise": noise, "timestep": timestep}
    losses = Objective(recipe, scheduler)(model, batch)
    a = scheduler.alphas_cumprod[timestep].double().view(2, 1, 1, 1)
    clean = (hr - condition) / 0.05
    torch.testing.assert_close(seen["noisy"], a.sqrt() * clean + (1 - a).sqrt() * noise, rtol=1e-6, atol=1e-6)
    target = targets(a, clean, noise)[kind]
    torch.testing.assert_close(losses.total, target.square().mean((1, 2, 3)), rtol=1e-6, atol=0)
    assert losses.parts == {}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("l1", lambda d: np.abs(d).mean()),
        ("l2", lambda d: (d**2).mean()),
        ("charbonnier", lambda d: np.hypot(d, 1e-3).mean()),
        ("psnr", lambda d: math.log((d**2).mean() + 0.01)),
    ],
)
def test_losses_of_samples_are_their_formulas(kind: str, expected: Callable[[np.ndarray], float]) -> None:
    random = np.random.default_rng(0)
    prediction, target = random.normal(size=(2, 3, 3, 5, 7)) * np.array([1e-3, 1, 30])[:, None, None, None]
    losses = sample_losses(kind, torch.from_numpy(prediction), torch.from_numpy(target))
    expected_losses = [expected(difference) for difference in prediction - target]
    np.testing.assert_allclose(losses.numpy(), expected_losses, rtol=1e-12)


def test_loss_psnr_has_the_same_gradient_for_scaled_errors() -> None:
    target, error = torch.randn(2, 1, 3, 8, 8, dtype=torch.float64)
    gradients = []
    for scale in (1e3, 2e3):
        factor = torch.ones((), dtype=torch.float64, requires_grad=True)
        sample_losses("psnr", target + scale * factor * error, target).sum().backward()
        gradients.append(factor.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients[0], torch.tensor(2.0, dtype=torch.float64), rtol=1e-6, atol=0)


def test_loss_psnr_has_no_gradient_without_an_error() -> None:
    prediction = torch.randn(1, 3, 8, 8, requires_grad=True)
    sample_losses("psnr", prediction, prediction.detach().clone()).sum().backward()
    assert torch.equal(prediction.grad, torch.zeros_like(prediction))


PERCEPTUAL = ["target=residual", "scheduler.clip_sample_range=8", "residual_scale=0.05", "resolution=32"]


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision.models")  # lpips passes deprecated arguments
@pytest.mark.parametrize(
    "others", [[], ["snr_gamma=5"], ["target=image", "residual_scale=null", "scheduler.clip_sample_range=1"]], ids=str
)
def test_lpips_of_the_images_is_added_to_the_loss(backbone: Path, others: list[str]) -> None:
    lpips = pytest.importorskip("lpips")
    section = f"perceptual={{weight: 0.3, backbone: {backbone}}}"
    recipe = load_recipe("small_x2", [*PERCEPTUAL, "scheduler.prediction_type=sample", section, *others])
    hr, condition, predicted = torch.rand(3, 2, 3, 32, 32)
    batch = {"hr": hr, "condition": condition, "noise": torch.randn(2, 3, 32, 32), "timestep": torch.tensor([1, 999])}
    x0 = predicted if recipe.target == "image" else (predicted - condition) / 0.05  # type: ignore[attr-defined]
    x0.requires_grad_()

    def model(*inputs: Any) -> Any:
        return SimpleNamespace(sample=x0)

    objective = Objective(recipe, build_scheduler(recipe), None, perceptual_loss(recipe, torch.device("cpu")))
    losses, task = objective(model, batch), Objective(recipe, build_scheduler(recipe))(model, batch).total
    metric = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    weights = torch.load(backbone, weights_only=True)
    metric.net.load_state_dict({key: weights[f"features.{key.split('.', 1)[1]}"] for key in metric.net.state_dict()})
    with torch.no_grad():
        expected = metric(2 * predicted - 1, 2 * hr - 1).flatten()
    torch.testing.assert_close(losses.parts, {"task": task.detach(), "perceptual": expected}, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses.total.detach(), task.detach() + 0.3 * expected, rtol=1e-4, atol=1e-6)
    assert objective.parts == tuple(losses.parts)
    (losses.total - task).sum().backward()
    assert x0.grad is not None
    assert float(x0.grad.abs().max()) > 0


def test_a_run_with_lpips_resumes_exactly(recipe: Any, pictures: Path, backbone: Path, tmp_path: Path) -> None:
    pytest.importorskip("lpips")
    options = (*PERCEPTUAL, "scheduler.prediction_type=sample", f"perceptual={{weight: 0.3, backbone: {backbone}}}")
    whole = train(recipe(*options, out="whole"), progress=False)
    train(recipe(*options, "max_train_steps=3", out="cut"), progress=False)
    moved = backbone.rename(tmp_path / "moved.pth")
    options = (*options, f"perceptual.backbone={moved}", "resume_from_checkpoint=latest")
    resumed = train(recipe(*options, out="cut"), progress=False)
    assert [e.loss for e in whole.history][3:] == [e.loss for e in resumed.history]
    for entry in whole.history:
        assert entry.loss == pytest.approx(entry.parts["task"] + 0.3 * entry.parts["perceptual"], rel=1e-5)
    with pytest.raises(BinarizeError, match=r"perceptual\.weight: was 0\.3, is 0\.5"):
        train(recipe(*options, "perceptual.weight=0.5", out="cut"), progress=False)
    with pytest.raises(BinarizeError, match=r"squeeze needs patches of 17 pixels or more; resolution is 16\."):
        train(recipe(*options[:-1], "resolution=16", out="small"), progress=False)


def test_a_run_measures_the_scale_saves_it_with_the_model_and_resumes_with_it(recipe: Any, pictures: Path) -> None:
    options = (*UNCLIPPED, f"validation_data_dir={pictures}", "num_validation_images=1")
    whole = train(recipe(*options, out="whole"), progress=False)
    measured = residual_std(PairedPatches(pictures, scale=2, patch_size=16, length=512))
    saved = yaml.safe_load((whole.output_dir / "recipe.yaml").read_text())
    assert saved["residual_scale"] == pytest.approx(measured, rel=1e-12)
    pipeline = SuperResolutionPipeline.from_pretrained(whole.model_dir)
    assert pipeline.residual_scale == saved["residual_scale"]
    assert json.loads((whole.model_dir / "model_index.json").read_text())["residual_scale"] == pipeline.residual_scale

    train(recipe(*options, "max_train_steps=3", out="cut"), progress=False)
    resumed = train(recipe(*options, "resume_from_checkpoint=latest", out="cut"), progress=False)
    assert [e.loss for e in whole.history][3:] == [e.loss for e in resumed.history]
    with pytest.raises(BinarizeError, match=r"residual_scale: was 0\.\d+, is 0\.5"):
        train(recipe(*options, "residual_scale=0.5", "resume_from_checkpoint=latest", out="cut"), progress=False)
    # The saved pipeline gives the image that validation measured.
    image = sorted(pictures.iterdir())[0]
    pipeline.set_progress_bar_config(disable=True)
    pair = ImagePairs(pictures, scale=2)[0]
    out = pipeline(pair.lr, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
    strip = read_image(whole.output_dir / "samples" / f"step-0000006-{image.stem}.png").pixels()
    assert torch.equal((out[0] * 255).round().to(torch.uint8), strip[..., 32:64])


def test_the_strength_multiplies_residuals(tmp_path: Path) -> None:
    torch.manual_seed(0)
    image = torch.rand(1, 3, 12, 10) * 0.2 + 0.4  # far from the values at which images are clipped
    noise = torch.randn(1, 3, 24, 20)
    unet, added = small().eval(), {}
    for strength in (1.0, 1.5):
        options = {"num_inference_steps": 2, "residual_scale": 0.01, "residual_strength": strength}
        SuperResolutionPipeline(unet, scale=2, **options).save_pretrained(tmp_path / str(strength))
        pipe = SuperResolutionPipeline.from_pretrained(tmp_path / str(strength))
        added[strength] = pipe(image, latents=noise, output_type="pt").images - upscale_bicubic(image, 2)
    assert float(added[1.0].abs().max()) > 1e-3
    torch.testing.assert_close(added[1.5], 1.5 * added[1.0], rtol=0, atol=1e-6)


RESIDUAL = ("target=residual", "scheduler.clip_sample_range=8")
INVALID = [
    ({"residual_scale": 0.1, "residual_strength": 0}, r"residual_strength=0: .* a positive number"),
    ({"residual_strength": 1.5}, r"residual_strength=1\.5 without a residual_scale"),
    ({"residual_scale": 0}, r"residual_scale=0: .* the standard deviation"),
    (["target=image", "residual_strength=1.5"], r"residual_strength.*has no effect while target is image"),
    (["residual_scale=0.1"], r"residual_scale: got 0\.1; has no effect while target is image"),
    (["perceptual.weight=1", "scheduler.prediction_type=epsilon"], r"perceptual: .*network that predicts images; set"),
    (["perceptual={weight: 0}"], r"perceptual\.weight: got 0; must be greater than 0"),
    (["target=residual"], r"target: got 'residual'; residuals .*range 1; set it"),
    (["model.detail_factor=0"], r"model\.detail_factor: got 0; must be greater than 0"),
    ([*RESIDUAL], r"residual_scale: not set, and the pipeline .* recipe\.yaml"),
]


@pytest.mark.parametrize(("options", "message"), INVALID)
def test_invalid_options(options: Any, message: str) -> None:
    def build() -> None:
        if isinstance(options, list):
            build_pipeline(load_recipe("small_x2", options), small())
        SuperResolutionPipeline(small(), scale=2, **options)

    assert_error(message, build)


@given(step=st.integers(1, 1999), gamma=st.floats(0.1, 20.0), seed=st.integers(0, 100))
def test_min_snr_weights_image_errors_equally_for_all_predictions(step: int, gamma: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    clean, noise, error = (torch.from_numpy(random.standard_normal((1, 3, 4, 4))) for _ in range(3))
    timesteps = torch.tensor([step])
    weighted = {}
    for kind in KINDS:
        scheduler = build_scheduler(load_recipe("small_x2", [f"scheduler.prediction_type={kind}"]))
        a = scheduler.alphas_cumprod.double()[step]
        noisy = a.sqrt() * clean + (1 - a).sqrt() * noise
        wrong_clean = clean + error
        wrong = targets(a, wrong_clean, (noisy - a.sqrt() * wrong_clean) / (1 - a).sqrt())[kind]
        target = targets(a, clean, noise)[kind]
        assert torch.allclose(target, prediction_target(scheduler, clean, noise, timesteps), atol=1e-4)
        for loss, distance in (("l2", (wrong - target).square().mean()), ("l1", (wrong - target).abs().mean())):
            weighted[kind, loss] = float(snr_weights(scheduler, timesteps, gamma, loss)[0] * distance)
    snr = float(a / (1 - a))
    assert weighted["sample", "l2"] == pytest.approx(min(snr, gamma) * float(error.square().mean()), rel=1e-6)
    for loss in ("l2", "l1"):
        for kind in ("epsilon", "v_prediction"):
            assert weighted[kind, loss] == pytest.approx(weighted["sample", loss], rel=1e-6)


def test_a_run_uses_the_weights(recipe: Any) -> None:
    plain = train(recipe("max_train_steps=1", "loss=l2", out="plain"), progress=False)
    weighted = train(recipe("max_train_steps=1", "loss=l2", "snr_gamma=1e-5", out="weighted"), progress=False)
    # This gamma clips every timestep, so the squared error of the image has the weight 1e-5.
    assert weighted.history[0].loss == pytest.approx(1e-5 * plain.history[0].loss, rel=1e-3)


FOUR_STEPS = ("scheduler.num_train_timesteps=100", "scheduler.timestep_spacing=trailing", "num_inference_steps=4")


def timesteps_of(recipe: Any, count: int) -> list[int]:
    samples = open_task(recipe, BatchPlan(2)).samples
    return [samples[i]["timestep"] for i in range(count)]


def test_a_share_of_timesteps_is_that_of_sampling(recipe: Any) -> None:
    found = timesteps_of(recipe(*FOUR_STEPS, "sampling_timesteps_share=0.6"), 500)
    anywhere = timesteps_of(recipe(*FOUR_STEPS), 500)
    visited = (24, 49, 74, 99)  # trailing: 100 - 1, and every 25th before it
    expected = 0.6 / 4 + 0.4 / 100
    deviation = (expected * (1 - expected) / 500) ** 0.5
    for timestep in visited:
        assert found.count(timestep) / 500 == pytest.approx(expected, abs=4.5 * deviation)
    others = [(one, other) for one, other in zip(found, anywhere, strict=True) if one not in visited]
    assert len(others) > 150
    assert set(timesteps_of(recipe(*FOUR_STEPS, "sampling_timesteps_share=1"), 200)) == set(visited)
    assert all(one == other for one, other in others)  # uniform draws are those of a run without the key


def test_the_first_convolution_sees_the_detail_that_scipy_computes() -> None:
    network = small(detail_factor=20.0).double()
    assert network.conv_in.in_channels == 9
    condition = torch.rand(2, 3, 8, 12, dtype=torch.float64)
    seen: list[torch.Tensor] = []
    network.conv_in.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    sample = torch.randn_like(condition)
    network(sample, 5, condition)
    detail = 20.0 * (condition.numpy() - uniform_filter(condition.numpy(), size=(1, 1, 3, 3), mode="nearest"))
    np.testing.assert_allclose(seen[0][:, :3], condition)
    np.testing.assert_allclose(seen[0][:, 3:6, 1:-1, 1:-1], detail[..., 1:-1, 1:-1], atol=1e-12)
    corner = condition[:, :, 0, 0] - condition[:, :, :2, :2].mean((-1, -2))
    torch.testing.assert_close(seen[0][:, 3:6, 0, 0], 20.0 * corner)
    torch.testing.assert_close(seen[0][:, 6:], sample)
    with pytest.raises(BinarizeError, match=r"expects 6 channels in all; got 3 of sample and 6 of condition"):
        network(sample, 5, torch.cat([condition, condition], 1))


def test_fine_detail_of_a_bright_image_keeps_its_digits() -> None:
    """The difference from a mean that is rounded first is 20 times less precise."""
    image = 0.9 + 0.01 * torch.rand(1, 3, 16, 12, dtype=torch.float64).float()
    found, exact = (fine_detail(x, 30.0) for x in (image, image.double()))
    assert (found - exact).abs().max() < 2e-7 * exact.abs().max()


@pytest.mark.parametrize("factor", [0, -1, math.inf, math.nan, True, "30"])
def test_invalid_detail_factors(factor: Any) -> None:
    assert_error(r"detail_factor multiplies .* must be a positive number", small, detail_factor=factor)
    assert_error(r"detail_factor=30 needs a condition", small, in_channels=3, detail_factor=30)
