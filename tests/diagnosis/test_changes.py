"""The doctor on networks that know the image, each correct under its own conventions and described wrongly."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_case import NETWORK
from diffusers import ConfigMixin, DDIMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image
from torch import Tensor, nn

import binarize
from binarize.diagnosis import doctor
from binarize.diagnosis.sampling import IMAGE, Conventions, diffuse, make_case, pixels_of
from binarize.layers.activations import ClippedSign
from binarize.models import SRUNet, SuperResolutionPipeline
from binarize.models.loading import sample
from binarize.models.target import image_of

RELEASED = {"num_train_timesteps": 2000, "beta_start": 1e-6, "beta_end": 1e-2}
DDPM = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 2e-2}
UNCLIPPED = {"clip_sample_range": 10.0}
SIGMA = 0.035


class Oracle(ModelMixin, ConfigMixin):
    """Knows the embedded image, up to noise of 40 dB, and predicts by the closed form of its own conventions."""

    size_multiple = 8

    @register_to_config
    def __init__(
        self,
        predicts: str = "epsilon",
        betas: dict[str, Any] = RELEASED,
        signed: bool = False,
        sample_first: bool = False,
        sigma: float | None = None,
        trusts_the_sample: bool = False,
        knows_from: float = 0.0,
        right_sign: float | None = None,
        zero: str = "plus",
    ) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.sign = ClippedSign(zero) if right_sign is not None else nn.Identity()  # type: ignore[arg-type]
        pixels = torch.from_numpy(np.array(Image.open(IMAGE))).permute(2, 0, 1)[None].float() / 255
        self.known = pixels + 0.01 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(3))
        count = betas["num_train_timesteps"]
        self.kept = (1 - torch.linspace(betas["beta_start"], betas["beta_end"], count, dtype=torch.float64)).cumprod(0)

    def forward(self, sample: Tensor, timestep: Tensor, condition: Tensor) -> UNet2DOutput:
        c = self.config
        condition, noisy = torch.cat([condition, sample], dim=1).split(3, dim=1)[:: -1 if c.sample_first else 1]
        kept = self.kept[min(int(timestep), len(self.kept) - 1)].clamp(max=1 - 1e-12)
        signal, noise = float(kept.sqrt()), float((1 - kept).sqrt())
        x = self.known if c.sigma is None else (self.known - condition) / c.sigma
        x = 2 * x - 1 if c.signed else x
        if signal**2 < c.knows_from:
            x = torch.full_like(x, 0.5)
        if c.trusts_the_sample and signal**2 > 0.999:  # as a denoiser does if there is next to no noise
            x = noisy
        epsilon = (noisy - signal * x) / noise
        out = {"epsilon": epsilon, "v_prediction": signal * epsilon - noise * x, "sample": x}[c.predicts]
        if c.right_sign is not None:
            out = out * (self.sign(torch.zeros(1)) == c.right_sign)
        return UNet2DOutput(sample=out)


def scheduler(**changed: Any) -> DDIMScheduler:
    return DDIMScheduler(**{**RELEASED, "clip_sample_range": 1.0, **changed})


def described(network: dict[str, Any], options: dict[str, Any]) -> Any:
    """Return an oracle in a pipeline whose scheduler, steps and residual scale are `options`."""
    rest = dict(options)
    steps, residual_scale = rest.pop("steps", 10), rest.pop("residual_scale", None)
    settings = {"scale": 2, "residual_scale": residual_scale, "num_inference_steps": steps}
    return SuperResolutionPipeline(Oracle(**network), scheduler(**rest), **settings)


DENOISER = {"predicts": "sample", "trusts_the_sample": True}
SAMPLE = {"prediction_type": "sample"}
RESIDUALS = ({"sigma": SIGMA}, {**UNCLIPPED, "residual_scale": SIGMA})
TRAILING = {**SAMPLE, "timestep_spacing": "trailing"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any], str, str]] = {
    # the network; its right description, if there is one; the description; the cause; part of the fix
    "v for noise": (
        {"predicts": "v_prediction"},
        {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        {"timestep_spacing": "trailing"},
        "prediction type", '"prediction_type": "v_prediction"',
    ),
    "noise for image": ({}, {}, SAMPLE, "prediction type", '"prediction_type": "epsilon"'),
    "image for noise": ({"predicts": "sample"}, SAMPLE, {}, "prediction type", "prediction_type='sample'"),
    "DDPM's betas for the released": (
        {}, {}, DDPM, "noise schedule",
        '"beta_end": 0.01 into scheduler/scheduler_config.json, and "num_train_timesteps": 2000',
    ),
    "the released betas for DDPM's": ({"betas": DDPM}, DDPM, RELEASED, "noise schedule", "beta_end=0.02"),
    "range": ({"signed": True}, None, {}, "value range", "2 * condition - 1"),
    "order": ({"sample_first": True}, None, {}, "condition order", "conv_in.weight"),
    "no residual scale": (*RESIDUALS, UNCLIPPED, "residual target", "residual_scale to about 0.03"),
    "no residual scale and the released clipping": (*RESIDUALS, {}, "residual target", '"clip_sample_range": 10'),
    "another residual scale": (*RESIDUALS, {**UNCLIPPED, "residual_scale": 0.5}, "residual target", "about 0.03"),
    "a residual scale for images": ({}, {}, {"residual_scale": 0.5}, "residual target", "to null"),
    "clipping": ({}, {}, {"clip_sample_range": 0.05}, "clipping", '"clip_sample": false'),
    "spacing": (
        DENOISER, {**TRAILING, "steps": 1}, {**SAMPLE, "steps": 1}, "timestep spacing", 'timestep_spacing": "trailing"',
    ),
    "too few steps": (
        {**DENOISER, "knows_from": 0.3}, {**TRAILING, "steps": 10}, {**TRAILING, "steps": 1},
        "number of steps", "num_inference_steps",
    ),
    "sign(0) = 1 for 0": ({"right_sign": 0.0, "zero": "plus"}, None, {}, "sign of zero", '"sign_zero": "zero"'),
    "sign(0) = 0 for 1": ({"right_sign": 1.0, "zero": "zero"}, None, {}, "sign of zero", '"sign_zero": "plus"'),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_mistake_is_named_and_no_other(case: str) -> None:
    network, right, wrong, cause, fix = CASES[case]
    if right is not None:
        assert doctor(described(network, right)).healthy
    report = doctor(described(network, wrong))
    assert not report.healthy
    assert report.psnr < report.bicubic - 3
    assert report.finding.cause == cause, report
    assert fix in report.finding.fix
    assert max(one.psnr for one in report.results if one.cause == cause and one.psnr is not None) > report.bicubic + 3


def test_the_pipeline_is_not_changed() -> None:
    pipe = described({"right_sign": 0.0}, DDPM)
    pipe.scheduler.set_timesteps(7)
    pipe.unet.train()
    before = (dict(pipe.scheduler.config), pipe.scheduler.timesteps.tolist(), pipe.residual_scale)
    doctor(pipe)
    assert (dict(pipe.scheduler.config), pipe.scheduler.timesteps.tolist(), pipe.residual_scale) == before
    assert pipe.unet.sign.sign_zero == "plus"
    assert all(module.training for module in pipe.unet.modules())


def test_a_network_that_packing_harms_must_run_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    def packed(unet: Oracle) -> tuple[Oracle, bool]:
        return Oracle(**{**unet.config, "zero": "plus"}), True

    monkeypatch.setattr("binarize.diagnosis.diagnose._pack_as_upscale_does", packed)
    report = doctor(described({"right_sign": 0.0, "zero": "zero"}, {}))
    assert report.finding.cause == "sign of zero"
    assert "--no-pack" in report.finding.fix


def test_changes_with_fewer_steps_are_compared_at_as_few(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, forward = 0, Oracle.forward

    def fails_after_ten(self: Oracle, sample: Tensor, timestep: Tensor, condition: Tensor) -> UNet2DOutput:
        nonlocal calls
        calls += 1
        if 10 < calls <= 20:
            return UNet2DOutput(sample=torch.zeros_like(sample))
        return forward(self, sample, timestep, condition)

    monkeypatch.setattr(Oracle, "forward", fails_after_ten)
    report = doctor(described({}, {"steps": 20}))
    assert report.finding.cause == "number of steps"
    assert "--steps 10" in report.finding.fix


@pytest.mark.parametrize("residual_scale", [None, SIGMA])
def test_sampling_without_a_change_is_that_of_the_pipeline(residual_scale: float | None) -> None:
    unet = binarize.convert(SRUNet(**NETWORK), "bidiffsr")
    pipe = SuperResolutionPipeline(unet, scheduler(**UNCLIPPED), scale=2, residual_scale=residual_scale)
    pipe.set_progress_bar_config(disable=True)
    case = make_case(2, unet.size_multiple, seed=5)
    low = Image.fromarray(case.low.permute(1, 2, 0).numpy())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same sums in the same order give the same bits
    try:
        x, condition = diffuse(unet, Conventions(scheduler(**UNCLIPPED), 3), case)
        ours = pixels_of(image_of(x, condition, residual_scale), signed=False)
        theirs = np.asarray(sample(pipe, low, steps=3, seed=5))
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(theirs, ours.permute(1, 2, 0).numpy())


@pytest.mark.parametrize(("scale", "multiple", "side"), [(2, 8, 128), (3, 8, 120), (4, 4, 128), (3, 256, 126)])
def test_the_image_is_cropped_to_a_multiple(scale: int, multiple: int, side: int) -> None:
    case = make_case(scale, multiple, 0)
    assert case.original.shape == case.condition.shape[1:] == (3, side, side)
    assert case.low.shape == (3, side // scale, side // scale)


def test_the_page_lists_every_cause_and_its_snippet_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "howto" / "doctor.md").read_text(encoding="utf-8")
    causes = {one.cause for one in doctor(described({"right_sign": 0.0}, {}), try_all=True).results}
    assert [cause for cause in causes if f"| {cause} |" not in page] == []
    exec(compile("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), "doctor.md", "exec"), {})


def test_a_report_prints_as_text_and_keeps_its_old_names() -> None:
    report = doctor(described({}, {}))
    assert str(report) == report.to_text()
    assert (report.scale, report.steps, report.results) == (2, 10, ())
    with pytest.warns(DeprecationWarning, match="DoctorReport.trials is now results"):
        assert report.trials == ()
    with pytest.warns(DeprecationWarning, match="Finding.words is now explanation"):
        assert report.finding.words == report.finding.explanation
