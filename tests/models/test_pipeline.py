from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import textwrap
from itertools import pairwise
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.callbacks import PipelineCallback
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

import binarize
from binarize.errors import BinarizeError
from binarize.imaging import to_image, upscale_bicubic
from binarize.models import SRUNet, load_official
from binarize.models.pipeline import SuperResolutionPipeline, default_scheduler
from binarize.models.tiling import tile_grid

# Some of diffusers' schedulers call numpy in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

FIXTURES = Path(__file__).parents[1] / "fixtures"
BETAS = {"num_train_timesteps": 2000, "beta_start": 1e-6, "beta_end": 1e-2, "beta_schedule": "linear"}


class Local(ModelMixin, ConfigMixin):
    """A stand-in with SRUNet's contract and a receptive field of 5 x 5: two 3x3 convolutions and the timestep."""

    size_multiple = 8

    @register_to_config
    def __init__(self, num_train_timesteps: int = 2000, drop: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Conv2d(6, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 3, 3, padding=1)
        self.dropout = nn.Dropout(drop)
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, sample: Tensor, timestep: Tensor, condition: Tensor) -> UNet2DOutput:
        self.seen.append((sample, torch.as_tensor(timestep), condition))
        hidden = torch.tanh(self.first(torch.cat([condition, sample], dim=1)) + torch.as_tensor(timestep) / 2000)
        return UNet2DOutput(sample=self.dropout(self.second(hidden)) + sample / 2)


def local(seed: int = 0, **options: float) -> Local:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Local(**options).double()


def pipeline(unet: ModelMixin | None = None, scale: int = 2, **options: object) -> SuperResolutionPipeline:
    pipe = SuperResolutionPipeline(local() if unet is None else unet, scale=scale, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((height, width, channels))


def run(pipe: SuperResolutionPipeline, image: object, **options: object) -> Tensor:
    options = {"num_inference_steps": 3, "generator": seeded(), "output_type": "pt", **options}
    return pipe(image, **options).images


# ---- tiles


@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    tile=st.integers(1, 80),
    overlap=st.integers(0, 79),
    multiple=st.sampled_from([1, 2, 8]),
)
def test_tiles_cover_the_canvas_and_their_weights_add_up_to_one(height, width, tile, overlap, multiple):
    overlap = min(overlap, tile - 1)
    grid = tile_grid(height, width, tile=tile, overlap=overlap, multiple=multiple)
    assert grid.shape == tuple(math.ceil(side / multiple) * multiple for side in (height, width))
    for spans, side, length in zip((grid.rows, grid.columns), (height, width), grid.shape, strict=True):
        total = torch.zeros(length, dtype=torch.float64)
        for span in spans:
            assert span.start % multiple == 0
            assert (span.weights >= 0).all()
            total[span.pixels] += span.weights
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)
        sizes = {span.weights.numel() for span in spans}
        assert sizes == {length} if tile >= side else max(sizes) <= max(tile, multiple)
        size = sizes.pop()
        for one, other in pairwise(spans):
            assert one.pixels.stop - other.start >= min(overlap, size - multiple)


def test_the_outer_quarter_of_an_overlap_has_no_weight_and_the_picture_edge_has_all():
    first, second = tile_grid(8, 48, tile=32, overlap=16, multiple=8).columns
    assert (first.start, second.start) == (0, 16)
    assert (first.weights[:16] == 1).all()
    assert (first.weights[-4:] == 0).all()
    assert (second.weights[:4] == 0).all()
    assert (second.weights[16:] == 1).all()
    assert (first.weights[16:].diff() <= 0).all()


