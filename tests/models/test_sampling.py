"""Which schedulers a pipeline accepts: those with which a perfect network would give its image."""

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from errors_case import assert_error
from packed_case import SMALL

import binarize
from binarize.conversion.record import conversion
from binarize.models import SRUNet, SuperResolutionPipeline
from binarize.models.sampling import MAX_TIMESTEPS, check_samples, read_scheduler, set_timesteps

RELEASED = {"num_train_timesteps": 2000, "beta_start": 1e-6, "beta_end": 1e-2, "beta_schedule": "linear"}
STABLE = {"num_train_timesteps": 1000, "beta_start": 8.5e-4, "beta_end": 1.2e-2, "beta_schedule": "scaled_linear"}
ZERO_SNR = {
    "num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
}  # fmt: skip
RIGHT = [
    "DDIM",
    "DDPM",
    "EulerDiscrete",
    "EulerAncestralDiscrete",
    "HeunDiscrete",
    "LCM",
    "TCD",
    "PNDM",
    "DPMSolverMultistep",
    "DPMSolverSinglestep",
    "UniPCMultistep",
    "DEISMultistep",
    "SASolver",
]
WRONG = [
    "EDMEuler",
    "EDMDPMSolverMultistep",
    "IPNDM",
    "CMStochasticIterative",
    "DDIMInverse",
    "DPMSolverMultistepInverse",
    "ScoreSdeVe",
    "FlowMatchEulerDiscrete",
    "FlowMatchHeunDiscrete",
]


pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")  # DEIS with numpy 2


def make(name: str, **settings: Any) -> Any:
    kind = getattr(diffusers, f"{name}Scheduler")
    known = inspect.signature(kind.__init__).parameters
    return kind(**{key: value for key, value in settings.items() if key in known})


@pytest.mark.parametrize("settings", [RELEASED, STABLE, ZERO_SNR, {**STABLE, "num_train_timesteps": 60}])
@pytest.mark.parametrize("name", RIGHT)
def test_noise_prediction_over_timesteps_is_accepted(name: str, settings: dict[str, Any]) -> None:
    check_samples(make(name, **settings))


@pytest.mark.parametrize("name", WRONG)
def test_others_are_refused_by_what_they_do(name: str) -> None:
    scheduler = make(name, **RELEASED)
    assert_error(f"{name}Scheduler is no scheduler for noise prediction over discrete", check_samples, scheduler)
    with pytest.raises(binarize.BinarizeError, match=r"is no scheduler for noise prediction|was trained with 2000"):
        SuperResolutionPipeline(SRUNet(**SMALL), scheduler, scale=2)


class Renamed(diffusers.DDIMInverseScheduler):
    """Not named after what it does."""


@pytest.mark.parametrize(
    "scheduler",
    [
        Renamed(**RELEASED),
        diffusers.DDIMScheduler(**{**RELEASED, "prediction_type": "epsilom"}),
        diffusers.DDIMScheduler(**{**RELEASED, "timestep_spacing": "middle"}),
        diffusers.DDIMScheduler(**{**RELEASED, "steps_offset": 500}),
        diffusers.DDIMScheduler(**{**RELEASED, "steps_offset": -5}),
        diffusers.DDIMScheduler(**{**RELEASED, "beta_end": float("nan")}),
        diffusers.DDIMScheduler(**{**RELEASED, "beta_start": 2.0, "beta_end": 3.0}),
        diffusers.DDIMScheduler(**{**RELEASED, "clip_sample_range": 1e-3}),
        diffusers.DDIMScheduler(**{**RELEASED, "trained_betas": [0.5, float("inf")]}),
    ],
)
def test_settings_that_cannot_sample_are_refused(scheduler: Any) -> None:
    assert_error("or its settings are wrong: ", check_samples, scheduler)


def test_a_network_of_another_library_has_its_own_number_of_timesteps() -> None:
    from hosts_zoo import unet2d

    host = binarize.convert(unet2d((8, 16)), "bidiffsr")
    host.register_to_config(num_train_timesteps=None)
    conversion(host).num_train_timesteps = 200
    assert_error("trained with 200 timesteps, but DDIMScheduler has num_train_timesteps=1000", SuperResolutionPipeline,
                 host, diffusers.DDIMScheduler(), scale=2)  # fmt: skip


@pytest.mark.parametrize("timestep", [-1, 5000, float("nan"), float("inf")])
def test_a_timestep_outside_the_training_is_refused(timestep: float) -> None:
    network, image = SRUNet(**SMALL), torch.zeros(1, 3, 8, 8)
    assert_error(f"timestep {timestep} is outside the 0..1999", network, image, timestep, image)


def test_steps_that_a_scheduler_cannot_take_are_one_error() -> None:
    scheduler = diffusers.LCMScheduler(**RELEASED)
    assert_error(r"num_inference_steps=51: LCMScheduler cannot take so many", set_timesteps, scheduler, 51)
    scheduler = diffusers.DDIMScheduler(**{**RELEASED, "steps_offset": 1})
    set_timesteps(scheduler, 10)
    assert_error(r"num_inference_steps=2000: timestep 2000 is outside 0\.\.1999", set_timesteps, scheduler, 2000)


@pytest.mark.parametrize("value", [0, -1, MAX_TIMESTEPS + 1, 2**31, 2**100, "1000", None, 1.5, [1], float("inf")])
def test_a_schedule_that_fits_no_memory_is_not_built(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"num_train_timesteps": value}))
    (tmp_path / "model_index.json").write_text(json.dumps({"scheduler": ["diffusers", "DDIMScheduler"]}))
    assert_error("num_train_timesteps is |is not valid JSON", read_scheduler, tmp_path)


def mutations(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Every key of a configuration with values of other kinds, and without it."""
    values = [None, "x", -1, 0, 1e308, [], {}, True, 2**40]
    found = [{**config, key: value} for key in config for value in values]
    return found + [{k: v for k, v in config.items() if k != key} for key in config]


def test_mutated_settings_sample_or_are_one_error(tmp_path: Path) -> None:
    pipe = SuperResolutionPipeline(SRUNet(**{**SMALL, "num_train_timesteps": 50}),
                                   diffusers.DDIMScheduler(num_train_timesteps=50), scale=2)  # fmt: skip
    pipe.save_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    good = json.loads(path.read_text())
    refused = 0
    for config in mutations(good):
        path.write_text(json.dumps(config))
        try:
            scheduler = read_scheduler(tmp_path)
            check_samples(scheduler)
        except binarize.BinarizeError:
            refused += 1
            continue
        set_timesteps(scheduler, 5)
        noise = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        x = noise
        for timestep in scheduler.timesteps:
            x = scheduler.step(noise, timestep, x).prev_sample
        assert bool(x.isfinite().all()), config
    assert refused > 40
