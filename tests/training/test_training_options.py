"""Options of the loop: timm's optimisers and schedules, torch.compile, precision, trackers and the best checkpoint."""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from training_case import assert_same, interrupt_at, weights

import binarize
from binarize.errors import BinarizeError
from binarize.inspect import FlipTracker
from binarize.models import SRUNet, SuperResolutionPipeline
from binarize.recipes import load_recipe
from binarize.training import Checkpoints, TrainingInterrupted, load_checkpoint, train
from binarize.training import log as training_log
from binarize.training.optim import build_lr_scheduler, build_optimizer

# timm.


def network() -> SRUNet:
    made = SRUNet(base_channels=8, channel_mults=(1, 2), res_blocks=1, norm_groups=4)
    return binarize.convert(made, "bidiffsr")


@pytest.mark.filterwarnings("ignore")  # what they recommend to install beside them
def test_every_optimiser_of_timm_can_be_made_or_says_why_not() -> None:
    timm_optim = pytest.importorskip("timm.optim")
    unet = network()
    made, refused = 0, []
    for name in timm_optim.list_optimizers():
        # The loop has no closures; timm lists those of extra packages only where they are installed.
        try:
            optimizer = build_optimizer(load_recipe("small_x2", [f"optimizer=timm/{name}", "learning_rate=1e-3"]), unet)
        except BinarizeError:
            refused.append(name)
            continue
        assert isinstance(optimizer, torch.optim.Optimizer), name
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(unet.parameters()))
        made += 1
    assert made > 20, refused


def test_timms_lion_steps_by_its_formula() -> None:
    pytest.importorskip("timm")
    recipe = load_recipe("small_x2", ["optimizer=timm/lion", "learning_rate=1e-2", "adam_beta1=0.9", "adam_beta2=0.99"])
    unet = network()
    optimizer = build_optimizer(recipe, unet)
    before = {name: p.detach().clone() for name, p in unet.named_parameters()}
    for p in unet.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for name, p in unet.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(p.detach(), before[name] - 1e-2 * p.grad.sign())  # momentum is 0 at first


def test_what_an_optimiser_does_not_take_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    unet = network()
    with pytest.raises(BinarizeError, match=r"timm has none called 'lyon'; it has .* Did you mean 'lion'"):
        build_optimizer(load_recipe("small_x2", ["optimizer=timm/lyon"]), unet)
    with pytest.raises(BinarizeError, match=r"adamw cannot be made with optimizer_options \{'speed': 3\}: .*speed"):
        build_optimizer(load_recipe("small_x2", ["optimizer=adamw", "optimizer_options={speed: 3}"]), unet)
    with pytest.raises(BinarizeError, match=r"timm/adahessian needs second-order gradients"):
        build_optimizer(load_recipe("small_x2", ["optimizer=timm/adahessian"]), unet)
    with pytest.raises(BinarizeError, match=r"optimizer: got 'lion'; must be one of: adam, adamw, timm/NAME"):
        load_recipe("small_x2", ["optimizer=lion"])
    with pytest.raises(BinarizeError, match=r"lr_scheduler: got 'timm/plateau'; must be one of: constant, .*timm/cosi"):
        load_recipe("small_x2", ["lr_scheduler=timm/plateau"])
    with pytest.raises(BinarizeError, match=r"lr_scheduler_options: are those of timm's schedulers"):
        load_recipe("small_x2", ["lr_scheduler_options={min_lr: 0.1}"])
    wrong = load_recipe("small_x2", ["lr_scheduler=timm/cosine", "lr_scheduler_options={low: 0.1}"])
    with pytest.raises(BinarizeError, match=r"timm/cosine cannot be made with .*'low'"):
        build_lr_scheduler(wrong, build_optimizer(load_recipe("small_x2"), unet))
    monkeypatch.setattr("binarize.training.optim.importlib.util.find_spec", lambda name: None)
    with pytest.raises(BinarizeError, match=r"optimizer: timm/lion is timm's, which is not installed; pip install"):
        build_optimizer(load_recipe("small_x2", ["optimizer=timm/lion"]), unet)