def test_one_tile_hands_over_the_prediction_itself():
    prediction = torch.zeros(1, 3, 8, 8)
    assert tile_grid(5, 7, tile=7, multiple=8).blend(lambda x: prediction, torch.zeros(1, 3, 8, 8)) is prediction


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_blending_copies_gives_the_picture_for_any_number_of_tiles_at_once(batch_size):
    x, y = torch.rand(2, 3, 40, 56, dtype=torch.float64), torch.rand(2, 1, 40, 56, dtype=torch.float64)
    grid = tile_grid(40, 56, tile=24, overlap=8, multiple=8)
    calls = []

    def predict(a: Tensor, b: Tensor) -> Tensor:
        calls.append(a.shape[0])
        return a * b

    torch.testing.assert_close(grid.blend(predict, x, y, batch_size=batch_size), x * y, rtol=0, atol=1e-14)
    assert sum(calls) == 2 * len(grid) == 12
    assert max(calls) == 2 * min(batch_size, len(grid))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": 4}, "overlap=4 has no meaning without tiles; pass tile=SIDE"),
        ({"tile": 0}, "tile=0: .* at least 1; pass None for no tiles"),
        ({"tile": 16.0}, "tile=16.0: .* whole number"),
        ({"tile": 16, "overlap": 16}, r"overlap=16 with tile=16: .* from 0 to tile - 1 \(15 here\)"),
        ({"tile": 16, "overlap": -1}, "overlap=-1 with tile=16"),
    ],
)
def test_tiles_that_cannot_be_laid_are_refused(options, message):
    with pytest.raises(BinarizeError, match=message):
        tile_grid(32, 32, **options)


@settings(max_examples=15, deadline=None)
@given(height=st.integers(1, 30), width=st.integers(1, 30), tile=st.integers(24, 70))
def test_a_local_network_gives_with_tiles_what_it_gives_without(height, width, tile):
    # The receptive field reaches 2 pixels beyond a tile; the outer quarter of 16 shared pixels carries no weight.
    pipe, image = pipeline(), picture(height, width)
    whole = run(pipe, image)
    tiled = run(pipe, image, tile=tile, overlap=16)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-12)
    if tile >= 2 * max(height, width):
        assert torch.equal(tiled, whole)


class Tilewise(Local):
    """Predicts the noise of a clean picture that hangs on the mean of the whole input, as GroupNorm would have it."""

    def forward(self, sample: Tensor, timestep: Tensor, condition: Tensor) -> UNet2DOutput:
        alpha_bar = default_scheduler().alphas_cumprod[timestep].to(sample)
        clean = 0.8 * condition + 0.2 * condition.mean((1, 2, 3), keepdim=True)
        return UNet2DOutput(sample=(sample - alpha_bar.sqrt() * clean) / (1 - alpha_bar).sqrt())


def test_tiles_leave_no_seam_where_a_prediction_hangs_on_the_whole_tile():
    ramp = np.linspace(0.1, 0.9, 64)[None, :, None].repeat(64, 0).repeat(3, 2)
    pipe = pipeline(Tilewise().double())

    def steps(overlap: int) -> tuple[float, float]:
        columns = run(pipe, ramp, tile=64, overlap=overlap, num_inference_steps=5)[0, 0].mean(0)
        grid = tile_grid(128, 128, tile=64, overlap=overlap, multiple=8)
        borders = [b - 1 for s in grid.columns for b in (s.pixels.start, s.pixels.stop) if 0 < b < 128]
        jumps = columns.diff().abs()
        elsewhere = [i for i in range(8, 119) if all(abs(i - b) > 4 for b in borders)]
        return jumps[borders].max().item(), jumps[elsewhere].max().item()

    border, elsewhere = steps(overlap=32)
    assert border <= elsewhere
    assert elsewhere < 0.02
    border, elsewhere = steps(overlap=0)  # the same measure sees the step of 0.2 * 0.4 that blending takes away
    assert border > 0.08 > 5 * elsewhere


def test_the_network_never_sees_more_than_the_tile():
    unet = local()
    run(pipeline(unet), picture(61, 90), tile=37, overlap=8, num_inference_steps=2)
    assert {tuple(sample.shape) for sample, _, _ in unet.seen} == {(1, 3, 32, 32)}
    assert {tuple(condition.shape) for _, _, condition in unet.seen} == {(1, 3, 32, 32)}


