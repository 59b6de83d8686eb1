"""Options of the loop: timm, torch.compile, precision, trackers, and the best model."""

import functools
import itertools
import json
import math
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from training_case import RESUME, SMALLEST, assert_close, interrupt_at, set_scores, weights

import binarize
from binarize.conversion.export import binary_layers
from binarize.errors import BinarizeError
from binarize.inspect import FlipTracker
from binarize.models import SuperResolutionPipeline
from binarize.recipes import build_model, load_recipe
from binarize.training import Checkpoints, TrainingInterrupted, load_checkpoint, train
from binarize.training.optim import build_lr_scheduler


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer=timm/lyon"], r"timm has no optimiser 'lyon'; it has .* Did you mean 'lion'"),
        (["optimizer_options={speed: 3}"], r"adamw? cannot be built with optimizer_options \{'speed': 3\}: .*speed"),
        (["optimizer=timm/adahessian"], r"timm/adahessian needs second-order gradients"),
        (["optimizer=lion"], r"optimizer: got 'lion'; must be one of: adam, adamw, timm/NAME"),
        (["lr_scheduler=timm/plateau"], r"lr_scheduler: got 'timm/plateau'; must be one of: constant, .*timm/cosi"),
        (["lr_scheduler_options={min_lr: 0.1}"], r"lr_scheduler_options: needs one of timm's schedulers"),
        (["lr_scheduler=timm/cosine", "lr_scheduler_options={low: 0.1}"], r"timm/cosine cannot be built with .*'low'"),
    ],
)
def test_invalid_optimisers_and_schedules(overrides: list[str], message: str, recipe: Any) -> None:
    pytest.importorskip("timm")
    with pytest.raises(BinarizeError, match=message):
        train(recipe(*overrides), progress=False)


