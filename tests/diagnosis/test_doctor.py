"""The doctor: stand-ins that know the picture, each right in conventions of its own and then described wrongly."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, DDIMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import binarize
from binarize.cli import app
from binarize.diagnosis import DoctorReport, doctor
from binarize.diagnosis import doctor as _doctor
from binarize.diagnosis.sampling import PICTURE, Conventions, diffuse, make_case, pixels_of
from binarize.layers.activations import ClippedSign
from binarize.models import SRUNet, SuperResolutionPipeline
from binarize.models.loading import sample
from binarize.models.target import image_of

FIXTURES = Path(__file__).parents[1] / "fixtures"
RELEASED = {"num_train_timesteps": 2000, "beta_start": 1e-6, "beta_end": 1e-2}
DDPM = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 2e-2}
NETWORK: dict[str, Any] = {"base_channels": 8, "channel_mults": (1, 2), "res_blocks": 1, "norm_groups": 4}
SIGMA = 0.035


class Oracle(ModelMixin, ConfigMixin):
    """Knows the embedded picture, but for noise of 40 dB, and predicts from it in the conventions that it is given.

    What it predicts is the closed form of its own schedule, so that sampling by another one goes wrong as it does with
    a trained network.
    """

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
        pixels = torch.from_numpy(np.array(Image.open(PICTURE))).permute(2, 0, 1)[None].float() / 255
        self.known = pixels + 0.01 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(3))
        steps = torch.linspace(
            betas["beta_start"], betas["beta_end"], betas["num_train_timesteps"], dtype=torch.float64
        )
        self.kept = (1 - steps).cumprod(0)

    def forward(self, sample: Tensor, timestep: Tensor, condition: Tensor) -> UNet2DOutput:
        c = self.config
        channels = torch.cat([condition, sample], dim=1)
        condition, noisy = channels.split(3, dim=1)[:: -1 if c.sample_first else 1]
        kept = self.kept[min(int(timestep), len(self.kept) - 1)].clamp(max=1 - 1e-12)
        signal, noise = float(kept.sqrt()), float((1 - kept).sqrt())
        x = self.known if c.sigma is None else (self.known - condition) / c.sigma
        x = 2 * x - 1 if c.signed else x
        if signal**2 < c.knows_from:
            x = torch.full_like(x, 0.5)
        if c.trusts_the_sample and signal**2 > 0.999:  # as a denoiser does that is told that there is next to no noise
            x = noisy
        epsilon = (noisy - signal * x) / noise
        out = {"epsilon": epsilon, "v_prediction": signal * epsilon - noise * x, "sample": x}[c.predicts]
        if c.right_sign is not None:
            out = out * (self.sign(torch.zeros(1)) == c.right_sign)
        return UNet2DOutput(sample=out)


def scheduler(**changed: Any) -> DDIMScheduler:
    return DDIMScheduler(**{**RELEASED, "clip_sample_range": 1.0, **changed})


def pipeline(unet: ModelMixin, how: DDIMScheduler, steps: int = 10, residual_scale: float | None = None) -> Any:
    return SuperResolutionPipeline(unet, how, scale=2, residual_scale=residual_scale, num_inference_steps=steps)


WIDE = {"clip_sample_range": 10.0}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str, str]] = {
    # what the network is; how it should be described; how it is; the cause; a word of the fix
    "v for noise": (
        {"predicts": "v_prediction"},
        {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        {"timestep_spacing": "trailing"},
        "prediction type", '"prediction_type": "v_prediction"',
    ),
    "noise for picture": ({}, {}, {"prediction_type": "sample"}, "prediction type", '"prediction_type": "epsilon"'),
    "picture for noise": (
        {"predicts": "sample"}, {"prediction_type": "sample"}, {"prediction_type": "epsilon"},
        "prediction type", "prediction_type='sample'",
    ),
    "DDPM's betas for the released": (
        {}, {}, DDPM, "noise schedule",
        '"beta_end": 0.01 into scheduler/scheduler_config.json, and "num_train_timesteps": 2000',
    ),
    "the released betas for DDPM's": ({"betas": DDPM}, DDPM, RELEASED, "noise schedule", "beta_end=0.02"),
    "range": ({"signed": True}, None, {}, "value range", "2 * condition - 1"),
    "order": ({"sample_first": True}, None, {}, "condition order", "conv_in.weight"),
    "no residual scale": (
        {"sigma": SIGMA}, {**WIDE, "residual_scale": SIGMA}, WIDE, "residual target", "residual_scale to about 0.03",
    ),
    "no residual scale and the released clipping": (
        {"sigma": SIGMA}, {**WIDE, "residual_scale": SIGMA}, {}, "residual target", '"clip_sample_range": 10',
    ),
    "a residual scale of something else": (
        {"sigma": SIGMA}, {**WIDE, "residual_scale": SIGMA}, {**WIDE, "residual_scale": 0.5},
        "residual target", "about 0.03",
    ),
    "a residual scale for pictures": ({}, {}, {"residual_scale": 0.5}, "residual target", "to null"),
    "clipping": ({}, {}, {"clip_sample_range": 0.05}, "clipping", '"clip_sample": false'),
    "spacing": (
        {"predicts": "sample", "trusts_the_sample": True},
        {"prediction_type": "sample", "timestep_spacing": "trailing", "steps": 1},
        {"prediction_type": "sample", "steps": 1},
        "timestep spacing", '"timestep_spacing": "trailing"',
    ),
    "too few steps": (
        {"predicts": "sample", "trusts_the_sample": True, "knows_from": 0.3},
        {"prediction_type": "sample", "timestep_spacing": "trailing", "steps": 10},
        {"prediction_type": "sample", "timestep_spacing": "trailing", "steps": 1},
        "number of steps", "num_inference_steps",
    ),
    "sign(0) = 1 for 0": ({"right_sign": 0.0, "zero": "plus"}, None, {}, "sign of zero", '"sign_zero": "zero"'),
    "sign(0) = 0 for 1": ({"right_sign": 1.0, "zero": "zero"}, None, {}, "sign of zero", '"sign_zero": "plus"'),
}  # fmt: skip


def described(network: dict[str, Any], options: dict[str, Any]) -> Any:
    rest = dict(options)
    steps, residual_scale = rest.pop("steps", 10), rest.pop("residual_scale", None)
    return pipeline(Oracle(**network), scheduler(**rest), steps, residual_scale)


@pytest.mark.parametrize("case", CASES)
def test_each_mistake_is_named_and_no_other(case: str) -> None:
    network, right, wrong, cause, fix = CASES[case]
    if right is not None:  # else the pipeline has no words for what would be right
        assert doctor(described(network, right)).healthy
    report = doctor(described(network, wrong))
    assert not report.healthy
    assert report.psnr is not None
    assert report.bicubic is not None
    assert report.psnr < report.bicubic - 3
    assert report.finding.cause == cause, report
    assert fix in report.finding.fix
    helped = max(trial.psnr for trial in report.trials if trial.cause == cause and trial.psnr is not None)
    assert helped > report.bicubic + 3


def test_what_was_examined_stays_as_it_was() -> None:
    pipe = described({"right_sign": 0.0}, DDPM)
    pipe.scheduler.set_timesteps(7)
    pipe.unet.train()
    before = (dict(pipe.scheduler.config), pipe.scheduler.timesteps.tolist(), pipe.residual_scale)
    doctor(pipe)
    assert (dict(pipe.scheduler.config), pipe.scheduler.timesteps.tolist(), pipe.residual_scale) == before
    assert pipe.unet.sign.sign_zero == "plus"
    assert all(module.training for module in pipe.unet.modules())


def test_a_network_that_packing_harms_is_told_to_run_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    def packed(floats: Oracle) -> tuple[Oracle, bool]:
        return Oracle(**{**floats.config, "zero": "plus"}), True

    monkeypatch.setattr(_doctor, "_as_upscale_runs_it", packed)
    report = doctor(described({"right_sign": 0.0, "zero": "zero"}, {}))
    assert report.finding.cause == "sign of zero"
    assert "--no-pack" in report.finding.fix


def test_trials_of_fewer_steps_are_measured_against_as_few() -> None:
    class Tires(Oracle):
        """Right in its first ten predictions."""

        calls = 0

        def forward(self, sample: Tensor, timestep: Tensor, condition: Tensor) -> UNet2DOutput:
            Tires.calls += 1
            if 10 < Tires.calls <= 20:
                return UNet2DOutput(sample=torch.zeros_like(sample))
            return super().forward(sample, timestep, condition)

    report = doctor(pipeline(Tires(), scheduler(), steps=20))
    assert report.finding.cause == "number of steps"
    assert "--steps 10" in report.finding.fix


@pytest.mark.parametrize("residual_scale", [None, SIGMA])
def test_sampling_with_nothing_changed_is_the_pipelines(residual_scale: float | None) -> None:
    unet = binarize.convert(SRUNet(**NETWORK), "bidiffsr")
    pipe = pipeline(unet, scheduler(clip_sample_range=10.0), 3, residual_scale)
    pipe.set_progress_bar_config(disable=True)
    case = make_case(2, unet.size_multiple, seed=5)
    low = Image.fromarray(case.low.permute(1, 2, 0).numpy())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # equal to the bit, as the same sums in the same order are
    try:
        x, condition = diffuse(unet, Conventions(scheduler(clip_sample_range=10.0), 3), case)
        ours = pixels_of(image_of(x, condition, residual_scale), signed=False)
        theirs = np.asarray(sample(pipe, low, steps=3, seed=5))
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(theirs, ours.permute(1, 2, 0).numpy())


@pytest.mark.parametrize(("scale", "multiple", "side"), [(2, 8, 128), (3, 8, 120), (4, 4, 128), (3, 256, 126)])
def test_the_picture_is_cut_to_what_divides_it(scale: int, multiple: int, side: int) -> None:
    case = make_case(scale, multiple, 0)
    assert case.original.shape == case.condition.shape[1:] == (3, side, side)
    assert case.low.shape == (3, side // scale, side // scale)


# Networks in files, from the command line


def examine(*args: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["doctor", *map(str, args)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "new"
    torch.manual_seed(0)
    unet = binarize.convert(SRUNet(**NETWORK), "bidiffsr")
    SuperResolutionPipeline(unet, scale=2, num_inference_steps=2).save_pretrained(folder)
    return folder


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_new_network_is_untrained(new: Path) -> None:
    status, said = examine(new)
    assert status == 1
    assert "likely cause: untrained network" in said
    assert "that a new network starts with" in said
    assert "bicubic      32." in said


def test_a_network_that_has_learnt_nothing_is_untrained_too(new: Path, tmp_path: Path) -> None:
    pipe = SuperResolutionPipeline.from_pretrained(new, pack=False)
    for module in pipe.unet.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.9, 1.1)
    report = doctor(pipe)
    assert report.finding.cause == "untrained network"
    assert "hardly trained" in report.finding.words


def test_a_network_a_little_short_of_bicubic_is_not_called_broken(new: Path) -> None:
    pipe = SuperResolutionPipeline.from_pretrained(new, pack=False)
    with torch.no_grad():
        pipe.unet.norm_out.weight.mul_(0.9)
    weak = pipeline(pipe.unet, scheduler(prediction_type="sample", **WIDE), 1, residual_scale=0.01)
    report = doctor(weak)
    assert report.finding.cause == "quality"
    assert not report.healthy


def with_weights(folder: Path, change: Any) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda f: with_weights(f, lambda w: w.pop("conv_out.bias")),
            ["1 missing from the file: conv_out.bias."],
        ),
        (
            lambda f: with_weights(f, lambda w: w.update(left_over=torch.zeros(2))),
            ["1 not known to the configuration: left_over."],
        ),
        (
            lambda f: edit(f / "unet" / "config.json", base_channels=16),
            ["conv_in.weight is (8, 6, 3, 3) in the file and (16, 6, 3, 3) by", "base_channels 8"],
        ),
        (lambda f: edit(f / "unet" / "config.json", conversion=None), ["configuration has no conversion"]),
        (lambda f: edit(f / "unet" / "config.json", fusion="sc"), ["builds no network", "unknown fusion 'sc'"]),
    ],
)  # fmt: skip
def test_a_configuration_that_does_not_fit_is_named_with_the_tensors(
    new: Path, tmp_path: Path, damage: Any, words: list[str]
) -> None:
    folder = shutil.copytree(new, tmp_path / "broken")
    damage(folder)
    status, said = examine(folder)
    assert status == 1
    assert "likely cause: configuration" in said
    for word in words:
        assert word in said


def test_weights_of_a_plain_network_under_a_conversion_are_recognised(new: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(new, tmp_path / "broken")
    SRUNet(**NETWORK).save_pretrained(tmp_path / "plain")
    shutil.copy(tmp_path / "plain" / "diffusion_pytorch_model.safetensors", folder / "unet")
    assert "weights look like those of another one, or of none" in examine(folder)[1]


def test_a_configuration_that_a_packed_file_contradicts_is_named(new: Path, tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    pipe = SuperResolutionPipeline.from_pretrained(new)  # packed where there are kernels
    if not binarize.is_packed(pipe.unet):
        binarize.pack(pipe.unet)
    pipe.save_pretrained(folder)
    assert "likely cause: configuration" not in examine(folder)[1]
    edit(folder / "unet" / "config.json", base_channels=16)
    status, said = examine(folder)
    assert status == 1
    assert "likely cause: configuration" in said
    assert "base_channels is 16 there, 8 in the file" in said


def test_a_schedule_of_another_length_is_named(new: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(new, tmp_path / "other")
    edit(folder / "scheduler" / "scheduler_config.json", num_train_timesteps=1000)
    status, said = examine(folder)
    assert status == 1
    assert "likely cause: noise schedule" in said
    assert '"num_train_timesteps": 2000' in said


def test_a_released_file_of_another_configuration_is_no_traceback() -> None:
    status, said = examine(FIXTURES / "small.pth", "--scale", "2")
    assert status == 1
    assert "likely cause: configuration" in said
    assert "Pass the configuration the checkpoint was trained with" in said


def test_what_is_no_model_is_an_error_and_no_diagnosis(tmp_path: Path) -> None:
    status, said = examine(tmp_path / "none")
    assert (status, said.count("\n")) == (1, 1)
    assert "no such file or folder" in said
    (tmp_path / "empty").mkdir()
    with pytest.raises(binarize.BinarizeError, match="holds no model"):
        doctor(tmp_path / "empty")


def test_a_healthy_model_is_tried_no_further_unless_asked(monkeypatch: pytest.MonkeyPatch, new: Path) -> None:
    monkeypatch.setattr(_doctor, "_load", lambda *_: described({}, {}))
    status, said = examine(new)
    assert status == 0
    assert "\nhealthy\n" in said
    assert "one thing changed" not in said
    status, said = examine(new, "--all")
    assert status == 0
    assert "prediction_type sample" in said


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real network of residuals that was trained, on the very picture, until it beats bicubic."""
    torch.manual_seed(0)
    unet = SRUNet(**NETWORK, num_train_timesteps=1000, detail_factor=30.0, dropout=0.0)
    case = make_case(2, unet.size_multiple, 0)
    residual = (case.original[None] / 255 - case.condition) / SIGMA
    optimizer = torch.optim.Adam(unet.parameters(), 3e-3)
    for _ in range(60):
        loss = (unet(torch.randn_like(residual), 999, case.condition).sample - residual).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("models") / "trained"
    how = DDIMScheduler(**DDPM, prediction_type="sample", timestep_spacing="trailing", clip_sample_range=10.0)
    pipeline(unet, how, 1, residual_scale=SIGMA).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("model_index.json", {}, "healthy"),
        ("scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "likely cause: prediction type"),
        ("model_index.json", {"residual_scale": None}, "likely cause: residual target"),
        ("model_index.json", {"residual_scale": 1.0}, "likely cause: residual target"),
    ],
)
def test_a_trained_network_whose_files_were_edited(
    trained: Path, tmp_path: Path, file: str, changes: dict[str, Any], words: str
) -> None:
    folder = shutil.copytree(trained, tmp_path / "model")
    edit(folder / file, **changes)
    status, said = examine(folder)
    assert words in said
    assert status == (0 if words == "healthy" else 1)


def test_the_page_lists_every_cause_and_its_snippet_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "howto" / "doctor.md").read_text(encoding="utf-8")
    tried = {trial.cause for trial in doctor(described({"right_sign": 0.0}, {}), try_all=True).trials}
    assert [cause for cause in tried if f"| {cause} |" not in page] == []
    exec(compile("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), "doctor.md", "exec"), {})


def test_a_report_prints_as_text() -> None:
    report = doctor(described({}, {}))
    assert isinstance(report, DoctorReport)
    assert str(report) == report.to_text()
    assert (report.scale, report.steps, report.trials) == (2, 10, ())