def rates(*overrides: str, steps: int = 20) -> list[float]:
    recipe = load_recipe("small_x2", [f"max_train_steps={steps}", "learning_rate=1e-2", *overrides])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.learning_rate)
    schedule = build_lr_scheduler(recipe, optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        assert schedule.get_last_lr() == [found[-1]]
        optimizer.step()
        schedule.step()
    return found


def test_warm_up_and_cosine_are_the_written_curves() -> None:
    pytest.importorskip("timm")
    steps = np.arange(20)
    timms = rates("lr_scheduler=timm/cosine", "lr_warmup_steps=5", "lr_scheduler_options={min_lr: 1e-3}")
    cosine = 1e-3 + 0.5 * (1e-2 - 1e-3) * (1 + np.cos(np.pi * steps / 20))
    np.testing.assert_allclose(timms, np.where(steps < 5, 1e-2 * steps / 5, cosine), rtol=1e-9, atol=1e-12)
    theirs = rates("lr_scheduler=cosine", "lr_warmup_steps=5")
    falling = 0.5 * 1e-2 * (1 + np.cos(np.pi * (steps - 5) / 15))
    np.testing.assert_allclose(theirs, np.where(steps < 5, 1e-2 * steps / 5, falling), rtol=1e-9, atol=1e-12)
    stepped = rates(
        "lr_scheduler=timm/step", "lr_warmup_steps=0", "lr_scheduler_options={decay_epochs: 8, decay_rate: 0.5}"
    )
    np.testing.assert_allclose(stepped, 1e-2 * 0.5 ** (steps // 8))


def test_a_run_with_timms_optimiser_and_schedule_resumes_exactly(recipe: Any) -> None:
    pytest.importorskip("timm")
    options = ("optimizer=timm/nadamw", "lr_scheduler=timm/cosine", "lr_warmup_steps=2")
    whole = train(recipe(*options, out="whole"), progress=False)
    for step in (3, 4):  # what a killed run leaves
        checkpoint = whole.output_dir / f"checkpoint-{step}"
        if checkpoint.is_dir():
            shutil.copytree(checkpoint, whole.output_dir.parent / "cut" / checkpoint.name)
    resumed = train(recipe(*options, "resume_from_checkpoint=latest", out="cut"), progress=False)
    assert len(resumed.history) == 3
    assert_same(weights(whole.checkpoint), weights(resumed.checkpoint))


# torch.compile and precision.


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_compiled_network_learns_the_same_and_saves_under_the_same_names(
    accumulation: int, recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("max_train_steps=3", f"gradient_accumulation_steps={accumulation}", "train_batch_size=2")
    plain = train(recipe(*options, out="plain"), progress=False)
    # Without a C++ compiler; the loop's part is the same.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    compiled = train(recipe(*options, "compile=true", out="compiled"), progress=False)
    one, other = weights(plain.checkpoint), weights(compiled.checkpoint)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-4, rtol=1e-3)
    SuperResolutionPipeline.from_pretrained(compiled.model_dir)
    resumed = recipe("max_train_steps=4", *options[1:], "resume_from_checkpoint=latest", out="compiled")
    assert train(resumed, progress=False).steps == 4


@pytest.mark.slow
def test_the_default_compiler_learns_the_same(recipe: Any) -> None:
    plain = train(recipe("max_train_steps=2", out="plain"), progress=False)
    compiled = train(recipe("max_train_steps=2", "compile=true", out="compiled"), progress=False)
    for one, other in zip(plain.history, compiled.history, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-3)


def test_bf16_learns_on_a_cpu_and_keeps_full_precision_weights(recipe: Any) -> None:
    options = ("max_train_steps=12", "learning_rate=3e-3", "use_ema=true")
    plain = train(recipe(*options, out="plain"), progress=False)
    half = train(recipe(*options, "mixed_precision=bf16", out="half"), progress=False)
    assert half.history[0].loss == pytest.approx(plain.history[0].loss, rel=0.05)
    assert half.history[0].loss != plain.history[0].loss
    assert np.mean([e.loss for e in half.history[-3:]]) < 0.9 * half.history[0].loss
    state = load_checkpoint(half.checkpoint)[0]
    for tensor in (*state["model"].values(), *state["ema"]["shadow_params"]):
        assert tensor.dtype not in (torch.bfloat16, torch.float16)


def test_fp16_is_refused_without_a_gpu(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(BinarizeError, match=r"mixed_precision: fp16 needs a GPU: .* mixed_precision=bf16 or no"):
        train(recipe("mixed_precision=fp16"), progress=False)


def test_a_launcher_that_shards_the_parameters_is_refused(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
        with pytest.raises(BinarizeError, match=r"cannot be launched with FSDP: it shards .* Use data parallelism"):
            train(recipe(), progress=False)
    assert train(recipe("max_train_steps=1"), progress=False).steps == 1


# What is logged.


def test_the_log_has_flips_memory_and_speed(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # A tracker beside the run's own sees the same signs.
    trackers: list[FlipTracker] = []

    class Twin(FlipTracker):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__(model)
            if not trackers:
                trackers.append(FlipTracker(model))

        def update(self, step: int | None = None) -> float:
            trackers[0].update()
            return super().update(step)

    monkeypatch.setattr(training_log, "FlipTracker", Twin)
    result = train(recipe("learning_rate=1e-2", "logging_steps=2"), progress=False)
    assert [entry.step for entry in result.history] == [2, 4, 6]
    expected = trackers[0].result().overall()
    assert expected.max() > 0
    assert [entry.flips for entry in result.history] == pytest.approx(expected.tolist())
    for entry in result.history:
        assert entry.memory is None or 2**26 < entry.memory < 2**40
        assert entry.samples_per_second > 0


def test_a_full_precision_network_has_no_flips(recipe: Any) -> None:
    assert train(recipe("method=null", "max_train_steps=1"), progress=False).history[0].flips is None


def test_memory_and_flips_are_shown(recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    train(recipe("max_train_steps=1"))
    shown = capsys.readouterr().err
    assert "GiB" in shown
    assert "flips 0." in shown


def test_flips_of_each_layer_reach_tensorboard(recipe: Any) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = recipe("report_to=tensorboard", "max_train_steps=2", "learning_rate=1e-2")
    result = train(run, progress=False)
    events = accumulator.EventAccumulator(str(run.output_dir / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    layers = {
        f"flips/{name}"
        for name in FlipTracker(SuperResolutionPipeline.from_pretrained(result.model_dir, pack=False).unet)
        .result()
        .layers
    }
    assert {"flips", "memory_bytes", *layers} <= tags
    assert [event.value for event in events.Scalars("flips")] == pytest.approx([e.flips for e in result.history])


def test_wandb_gets_the_same_without_a_network(recipe: Any, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged: list[tuple[int, dict[str, Any]]] = []
    started: list[dict[str, Any]] = []
    real_init = wandb.init

    def init(**options: Any) -> Any:
        run = real_init(**options)
        started.append(options)
        real_log = run.log

        def log(values: dict[str, Any], step: int | None = None, **rest: Any) -> None:
            logged.append((-1 if step is None else step, values))
            real_log(values, step=step, **rest)

        monkeypatch.setattr(run, "log", log)
        return run

    monkeypatch.setattr(wandb, "init", init)
    options = ("report_to=wandb", f"validation_data_dir={pictures}", "num_validation_images=1")
    result = train(recipe(*options, "max_train_steps=2"), progress=False)
    scalars = {step: values["loss"] for step, values in logged if "loss" in values}
    assert scalars == pytest.approx({entry.step: entry.loss for entry in result.history})
    assert [values["validation/psnr"] for _, values in logged if "validation/psnr" in values] == [result.validation[2]]
    shown = next(values["validation/p0"] for _, values in logged if "validation/p0" in values)
    assert isinstance(shown[0], wandb.Image)
    assert list((result.output_dir / "wandb").glob("offline-run-*/run-*.wandb"))
    train(recipe(*options, "max_train_steps=3", "resume_from_checkpoint=latest"), progress=False)
    assert started[0]["id"] == started[1]["id"]


def test_a_tracker_that_cannot_start_is_said(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Accelerator, *arguments: Any, **options: Any) -> None:
        raise OSError("disk on fire")

    monkeypatch.setattr(Accelerator, "init_trackers", refuse)
    with pytest.raises(BinarizeError, match=r"report_to: tensorboard cannot start: disk on fire\."):
        train(recipe("report_to=tensorboard"), progress=False)


# The best checkpoint.


def test_the_best_model_and_its_checkpoint_are_kept(
    recipe: Any, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from binarize.training import validation

    scores = iter([10.0, 30.0, 20.0, 25.0, 29.0, 28.0])
    monkeypatch.setattr(validation, "psnr", lambda *arguments, **options: next(scores))
    run = recipe(
        f"validation_data_dir={pictures}",
        "num_validation_images=1",
        "validation_steps=1",
        "checkpointing_steps=1",
        "checkpoints_total_limit=2",
        "use_ema=true",
        "ema_decay=0.5",
    )
    result = train(run, progress=False)
    assert result.best == (2, 30.0)
    assert list(Checkpoints(run.output_dir, None).list()) == [2, 5, 6]
    best = SuperResolutionPipeline.from_pretrained(run.output_dir / "best", pack=False)
    averaged = load_checkpoint(run.output_dir / "checkpoint-2")[0]["ema"]["shadow_params"]
    for parameter, expected in zip(best.unet.parameters(), averaged, strict=True):
        assert torch.equal(parameter, expected)


def test_models_of_unfinished_stages_are_not_the_best(
    recipe: Any, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from binarize.training import validation

    scores = iter([50.0, 40.0, 10.0, 20.0])
    monkeypatch.setattr(validation, "psnr", lambda *arguments, **options: next(scores))
    run = recipe(
        f"validation_data_dir={pictures}", "num_validation_images=1", "validation_steps=1", "max_train_steps=4",
        "method=reactnet", "two_stage=0.6",
    )  # fmt: skip
    result = train(run, progress=False)
    assert result.best == (4, 20.0)
    binarize.binary_state(SuperResolutionPipeline.from_pretrained(run.output_dir / "best", pack=False).unet)


@pytest.mark.parametrize("schedule", [("method=irnet",), ("method=reactnet", "two_stage=0.5")])
def test_the_end_of_a_run_with_a_schedule_stays_where_it_is(schedule: tuple[str, ...], recipe: Any) -> None:
    train(recipe(*schedule, "max_train_steps=2"), progress=False)
    with pytest.raises(BinarizeError, match="max_train_steps: was 2, is 4"):
        train(recipe(*schedule, "max_train_steps=4", "resume_from_checkpoint=latest"), progress=False)


def test_going_back_to_an_older_checkpoint_needs_a_folder_of_its_own(recipe: Any) -> None:
    first = train(recipe(), progress=False)
    older = f"resume_from_checkpoint={first.output_dir / 'checkpoint-3'}"
    with pytest.raises(BinarizeError, match=r"has newer checkpoints than .*checkpoint-3, such as checkpoint-6"):
        train(recipe(older), progress=False)
    assert train(recipe(older, out="branch"), progress=False).steps == 6


def test_a_run_that_goes_on_elsewhere_keeps_its_own_best(
    recipe: Any, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from binarize.training import validation

    scores = iter([40.0, 40.0, 15.0, 20.0])
    monkeypatch.setattr(validation, "psnr", lambda *arguments, **options: next(scores))
    options = (f"validation_data_dir={pictures}", "num_validation_images=1", "validation_steps=1")
    first = train(recipe(*options, "max_train_steps=2"), progress=False)
    there = recipe(*options, "max_train_steps=3", f"resume_from_checkpoint={first.checkpoint}", out="there")
    assert train(there, progress=False).best == (3, 20.0)
    assert (there.output_dir / "best").is_dir()


def test_a_resumed_run_remembers_the_best(recipe: Any, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from binarize.training import validation

    options = (f"validation_data_dir={pictures}", "num_validation_images=1", "validation_steps=1")
    scores = iter([40.0, 20.0, 20.0, 20.0, 41.0, 20.0])
    monkeypatch.setattr(validation, "psnr", lambda *arguments, **options: next(scores))
    first = train(recipe(*options, "max_train_steps=3"), progress=False)
    assert first.best == (1, 40.0)
    kept = (first.output_dir / "best" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    middle = train(recipe(*options, "max_train_steps=4", "resume_from_checkpoint=latest"), progress=False)
    assert middle.best == (1, 40.0)
    assert (first.output_dir / "best" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == kept
    last = train(recipe(*options, "max_train_steps=6", "resume_from_checkpoint=latest"), progress=False)
    assert last.best == (5, 41.0)
    assert (first.output_dir / "best" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() != kept
    train(recipe("max_train_steps=1"), force=True, progress=False)
    assert not (first.output_dir / "best").exists()


def test_a_validation_that_an_interruption_left_out_is_made_up_for(
    recipe: Any, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (f"validation_data_dir={pictures}", "num_validation_images=1", "validation_steps=2")
    whole = train(recipe(*options, out="whole"), progress=False)
    with monkeypatch.context() as patch:
        interrupt_at(2, patch, signal.SIGTERM)
        with pytest.raises(TrainingInterrupted):
            train(recipe(*options, out="cut"), progress=False)
    resumed = train(recipe(*options, "resume_from_checkpoint=latest", out="cut"), progress=False)
    assert resumed.validation == whole.validation
    assert resumed.best == whole.best
    assert whole.best is not None
    assert math.isfinite(whole.best[1])
    index = json.loads((resumed.output_dir / "best" / "model_index.json").read_text())
    assert index["_class_name"] == "SuperResolutionPipeline"


APART = """
import ctypes, torch
from binarize.training import keep_large_blocks_apart

class Info(ctypes.Structure):  # mallinfo2 of malloc.h
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd a b c d e".split()]

info = ctypes.CDLL(None).mallinfo2
info.restype = Info
print(keep_large_blocks_apart())
for _ in range(3):
    before = info().hblkhd
    block = torch.empty(5 * 2**20, dtype=torch.uint8)
    print(info().hblkhd - before >= 5 * 2**20)
    del block
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
@pytest.mark.parametrize("chosen", [None, "33554432"])
def test_large_blocks_come_from_the_system_each_time_unless_the_user_chose(chosen: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "MALLOC_MMAP_THRESHOLD_"}
    if chosen is not None:
        environment["MALLOC_MMAP_THRESHOLD_"] = chosen
    done = subprocess.run([sys.executable, "-c", APART], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.split() == [str(chosen is None)] * 4