def rates(*overrides: str) -> list[float]:
    recipe = load_recipe("small_x2", ["max_train_steps=20", "learning_rate=1e-2", *overrides])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.learning_rate)
    schedule = build_lr_scheduler(recipe, optimizer)
    found = []
    for _ in range(20):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_schedules_are_the_documented_curves() -> None:
    pytest.importorskip("timm")
    steps = np.arange(20)
    for scheduler, low, turn in (("timm/cosine", 1e-3, steps / 20), ("cosine", 0, (steps - 5) / 15)):
        options = () if low == 0 else ("lr_scheduler_options={min_lr: 1e-3}",)
        found = rates(f"lr_scheduler={scheduler}", "lr_warmup_steps=5", *options)
        falling = low + 0.5 * (1e-2 - low) * (1 + np.cos(np.pi * turn))
        np.testing.assert_allclose(found, np.where(steps < 5, 1e-2 * steps / 5, falling), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_compiled_network_learns_the_same(accumulation: int, recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = (*SMALLEST, f"gradient_accumulation_steps={accumulation}")
    plain = train(recipe(*options, "max_train_steps=3", out="plain"), progress=False)
    # The loop's part is the same without a C++ compiler.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    compiled = train(recipe(*options, "max_train_steps=3", "compile=true", out="compiled"), progress=False)
    assert_close(plain.checkpoint, compiled.checkpoint, atol=1e-4, rtol=1e-3)
    SuperResolutionPipeline.from_pretrained(compiled.model_dir)
    assert train(recipe(*options, "max_train_steps=4", RESUME, out="compiled"), progress=False).steps == 4


def test_bf16_learns_on_a_cpu_and_keeps_full_precision_weights(trained: Any) -> None:
    options = ("max_train_steps=12", "learning_rate=3e-3", "use_ema=true")
    half = trained(*options, "mixed_precision=bf16")
    plain = trained(*options)  # the next run in a process may have another precision
    assert half.history[0].loss == pytest.approx(plain.history[0].loss, rel=0.05)
    assert half.history[0].loss != plain.history[0].loss
    assert np.mean([e.loss for e in half.history[-3:]]) < 0.9 * half.history[0].loss
    state = load_checkpoint(half.checkpoint)[0]
    for tensor in (*state["model"].values(), *state["ema"]["shadow_params"]):
        assert tensor.dtype not in (torch.bfloat16, torch.float16)


def test_a_launcher_that_shards_parameters_is_an_error(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
        with pytest.raises(BinarizeError, match=r"cannot be launched with FSDP: it shards .* Use data parallelism"):
            train(recipe(), progress=False)
    assert train(recipe("max_train_steps=1"), progress=False).steps == 1


def test_the_log_has_flips_memory_and_speed(trained: Any, recipe: Any) -> None:
    options = ("learning_rate=1e-2", "logging_steps=2", "checkpointing_steps=2")
    result = trained(*options)
    binary = [f"{name}.weight" for name, _ in binary_layers(build_model(recipe(*options)))]
    states = [weights(result.output_dir / f"checkpoint-{step}") for step in (2, 4, 6)]
    signs = [torch.cat([state[name].flatten() >= 0 for name in binary]) for state in states]
    flips = [float((one != other).double().mean()) for one, other in itertools.pairwise(signs)]
    assert max(flips) > 0
    assert [entry.step for entry in result.history] == [2, 4, 6]
    assert [entry.flips for entry in result.history[1:]] == pytest.approx(flips)
    for entry in result.history:
        assert entry.memory is None or 2**26 < entry.memory < 2**40
        assert entry.samples_per_second > 0


def test_tensorboard_gets_scalars_images_and_the_flips_of_each_layer(recipe: Any, pictures: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = ("report_to=tensorboard", f"validation_data_dir={pictures}", "num_validation_images=1")
    result = train(recipe(*options, "learning_rate=1e-2", "max_train_steps=3"), progress=False)
    events = accumulator.EventAccumulator(str(result.output_dir / "tensorboard"))
    events.Reload()
    for name, values in (("loss", [e.loss for e in result.history]), ("flips", [e.flips for e in result.history])):
        logged = {event.step: event.value for event in events.Scalars(name)}
        assert logged == pytest.approx(dict(zip((1, 2, 3), values, strict=True)))
    assert events.Scalars("learning_rate")[0].value == pytest.approx(1e-2)
    assert events.Scalars("validation/psnr")[0].value == pytest.approx(result.validation[3], rel=1e-4)
    assert events.Images("validation/p0")[0].width == 3 * 32
    saved = SuperResolutionPipeline.from_pretrained(result.model_dir, pack=False).unet
    layers = {f"flips/{name}" for name in FlipTracker(saved).result().layers}
    assert {"memory_bytes", *layers} <= set(events.Tags()["scalars"])


def test_wandb_gets_the_same_without_a_network(recipe: Any, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged: dict[tuple[str, int | None], Any] = {}
    started: list[dict[str, Any]] = []
    real_init = wandb.init

    def init(**options: Any) -> Any:
        started.append(options)
        run = real_init(**options)
        real_log = run.log

        def log(values: dict[str, Any], step: int | None = None, **rest: Any) -> None:
            logged.update({(name, step): value for name, value in values.items()})
            real_log(values, step=step, **rest)

        monkeypatch.setattr(run, "log", log)
        return run

    monkeypatch.setattr(wandb, "init", init)
    options = ("report_to=wandb", f"validation_data_dir={pictures}", "num_validation_images=1")
    result = train(recipe(*options, "max_train_steps=2"), progress=False)
    assert [logged["loss", step] for step in (1, 2)] == pytest.approx([entry.loss for entry in result.history])
    assert logged["validation/psnr", 2] == result.validation[2]
    assert isinstance(logged["validation/p0", 2][0], wandb.Image)
    assert list((result.output_dir / "wandb").glob("offline-run-*/run-*.wandb"))
    train(recipe(*options, "max_train_steps=3", RESUME), progress=False)
    assert started[0]["id"] == started[1]["id"]


def test_a_tracker_that_cannot_start_is_an_error(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Accelerator, "init_trackers", mock.Mock(side_effect=OSError("disk on fire")))
    with pytest.raises(BinarizeError, match=r"report_to: tensorboard cannot start: disk on fire\."):
        train(recipe("report_to=tensorboard"), progress=False)


@pytest.fixture
def validated(pictures: Path) -> tuple[str, ...]:
    return f"validation_data_dir={pictures}", "num_validation_images=1", "validation_steps=1", "num_inference_steps=1"


def test_the_best_model_is_kept(recipe: Any, validated: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    set_scores([10.0, 30.0, 20.0, 25.0, 29.0, 28.0], monkeypatch)
    options = ("checkpointing_steps=1", "checkpoints_total_limit=2", "use_ema=true", "ema_decay=0.5")
    run = recipe(*validated, *options)
    assert train(run, progress=False).best == (2, 30.0)
    assert list(Checkpoints(run.output_dir, None).list()) == [2, 5, 6]
    best = SuperResolutionPipeline.from_pretrained(run.output_dir / "best", pack=False)
    averaged = load_checkpoint(run.output_dir / "checkpoint-2")[0]["ema"]["shadow_params"]
    for parameter, expected in zip(best.unet.parameters(), averaged, strict=True):
        assert torch.equal(parameter, expected)


def test_unfinished_stages_are_not_the_best(recipe, validated, monkeypatch):
    set_scores([50.0, 40.0, 10.0, 20.0], monkeypatch)
    run = recipe(*validated, "max_train_steps=4", "method=reactnet", "two_stage=0.6")
    assert train(run, progress=False).best == (4, 20.0)
    binarize.binary_state(SuperResolutionPipeline.from_pretrained(run.output_dir / "best", pack=False).unet)


def test_resuming_remembers_the_best(recipe: Any, validated: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    set_scores([40.0, 20.0, 20.0, 15.0, 20.0, 20.0, 41.0, 20.0], monkeypatch)
    first = train(recipe(*validated, "max_train_steps=3"), progress=False)
    assert first.best == (1, 40.0)
    file = first.output_dir / "best" / "unet" / "diffusion_pytorch_model.safetensors"
    kept = file.read_bytes()
    there = recipe(*validated, "max_train_steps=4", f"resume_from_checkpoint={first.checkpoint}", out="there")
    assert train(there, progress=False).best == (4, 20.0)  # another folder has its own best model
    assert train(recipe(*validated, "max_train_steps=4", RESUME), progress=False).best == (1, 40.0)
    assert file.read_bytes() == kept
    assert train(recipe(*validated, "max_train_steps=6", RESUME), progress=False).best == (5, 41.0)
    assert file.read_bytes() != kept
    train(recipe("max_train_steps=1"), force=True, progress=False)
    assert not (first.output_dir / "best").exists()


def test_a_skipped_validation_is_done(recipe: Any, validated: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    options = (*validated, "validation_steps=2", "max_train_steps=4")
    whole = train(recipe(*options, out="whole"), progress=False)
    with monkeypatch.context() as patch:
        interrupt_at(2, patch, signal.SIGTERM)
        with pytest.raises(TrainingInterrupted):
            train(recipe(*options, out="cut"), progress=False)
    resumed = train(recipe(*options, RESUME, out="cut"), progress=False)
    assert (resumed.validation, resumed.best) == (whole.validation, whole.best)
    assert whole.best is not None
    assert math.isfinite(whole.best[1])
    index = json.loads((resumed.output_dir / "best" / "model_index.json").read_text())
    assert index["_class_name"] == "SuperResolutionPipeline"
