"""The pipeline: schedulers, sizes, randomness, and its life as a diffusers pipeline."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers.callbacks import PipelineCallback
from errors_case import assert_error
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_case import BETAS, Local, local, pipeline, pixels, run, seeded
from safetensors import safe_open
from torch import Tensor

import binarize
from binarize.errors import BinarizeError
from binarize.imaging import upscale_bicubic
from binarize.models import SRUNet, load_official
from binarize.models.pipeline import SuperResolutionPipeline
from binarize.models.upscaler import default_scheduler

FIXTURES = Path(__file__).parents[1] / "fixtures"


def upscaled(image: np.ndarray, scale: int = 2) -> Tensor:
    return upscale_bicubic(torch.from_numpy(image).permute(2, 0, 1)[None], scale)


SCHEDULERS = {
    "ddim": (diffusers.DDIMScheduler, {}),
    "ddim-v": (diffusers.DDIMScheduler, {"prediction_type": "v_prediction"}),
    "ddpm": (diffusers.DDPMScheduler, {}),
    "dpm-solver++": (diffusers.DPMSolverMultistepScheduler, {}),
    "sde-dpm-solver++": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler-ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
}


@pytest.mark.parametrize(("kind", "options"), SCHEDULERS.values(), ids=SCHEDULERS)
def test_every_scheduler_runs_as_in_a_plain_diffusers_loop(kind, options):
    unet, image = local(), pixels(8, 8)
    given = run(pipeline(unet, scheduler=kind(**BETAS, **options)), image, num_inference_steps=6)

    scheduler, generator = kind(**BETAS, **options), seeded()
    condition = upscaled(image)
    scheduler.set_timesteps(6)
    x = torch.randn(1, 3, 16, 16, generator=generator, dtype=torch.float64) * scheduler.init_noise_sigma
    takes_generator = "generator" in kind.step.__code__.co_varnames
    for t in scheduler.timesteps:
        with torch.no_grad():
            epsilon = unet(scheduler.scale_model_input(x, t), t, condition).sample
        x = scheduler.step(epsilon, t, x, **({"generator": generator} if takes_generator else {})).prev_sample
    assert torch.equal(given, x.clamp(0, 1))


def test_eta_reaches_ddim_and_is_refused_elsewhere():
    pipe, image = pipeline(), pixels(4, 4)
    assert not torch.equal(run(pipe, image, eta=1.0), run(pipe, image))
    assert not torch.equal(run(pipe, image, eta=1.0, generator=seeded(1)), run(pipe, image, eta=1.0))
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert_error(r"eta=0.5: EulerDiscreteScheduler takes no eta", run, pipe, image, eta=0.5)


def test_a_scheduler_that_does_not_fit_is_refused_at_once_and_when_swapped():
    assert default_scheduler().config == pipeline().scheduler.config == diffusers.DDIMScheduler(**BETAS).config
    message = "trained with 1000 timesteps, but DDIMScheduler has num_train_timesteps=2000"
    assert_error(message, lambda: pipeline(local(num_train_timesteps=1000)))
    pipe = pipeline(local(num_train_timesteps=1000), scheduler=diffusers.DDIMScheduler())
    pipe.scheduler = default_scheduler()
    assert_error(message, run, pipe, pixels(2, 2))
    with pytest.raises(BinarizeError, match="FlowMatchEulerDiscreteScheduler is no scheduler for noise prediction"):
        pipeline(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=2000))


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40), scale=st.integers(1, 4))
def test_any_size_is_padded_by_reflection_or_by_its_edge_and_cropped_back(height, width, scale):
    unet, image = local(), pixels(height, width)
    images = run(pipeline(unet, scale=scale), image, num_inference_steps=1)
    assert images.shape == (1, 3, height * scale, width * scale)
    assert images.isfinite().all()
    expected = upscaled(image, scale).numpy()
    for axis in (2, 3):
        side = expected.shape[axis]
        pad = [(0, -side % 8) if a == axis else (0, 0) for a in range(4)]
        expected = np.pad(expected, pad, mode="reflect" if -side % 8 < side else "edge")
    np.testing.assert_array_equal(unet.seen[0][2].numpy(), expected)


def test_padding_noise_is_white_and_the_same_in_every_call():
    unet = local()
    for seed in (0, 1):
        run(pipeline(unet), pixels(18, 18), generator=seeded(seed), num_inference_steps=1)
    one, other = (sample for sample, _, _ in unet.seen)
    assert not torch.equal(one[..., :36, :36], other[..., :36, :36])
    assert torch.equal(one[..., 36:], other[..., 36:])
    rim = torch.cat([one[..., 36:].flatten(), one[..., 36:, :36].flatten()])
    assert max(abs(rim.mean()), abs(rim.std() - 1)) < 0.1


def test_a_network_that_names_no_multiple_gets_multiples_of_eight():
    unet = local()
    unet.__class__ = type("Silent", (Local,), {"size_multiple": property(lambda self: self.missing)})
    run(pipeline(unet), pixels(2, 5), num_inference_steps=1)
    assert unet.seen[0][0].shape == (1, 3, 8, 16)


def test_latents_are_what_the_generator_would_have_drawn():
    pipe, image = pipeline(), pixels(5, 7)
    noise = torch.randn(1, 3, 10, 14, generator=seeded(), dtype=torch.float64)
    state = torch.get_rng_state()
    given = run(pipe, image, generator=None, latents=noise)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(given, run(pipe, image))
    assert not torch.equal(given, run(pipe, image, generator=seeded(1)))


@pytest.mark.parametrize("scheduler", [diffusers.DDIMScheduler, diffusers.DDPMScheduler])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_list_with_generators_equals_its_images_one_by_one(scheduler, batch_size):
    pipe = pipeline(scheduler=scheduler(**BETAS))
    images = [pixels(*size, seed=seed) for seed, size in enumerate([(4, 6), (4, 6), (3, 3), (4, 6)])]
    together = run(pipe, images, generator=[seeded(i) for i in range(4)], batch_size=batch_size)
    assert [tuple(t.shape) for t in together] == [(3, 8, 12), (3, 8, 12), (3, 6, 6), (3, 8, 12)]
    for i, image in enumerate(images):
        alone = run(pipe, image, generator=seeded(i))[0]
        torch.testing.assert_close(together[i], alone, rtol=0, atol=0 if batch_size == 1 else 1e-12)
    if batch_size == 1:
        successive = [run(pipe, image, generator=generator)[0] for generator in [seeded()] for image in images]
        assert all(map(torch.equal, run(pipe, images), successive))


def test_batch_size_counts_tiles_too():
    unet = local()
    pipe, image = pipeline(unet), pixels(20, 20)
    one = run(pipe, image, tile=24, overlap=8)
    unet.seen.clear()
    four = run(pipe, image, tile=24, overlap=8, batch_size=4)
    assert {sample.shape[0] for sample, _, _ in unet.seen} == {4}
    torch.testing.assert_close(one, four, rtol=0, atol=1e-12)


def test_modes_are_restored_even_after_an_error():
    unet = local(drop=0.9)
    unet.train()
    unet.first.eval()
    pipe, image = pipeline(unet), pixels(4, 4)
    modes = [part.training for part in unet.modules()]
    assert torch.equal(run(pipe, image), run(pipe, image))
    assert [part.training for part in unet.modules()] == modes
    with pytest.raises(ZeroDivisionError):
        run(pipe, image, callback_on_step_end=lambda *_: 1 / 0)
    assert [part.training for part in unet.modules()] == modes
    assert not run(pipe, image).requires_grad


def test_a_callback_sees_each_step_and_may_replace_the_sample():
    pipe, image, seen = pipeline(), pixels(4, 5), []

    def callback(of: SuperResolutionPipeline, step: int, timestep: Tensor, tensors: dict) -> dict | None:
        assert of is pipe
        seen.append((step, int(timestep), *(tuple(t.shape) for t in tensors.values())))
        return {"latents": torch.full_like(tensors["latents"], 0.25)} if step == 1 else None

    options = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", "condition"]}
    large = run(pipe, image, num_inference_steps=2, **options)
    assert seen == [(0, 1000, (1, 3, 8, 16), (1, 3, 8, 16)), (1, 0, (1, 3, 8, 16), (1, 3, 8, 16))]
    assert (large == 0.25).all()

    class Last(PipelineCallback):
        tensor_inputs = ["condition", "latents"]

        def callback_fn(self, pipe, step, timestep, tensors):
            return {"latents": tensors["condition"]}

    large = run(pipe, image, callback_on_step_end=Last())
    torch.testing.assert_close(large, upscaled(image))


def test_progress_counts_the_steps_of_every_image(capsys):
    pipe = pipeline()
    run(pipe, [pixels(2, 2), pixels(2, 3)])
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config()
    run(pipe, [pixels(2, 2), pixels(2, 3)])
    assert "6/6" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_sample_keeps_at_least_float32_whatever_the_network_computes_in(dtype):
    unet = local()
    assert run(pipeline(unet).to("cpu", dtype), pixels(4, 4)).dtype == torch.promote_types(dtype, torch.float32)
    assert {sample.dtype for sample, _, _ in unet.seen} == {dtype}


def test_a_saved_pipeline_comes_back_whole(tmp_path):
    pipe = pipeline(scale=3, scheduler=diffusers.DPMSolverMultistepScheduler(**BETAS)).to(torch.float32)
    pipe.save_pretrained(tmp_path)
    assert isinstance(Local.from_pretrained(tmp_path / "unet"), Local)
    again = SuperResolutionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.scale == 3
    assert isinstance(again.scheduler, diffusers.DPMSolverMultistepScheduler)
    assert torch.equal(run(again, pixels(3, 4)), run(pipe, pixels(3, 4)))
    swapped = SuperResolutionPipeline.from_pretrained(tmp_path, scheduler=default_scheduler(), scale=2)
    assert (swapped.scale, type(swapped.scheduler)) == (2, diffusers.DDIMScheduler)


@pytest.mark.long
def test_a_converted_network_comes_back_with_its_pipeline_in_a_fresh_process(tmp_path):
    srunet = SRUNet(base_channels=16, channel_mults=(1, 2), res_blocks=1, norm_groups=8).double()
    binarize.convert(srunet, "bidiffsr")
    assert run(pipeline(srunet, scale=3), pixels(1, 9)).shape == (1, 3, 3, 27)
    pipe, image = pipeline(srunet), np.full((4, 6, 3), 0.5)
    pipe.save_pretrained(tmp_path / "model")
    np.save(tmp_path / "expected.npy", run(pipe, image, num_inference_steps=1, tile=8).numpy())
    code = f"""
        import numpy as np, torch
        from binarize.models import SuperResolutionPipeline
        pipe = SuperResolutionPipeline.from_pretrained({str(tmp_path / "model")!r}, pack=False).to(torch.float64)
        large = pipe(np.full((4, 6, 3), 0.5), 1, torch.Generator().manual_seed(0), tile=8, output_type="pt").images
        np.testing.assert_allclose(large, np.load({str(tmp_path / "expected.npy")!r}), rtol=0, atol=1e-10)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_the_released_sample_comes_out_of_the_pipeline():
    with safe_open(FIXTURES / "small.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        x, condition, expected = (file.get_tensor(name) for name in ("x_t", "lr", "ddim10"))
    unet = load_official(FIXTURES / "small.pth", **config).double()
    given = run(pipeline(unet, scale=1), condition, latents=x, num_inference_steps=10)  # upscaled already
    # diffusers computes its alphas as a float32 cumulative product, whose rounding depends on the CPU.
    torch.testing.assert_close(given, expected.clamp(0, 1), rtol=0, atol=1e-6)