_PEAK = """
import re, sys, torch
from pathlib import Path
from torch import nn
from binarize.models.pipeline import SuperResolutionPipeline
sys.path.insert(0, {tests!r})
from test_pipeline import Local

class Wide(Local):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(6, 128, 1), nn.Conv2d(128, 3, 1)

torch.set_num_threads(1)
pipe = SuperResolutionPipeline(Wide(), scale=2)
pipe.set_progress_bar_config(disable=True)
pipe.unet.seen = type("Forgets", (), {{"append": lambda self, item: None}})()
pipe(torch.rand(3, 64, 64), 1)

def peak():  # in KiB; unlike ru_maxrss it does not begin at the peak of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

before = peak()
pipe(torch.rand(3, 384, 384), 1, tile={tile})
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads a process's peak memory as Linux gives it")
def test_peak_memory_follows_the_tile():
    def growth(tile: int | None) -> float:
        code = _PEAK.format(tests=str(Path(__file__).parents[1]), tile=tile)
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return int(run.stdout) / 1024

    # A hidden layer of the whole picture has 128 x 768 x 768 float32 values, 288 MiB; one of a tile has 8 MiB.
    assert growth(None) > 288
    assert growth(128) < 144


# ---- sampling


def test_ddim_equals_its_closed_form():
    unet, image = local(), picture(6, 9)
    noise = torch.randn(1, 3, 12, 18, generator=seeded(3), dtype=torch.float64)
    given = run(pipeline(unet), image, latents=noise, num_inference_steps=4)[0]

    alpha_bar = np.cumprod(1 - np.linspace(1e-6, 1e-2, 2000))
    enlarged = upscale_bicubic(torch.from_numpy(image).permute(2, 0, 1)[None], 2)
    # Beyond the picture, the canvas starts from noise of its own, which another test is about.
    condition = torch.from_numpy(np.pad(enlarged.numpy(), [(0, 0), (0, 0), (0, 4), (0, 6)], mode="reflect"))
    x = unet.seen[0][0].clone()
    torch.testing.assert_close(x[..., :12, :18], noise, rtol=0, atol=0)
    for t in (1500, 1000, 500, 0):
        with torch.no_grad():
            epsilon = unet(x, t, condition).sample
        now, before = alpha_bar[t], alpha_bar[t - 500] if t >= 500 else 1.0
        clean = ((x - math.sqrt(1 - now) * epsilon) / math.sqrt(now)).clamp(-1, 1)
        x = math.sqrt(before) * clean + math.sqrt(1 - before) * epsilon
    # diffusers keeps its alphas in float32
    torch.testing.assert_close(given, x[0, :, :12, :18].clamp(0, 1), rtol=0, atol=1e-4)


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


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_runs_as_in_a_plain_diffusers_loop(name):
    kind, options = SCHEDULERS[name]
    unet, image = local(), picture(8, 8)
    given = run(pipeline(unet, scheduler=kind(**BETAS, **options)), image, num_inference_steps=6)

    scheduler, generator = kind(**BETAS, **options), seeded()
    condition = upscale_bicubic(torch.from_numpy(image).permute(2, 0, 1)[None], 2)
    scheduler.set_timesteps(6)
    x = torch.randn(1, 3, 16, 16, generator=generator, dtype=torch.float64) * scheduler.init_noise_sigma
    takes_generator = "generator" in kind.step.__code__.co_varnames
    for t in scheduler.timesteps:
        with torch.no_grad():
            epsilon = unet(scheduler.scale_model_input(x, t), t, condition).sample
        x = scheduler.step(epsilon, t, x, **({"generator": generator} if takes_generator else {})).prev_sample
    assert torch.equal(given, x.clamp(0, 1))


def test_eta_reaches_ddim_and_is_refused_elsewhere():
    pipe, image = pipeline(), picture(4, 4)
    assert not torch.equal(run(pipe, image, eta=1.0), run(pipe, image))
    assert not torch.equal(run(pipe, image, eta=1.0, generator=seeded(1)), run(pipe, image, eta=1.0))
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(BinarizeError, match=r"eta=0.5: EulerDiscreteScheduler takes no eta"):
        run(pipe, image, eta=0.5)


def test_the_default_scheduler_is_the_released_one():
    released = diffusers.DDIMScheduler(**BETAS)
    assert default_scheduler().config == released.config == pipeline().scheduler.config


def test_a_scheduler_of_other_timesteps_is_refused_at_once_and_when_swapped():
    message = "trained with 1000 timesteps, but DDIMScheduler has num_train_timesteps=2000"
    with pytest.raises(BinarizeError, match=message):
        pipeline(local(num_train_timesteps=1000))
    pipe = pipeline(local(num_train_timesteps=1000), scheduler=diffusers.DDIMScheduler())
    pipe.scheduler = default_scheduler()
    with pytest.raises(BinarizeError, match=message):
        run(pipe, picture(2, 2))


def test_a_scheduler_of_another_kind_is_refused():
    with pytest.raises(BinarizeError, match="FlowMatchEulerDiscreteScheduler is no scheduler for noise prediction"):
        pipeline(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=2000))


# ---- sizes


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40), scale=st.sampled_from([2, 3, 4]))
def test_any_size_is_padded_by_reflection_or_by_its_edge_and_cropped_back(height, width, scale):
    unet, image = local(), picture(height, width)
    images = run(pipeline(unet, scale=scale), image, num_inference_steps=1)
    assert images.shape == (1, 3, height * scale, width * scale)
    assert images.isfinite().all()
    expected = upscale_bicubic(torch.from_numpy(image).permute(2, 0, 1)[None], scale).numpy()
    for axis in (2, 3):
        side = expected.shape[axis]
        pad = [(0, -side % 8) if a == axis else (0, 0) for a in range(4)]
        expected = np.pad(expected, pad, mode="reflect" if -side % 8 < side else "edge")
    np.testing.assert_array_equal(unet.seen[0][2].numpy(), expected)


def test_padding_noise_is_white_and_the_same_in_every_call():
    unet = local()
    for seed in (0, 1):
        run(pipeline(unet), picture(18, 18), generator=seeded(seed), num_inference_steps=1)
    one, other = (sample for sample, _, _ in unet.seen)
    assert not torch.equal(one[..., :36, :36], other[..., :36, :36])
    assert torch.equal(one[..., 36:], other[..., 36:])
    rim = torch.cat([one[..., 36:].flatten(), one[..., 36:, :36].flatten()])
    assert abs(rim.mean()) < 0.1
    assert abs(rim.std() - 1) < 0.1


def test_a_network_that_names_no_multiple_gets_multiples_of_eight():
    unet = local()
    unet.__class__ = type("Silent", (Local,), {"size_multiple": property(lambda self: self.missing)})
    run(pipeline(unet), picture(2, 5), num_inference_steps=1)
    assert unet.seen[0][0].shape == (1, 3, 8, 16)


def test_scale_one_restores_a_picture_of_its_own_size():
    unet, image = local(), picture(8, 8)
    assert run(pipeline(unet, scale=1), image).shape == (1, 3, 8, 8)
    torch.testing.assert_close(unet.seen[0][2][0].movedim(0, -1).numpy(), image, rtol=0, atol=1e-12)


# ---- randomness


def test_latents_are_what_the_generator_would_have_drawn():
    pipe, image = pipeline(), picture(5, 7)
    noise = torch.randn(1, 3, 10, 14, generator=seeded(), dtype=torch.float64)
    state = torch.get_rng_state()
    given = run(pipe, image, generator=None, latents=noise)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(given, run(pipe, image))
    assert not torch.equal(given, run(pipe, image, generator=seeded(1)))


@pytest.mark.parametrize("scheduler", [diffusers.DDIMScheduler, diffusers.DDPMScheduler])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_list_with_generators_equals_its_pictures_one_by_one(scheduler, batch_size):
    pipe = pipeline(scheduler=scheduler(**BETAS))
    images = [picture(4, 6, seed=0), picture(4, 6, seed=1), picture(3, 3, seed=2), picture(4, 6, seed=3)]
    together = run(pipe, images, generator=[seeded(i) for i in range(4)], batch_size=batch_size)
    assert [tuple(t.shape) for t in together] == [(3, 8, 12), (3, 8, 12), (3, 6, 6), (3, 8, 12)]
    for i, image in enumerate(images):
        alone = run(pipe, image, generator=seeded(i))[0]
        torch.testing.assert_close(together[i], alone, rtol=0, atol=0 if batch_size == 1 else 1e-12)


def test_a_list_with_one_generator_equals_successive_calls():
    pipe = pipeline(scheduler=diffusers.DDPMScheduler(**BETAS))
    images = [picture(3, 5), picture(4, 4, seed=1)]
    generator = seeded()
    apart = [run(pipe, image, generator=generator)[0] for image in images]
    for one, other in zip(run(pipe, images), apart, strict=True):
        assert torch.equal(one, other)


def test_batch_size_counts_tiles_too():
    unet = local()
    pipe, image = pipeline(unet), picture(20, 20)
    one = run(pipe, image, tile=24, overlap=8)
    unet.seen.clear()
    four = run(pipe, image, tile=24, overlap=8, batch_size=4)
    assert {sample.shape[0] for sample, _, _ in unet.seen} == {4}
    torch.testing.assert_close(one, four, rtol=0, atol=1e-12)


# ---- what goes in and what comes out


def test_every_form_of_a_picture_gives_the_same():
    pipe = pipeline()
    levels = (picture(5, 6) * 255).astype(np.uint8)
    expected = run(pipe, levels)
    planes = torch.from_numpy(levels).permute(2, 0, 1)
    pil = Image.fromarray(levels)
    # uint8 is divided in float32
    for image in (pil, to_image(pil), levels[None], planes, planes[None], planes.float() / 255, [pil], (planes,)):
        assert torch.equal(run(pipe, image), expected)
    for image in (levels / 255, planes.double() / 255, (levels.astype(np.uint16) * 257)):
        torch.testing.assert_close(run(pipe, image), expected, rtol=0, atol=1e-6)
    for image in (planes.bfloat16() / 255, (levels / 255).astype(np.float16)):
        torch.testing.assert_close(run(pipe, image), expected, rtol=0, atol=1e-2)


def test_output_types_agree():
    pipe, image = pipeline(), (picture(5, 6) * 255).astype(np.uint8)
    tensors = run(pipe, [image, image])
    assert tensors.shape == (2, 3, 10, 12)
    arrays = run(pipe, [image, image], output_type="np")
    assert arrays.dtype == np.float32
    np.testing.assert_array_equal(arrays, tensors.permute(0, 2, 3, 1).float().numpy())
    pils = run(pipe, [image, image], output_type="pil")
    assert [p.mode for p in pils] == ["RGB", "RGB"]
    for pil, array in zip(pils, arrays, strict=True):
        assert np.abs(np.asarray(pil) / 255 - array).max() <= 0.5 / 255 + 1e-6
    (alone,) = pipe(image, 3, generator=seeded(), return_dict=False)
    assert alone[0].tobytes() == pils[0].tobytes()


@pytest.mark.parametrize("output_type", ["pt", "np"])
def test_results_of_different_shapes_come_as_a_list(output_type):
    images = run(pipeline(), [picture(2, 3), picture(3, 2), picture(2, 3, channels=4)], output_type=output_type)
    channels_last = [(4, 6, 3), (6, 4, 3), (4, 6, 4)]
    assert [i.shape for i in images] == (
        channels_last if output_type == "np" else [(c, h, w) for h, w, c in channels_last]
    )


MODES = {
    "RGB": "RGB",
    "RGBA": "RGBA",
    "L": "L",
    "LA": "LA",
    "P": "RGB",
    "1": "L",
    "CMYK": "RGB",
    "I;16": "I;16",
}


@pytest.mark.parametrize("mode", MODES)
def test_each_kind_of_picture_comes_back_as_its_kind(mode):
    if mode == "I;16":
        image = Image.fromarray((picture(4, 6, 1)[..., 0] * 65535).astype(np.uint16))
    else:
        image = Image.fromarray((picture(4, 6, 4) * 255).astype(np.uint8)).convert(mode)
    (large,) = run(pipeline(), image, output_type="pil")
    assert (large.mode, large.size) == (MODES[mode], (12, 8))


def test_transparency_is_enlarged_bicubically():
    image = picture(4, 6, channels=4)
    expected = upscale_bicubic(torch.from_numpy(image).permute(2, 0, 1)[3:, None], 2)[0]
    pipe = pipeline()
    large = run(pipe, image)[0]
    torch.testing.assert_close(large[3:], expected, rtol=0, atol=1e-12)
    assert torch.equal(large[:3], run(pipe, image[..., :3])[0])
    grey = run(pipe, image[..., 2:])[0]
    torch.testing.assert_close(grey[3:], expected, rtol=0, atol=1e-12)


def test_exif_orientation_is_applied_once():
    image = Image.fromarray((picture(4, 6) * 255).astype(np.uint8))
    turned = image.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # shown rotated by 90 degrees clockwise
    (large,), (expected,) = (run(pipeline(), i, output_type="pil") for i in (turned, image))
    assert large.size == (12, 8)
    assert large.tobytes() == expected.tobytes()
    assert 0x0112 not in large.getexif()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": []}, "image is an empty list"),
        ({"image": "small.png"}, r"type str; allowed: .* Open a file with binarize.imaging.read_image"),
        ({"image": Path("small.png")}, r"Open a file with"),
        ({"image": np.zeros(3)}, r"ndarray of shape \(3,\)"),
        ({"image": np.zeros((4, 4, 5))}, r"image has the shape \(4, 4, 5\)"),
        ({"image": np.zeros((0, 4, 3))}, r"image has the shape \(0, 4, 3\)"),
        ({"image": np.zeros((4, 4), dtype=np.int32)}, r"image has the type int32; allowed: uint8, uint16"),
        ({"image": np.full((4, 4), 255.0)}, r"values from 255 to 255; .* Divide 8-bit levels by 255"),
        ({"image": torch.full((3, 4, 4), float("nan"))}, "values from nan to nan"),
        ({"num_inference_steps": 0}, "num_inference_steps=0; allowed: a whole number from 1 to the .* 2000"),
        ({"num_inference_steps": 2001}, "num_inference_steps=2001"),
        ({"batch_size": 0}, "batch_size=0; allowed: a whole number of at least 1"),
        ({"eta": 2.0}, "eta=2.0; allowed: from 0"),
        ({"output_type": "pill"}, "unknown output_type 'pill'; options: 'pil', 'np', 'pt'. Did you mean 'pil'"),
        ({"generator": [seeded(), seeded()]}, "2 generators for 1 images"),
        ({"generator": 7}, r"generator holds 7; .* pass torch.Generator\(\).manual_seed\(SEED\)"),
        ({"generator": [None]}, "generator holds None"),
        ({"latents": np.zeros((1, 3, 8, 8))}, "latents hold a ndarray; allowed: a tensor"),
        ({"latents": torch.zeros(1, 3, 4, 4)}, r"latents have the shapes \[\(3, 4, 4\)\]; needed: \[\(3, 8, 8\)\]"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"has \['noise'\]; allowed: \['latents', 'condition'\]"),
        ({"tile": 8, "overlap": 8}, "overlap=8 with tile=8"),
    ],
)
def test_bad_arguments_are_refused_before_the_network_runs(options, message):
    unet = local()
    with pytest.raises(BinarizeError, match=message):
        run(pipeline(unet), **{"image": np.zeros((4, 4, 3)), **options})
    assert not unet.seen


@pytest.mark.parametrize("scale", [None, 0, 2.0, True])
def test_a_scale_is_needed(scale):
    with pytest.raises(BinarizeError, match=r"a pipeline needs the whole number, 1 or more"):
        pipeline(scale=scale)


# ---- as a diffusers pipeline


def test_modes_are_restored_even_after_an_error():
    unet = local(drop=0.9)
    unet.train()
    unet.first.eval()
    pipe, image = pipeline(unet), picture(4, 4)
    assert torch.equal(run(pipe, image), run(pipe, image))
    assert [part.training for part in (unet, unet.first, unet.second, unet.dropout)] == [True, False, True, True]
    with pytest.raises(ZeroDivisionError):
        run(pipe, image, callback_on_step_end=lambda *_: 1 / 0)
    assert [part.training for part in (unet, unet.first, unet.second, unet.dropout)] == [True, False, True, True]
    assert not run(pipe, image).requires_grad


def test_a_callback_sees_each_step_and_may_replace_the_sample():
    pipe, image, seen = pipeline(), picture(4, 5), []

    def callback(of: SuperResolutionPipeline, step: int, timestep: Tensor, tensors: dict) -> dict | None:
        assert of is pipe
        seen.append((step, int(timestep), *(tuple(t.shape) for t in tensors.values())))
        return {"latents": torch.full_like(tensors["latents"], 0.25)} if step == 1 else None

    inputs = ["latents", "condition"]
    large = run(
        pipe, image, num_inference_steps=2, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=inputs
    )
    assert seen == [(0, 1000, (1, 3, 8, 16), (1, 3, 8, 16)), (1, 0, (1, 3, 8, 16), (1, 3, 8, 16))]
    assert (large == 0.25).all()

    class Last(PipelineCallback):
        tensor_inputs = ["condition", "latents"]

        def callback_fn(self, pipe, step, timestep, tensors):
            return {"latents": tensors["condition"]}

    large = run(pipe, image, callback_on_step_end=Last())
    torch.testing.assert_close(large, upscale_bicubic(torch.from_numpy(image).permute(2, 0, 1)[None], 2))


def test_progress_counts_the_steps_of_every_picture(capsys):
    pipe = pipeline()
    run(pipe, [picture(2, 2), picture(2, 3)])
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config()
    run(pipe, [picture(2, 2), picture(2, 3)])
    assert "6/6" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_sample_keeps_at_least_float32_whatever_the_network_computes_in(dtype):
    unet = local()
    pipe = pipeline(unet).to("cpu", dtype)
    large = run(pipe, picture(4, 4))
    assert large.dtype == torch.promote_types(dtype, torch.float32)
    assert {sample.dtype for sample, _, _ in unet.seen} == {dtype}


def test_a_saved_pipeline_comes_back_whole(tmp_path):
    pipe = pipeline(scale=3, scheduler=diffusers.DPMSolverMultistepScheduler(**BETAS)).to(torch.float32)
    pipe.save_pretrained(tmp_path)
    assert isinstance(Local.from_pretrained(tmp_path / "unet"), Local)
    again = SuperResolutionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.scale == 3
    assert isinstance(again.scheduler, diffusers.DPMSolverMultistepScheduler)
    assert torch.equal(run(again, picture(3, 4)), run(pipe, picture(3, 4)))
    swapped = SuperResolutionPipeline.from_pretrained(tmp_path, scheduler=default_scheduler(), scale=2)
    assert (swapped.scale, type(swapped.scheduler)) == (2, diffusers.DDIMScheduler)


# ---- with the real network


@pytest.fixture
def srunet() -> SRUNet:
    return SRUNet(base_channels=16, channel_mults=(1, 2), res_blocks=1, norm_groups=8).double()


@pytest.mark.parametrize("name", ["ddim", "dpm-solver++", "euler", "heun"])
def test_srunet_runs_under_every_scheduler_as_in_a_plain_diffusers_loop(srunet, name):
    kind, options = SCHEDULERS[name]
    image, noise = picture(4, 6), torch.randn(1, 3, 8, 12, generator=seeded(), dtype=torch.float64)
    given = run(pipeline(srunet, scheduler=kind(**BETAS, **options)), image, latents=noise)

    scheduler = kind(**BETAS, **options)
    scheduler.set_timesteps(3)
    condition = upscale_bicubic(torch.from_numpy(image).permute(2, 0, 1)[None], 2)
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        with torch.no_grad():
            epsilon = srunet.eval()(scheduler.scale_model_input(x, t), t, condition).sample
        x = scheduler.step(epsilon, t, x).prev_sample
    torch.testing.assert_close(given, x.clamp(0, 1), rtol=0, atol=1e-10)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (5, 3)])
@pytest.mark.parametrize("tile", [None, 4])
def test_srunet_takes_any_size_and_tiles(srunet, size, tile):
    large = run(pipeline(srunet, scale=3), picture(*size), tile=tile)
    assert large.shape == (1, 3, 3 * size[0], 3 * size[1])
    assert large.isfinite().all()


def test_a_converted_network_comes_back_with_its_pipeline_in_a_fresh_process(srunet, tmp_path):
    binarize.convert(srunet, "bidiffsr")
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
    fixture = FIXTURES / "small.safetensors"
    with safe_open(fixture, "pt") as file:
        config = json.loads(file.metadata()["config"])
        x, condition, expected = (file.get_tensor(name) for name in ("x_t", "lr", "ddim10"))
    unet = load_official(FIXTURES / "small.pth", **config).double()
    # The enlarged picture is given as it is: scale 1.
    given = run(pipeline(unet, scale=1), condition, latents=x, num_inference_steps=10)
    # diffusers computes its alphas as a float32 cumulative product, whose rounding depends on the CPU.
    torch.testing.assert_close(given, expected.clamp(0, 1), rtol=0, atol=1e-6)


def test_the_how_to_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "howto" / "upscale.md").read_text(encoding="utf-8")
    exec(compile("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), "upscale.md", "exec"), {})
    with Image.open("large.png") as large:
        assert large.size == (128, 96)
