"""Training: the loss falls, runs resume exactly, and errors name their cause."""

import functools
import math
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from errors_case import assert_error
from PIL import Image
from training_case import RESUME, assert_close, assert_same, at_call, differences, interrupt_at, weights

from binarize.errors import BinarizeError
from binarize.models import SuperResolutionPipeline
from binarize.recipes import DistillationSection, GenerationRecipe, PerceptualSection, Recipe, load_recipe
from binarize.training import Checkpoints, DivergedError, TrainingInterrupted, load_checkpoint, train
from binarize.training import objective as training_objective
from binarize.training import processes as training_processes
from binarize.training.resume import _RESUMABLE, check_resumable
from binarize.training.samples import NoisySamples
from binarize.training.signals import StopRequest


@pytest.mark.parametrize("method", ["null", "bidiffsr"])
def test_thirty_steps_lower_the_loss_and_save_a_pipeline(method: str, recipe: Any, pictures: Path) -> None:
    options = "max_train_steps=30 learning_rate=3e-3 checkpointing_steps=30 validation_steps=15 num_validation_images=2"
    averages = ("use_ema=true", "ema_decay=0.9", f"validation_data_dir={pictures}")
    run = recipe(f"method={method}", *options.split(), *averages)
    result = train(run, progress=False)
    losses = [entry.loss for entry in result.history]
    assert len(losses) == result.steps == 30
    assert np.mean(losses[-8:]) < 0.7 * np.mean(losses[:4])
    assert result.validation.keys() == {15, 30}
    assert all(math.isfinite(psnr) for psnr in result.validation.values())

    strips = sorted(path.name for path in (run.output_dir / "samples").iterdir())
    assert strips == [f"step-{step:07d}-p{n}.png" for step in (15, 30) for n in (0, 1)]
    with Image.open(run.output_dir / "samples" / strips[0]) as strip:
        assert strip.size == (3 * 32, 40)
    assert load_recipe(run.output_dir / "recipe.yaml") == run

    pipeline = SuperResolutionPipeline.from_pretrained(result.model_dir, pack=False)
    assert pipeline.config.scale == 2
    assert pipeline.scheduler.config["prediction_type"] == run.scheduler.prediction_type
    # The saved model has the averaged weights, the checkpoint the trained ones and the average.
    state, _ = load_checkpoint(result.checkpoint)
    saved = dict(pipeline.unet.named_parameters())
    for (name, parameter), averaged in zip(saved.items(), state["ema"]["shadow_params"], strict=True):
        assert torch.equal(parameter, averaged), name
    assert any(not torch.equal(saved[name], state["model"][name]) for name in saved)
    pipeline.set_progress_bar_config(disable=True)
    assert tuple(pipeline(torch.rand(3, 9, 7), num_inference_steps=2, output_type="pt").images.shape[-2:]) == (18, 14)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "overrides"),
    [
        (
            signal.SIGTERM,
            "model.dropout=0.3 use_ema=true lr_scheduler=cosine lr_warmup_steps=2 optimizer=adamw degradation=photo",
        ),
        (signal.SIGINT, "method=null timesteps_per=batch gradient_accumulation_steps=2 train_batch_size=2"),
        (signal.SIGTERM, "optimizer=timm/nadamw lr_scheduler=timm/cosine lr_warmup_steps=2"),
    ],
    ids=["binary", "full", "timm"],
)
def test_an_interrupted_run_resumes_bit_for_bit(signum, overrides, recipe, monkeypatch):
    options, before = overrides.split(), signal.getsignal(signum)
    whole = train(recipe(*options, out="whole"), progress=False)

    run = recipe(*options, out="cut")
    interrupt_at(2 * run.gradient_accumulation_steps, monkeypatch, signum)
    with pytest.raises(TrainingInterrupted, match=rf"stopped by {signum.name}; saved .*checkpoint-2") as caught:
        train(run, progress=False)
    assert caught.value.exit_code == 128 + signum
    assert signal.getsignal(signum) is before
    assert caught.value.checkpoint == run.output_dir / "checkpoint-2"
    monkeypatch.undo()
    torch.manual_seed(12345)  # the resuming process has another random state
    resumed = train(recipe(*options, RESUME, out="cut"), progress=False)

    one, other = (load_checkpoint(result.checkpoint)[0] for result in (whole, resumed))
    assert not differences(one, other)
    losses, resumed_losses = ([(e.loss, e.learning_rate) for e in run.history] for run in (whole, resumed))
    assert losses[2:] == resumed_losses


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("timesteps_per", ["sample", "batch"])
def test_accumulated_passes_equal_one_large_batch(timesteps_per: str, trained: Any) -> None:
    common = (f"timesteps_per={timesteps_per}", "model.dropout=0", "max_grad_norm=0.5")
    whole = trained(*common)
    assert weights(whole.checkpoint)["conv_in.weight"].dtype == torch.float64
    assert_close(whole.checkpoint, trained(*common, "train_batch_size=1", "gradient_accumulation_steps=4").checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["dataloader_num_workers=2", "gradient_checkpointing=true"])
def test_options_that_change_no_result(option: str, trained: Any) -> None:
    common = ("max_train_steps=2", "model.dropout=0.2")
    assert_same(trained(*common).checkpoint, trained(*common, option).checkpoint)


def test_progress_shows_loss_rate_speed_memory_and_flips(recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    train(recipe("max_train_steps=2", RESUME))
    out, err = capsys.readouterr()
    assert "there is no checkpoint yet; starting a new run" in out
    assert "4 samples x 1 forward passes x 1 processes = 4 per step, on" in out
    for part in ("step 2: loss 0.", "samples/s", "lr 1.00e-03", "GiB", "flips 0."):
        assert part in err
    assert "\r" not in err
    train(recipe("max_train_steps=3", RESUME))
    assert "checkpoint-2, at step 2" in capsys.readouterr().out
    again = train(recipe("max_train_steps=3", RESUME), progress=False)
    assert capsys.readouterr() == ("", "")
    # A finished run resumes without a step.
    assert (again.steps, again.history) == (3, ())
    assert again.model_dir.is_dir()


def test_an_existing_run_is_only_resumed_or_replaced_on_request(recipe: Any) -> None:
    run = recipe("max_train_steps=1")
    state = torch.get_rng_state()
    train(run, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    (run.output_dir / "notes.txt").write_text("mine")
    assert_error(r"already holds a run; continue it with resume_from_checkpoint=latest", train, run, progress=False)
    result = train(recipe("max_train_steps=2", "seed=3"), force=True, progress=False)
    assert list(Checkpoints(run.output_dir, None).list()) == [2]
    assert (result.output_dir / "notes.txt").read_text() == "mine"
    with pytest.raises(BinarizeError, match=r"continues a run and force removes it; give only one"):
        train(recipe(RESUME), force=True, progress=False)


def test_a_run_may_resume_from_a_checkpoint_of_another_folder(recipe: Any, trained: Any) -> None:
    first = trained("max_train_steps=3")
    resume = f"resume_from_checkpoint={first.checkpoint}"
    there = train(recipe("max_train_steps=3", resume, out="there"), progress=False)
    assert (there.checkpoint, there.steps) == (first.checkpoint, 3)
    assert there.model_dir == recipe(out="there").output_dir / "model"
    assert there.model_dir.is_dir()
    assert_error("already holds a run", lambda: train(recipe(resume, out="there"), progress=False))


def test_resuming_from_an_older_checkpoint_needs_another_folder(recipe: Any) -> None:
    first = train(recipe(), progress=False)
    older = f"resume_from_checkpoint={first.output_dir / 'checkpoint-3'}"
    with pytest.raises(BinarizeError, match=r"has newer checkpoints than .*checkpoint-3, such as checkpoint-6"):
        train(recipe(older), progress=False)
    assert train(recipe(older, out="branch"), progress=False).steps == 6


TWIN = "distillation={teacher: TWIN, features: 1}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["output_dir=file"], r"output_dir: .* is a file; name a folder"),
        (["output_dir=file/run"], r"output_dir: cannot write file/run: Not a directory"),
        (["train_data_dir=null"], r"train_data_dir: missing; name the folder"),
        (["mixed_precision=fp16"], r"mixed_precision: fp16 needs a GPU; use mixed_precision=bf16 or no"),
        (["report_to=tensorboard"], r"tensorboard is not installed; pip install 'binarize-diffusion\[train\]'"),
        (["optimizer=timm/lion"], r"optimizer: timm/lion needs timm: pip install"),
        (["init_from=TWIN", "model.base_channels=16"], r"another network than .*:\n  base_channels: 8 there, 16 here"),
        (["init_from=nowhere"], r"init_from: .*nowhere: no such file or folder"),
        (["distillation={teacher: nobody}"], r"distillation: .*nobody: no such file or folder"),
        ([TWIN, "scheduler.prediction_type=epsilon"], r"else:\n  prediction_type: 'sample' there, 'epsilon' here"),
        ([TWIN.replace("1}", "1, blocks: [tail.*]}")], r"blocks: the pattern 'tail\.\*' matches no module that"),
        ([TWIN, "model.base_channels=16"], r"outputs of encoder\.0\.blocks\.0 are \(4, 16, 16, 16\) in"),
    ],
)
def test_runs_that_cannot_start(overrides, message, recipe, twin, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    if "pip install" in message:
        monkeypatch.setattr(training_processes.importlib.util, "find_spec", lambda name: None)
    run = recipe(*(override.replace("TWIN", str(twin)) for override in overrides))
    assert_error(message, train, run, progress=False)


TOTALS = "samples per optimiser step: were 4, are 2; they are train_batch_size * "
LONGER = "max_train_steps: was 6, is 7"


@pytest.mark.parametrize(
    ("then", "now", "changes"),
    [
        ("", "max_train_steps=7 report_to=tensorboard train_batch_size=2 gradient_accumulation_steps=2", []),
        ("", "seed=1 model.dropout=0.5", ["model.dropout: was 0.0, is 0.5", "seed: was 0, is 1"]),
        ("", "train_batch_size=2", [TOTALS]),
        ("", "residual_strength=1.5 target=residual", ["target: was 'image', is 'residual'"]),
        ("", "num_inference_steps=3", []),
        (
            "",
            'degradation=[{"reduce":"box"}]',
            ["degradation: was 'bicubic', is [{'reduce': {'share': 1.0, 'filters': ['box']}}]"],
        ),
        ("sampling_timesteps_share=0.5", "num_inference_steps=3", ["num_inference_steps: was 2, is 3"]),
        ("lr_scheduler=cosine", "max_train_steps=7", [LONGER]),
        ("method=irnet", "max_train_steps=7", [LONGER]),
        ("method=reactnet two_stage=0.5", "max_train_steps=7", [LONGER]),
    ],
)
def test_changes_of_the_recipe_when_a_run_resumes(then: str, now: str, changes: list[str], recipe: Any) -> None:
    unclipped = "scheduler.clip_sample=false"
    saved, changed = recipe(unclipped, *then.split()), recipe(unclipped, *then.split(), *now.split())
    text = saved.to_yaml().replace("sampling_timesteps_share: 0.0\n", "").replace("degradation: bicubic\n", "")
    older = yaml.safe_load(text)  # of an older version
    totals = [one.train_batch_size * one.gradient_accumulation_steps for one in (changed, saved)]
    check = functools.partial(check_resumable, changed, totals[0], older, totals[1], Path("checkpoint-3"))
    if not changes:
        return check()
    assert_error(re.escape("\n  ".join(["recipe differs in keys that change the result:", *changes])), check)
    return None


@pytest.mark.parametrize(("what", "names"), [("loss", r"p\d;"), ("gradient", r"p\d, .*;")])
def test_a_loss_or_gradient_that_is_not_finite(what, names, recipe, monkeypatch):
    def poison(losses: torch.Tensor) -> torch.Tensor:
        if what == "loss":
            return losses.clone().index_fill(0, torch.tensor([1]), float("nan"))
        losses.register_hook(lambda gradient: gradient * float("inf"))
        return losses

    at_call(5, training_objective, "sample_losses", poison, monkeypatch)
    message = rf"{what} of step 5 is not finite for the images {names} .* The last checkpoint is .*-3\."
    with pytest.raises(DivergedError, match=message):
        train(recipe(), progress=False)


def test_a_dead_worker_is_an_error(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NoisySamples, "__getitem__", lambda self, index: os._exit(1))
    with pytest.raises(BinarizeError, match=r"a worker process died before step 1 .*num_workers"):
        train(recipe("dataloader_num_workers=1"), progress=False)


def test_a_second_signal_has_its_usual_effect() -> None:
    # Shells make background jobs ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signum == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_keys_that_may_change_exist() -> None:
    own = {f"distillation.{key}" for key in DistillationSection.model_fields}
    own |= {f"perceptual.{key}" for key in PerceptualSection.model_fields}
    assert {*Recipe.model_fields, *GenerationRecipe.model_fields, *own} >= _RESUMABLE
    assert yaml.safe_load(load_recipe("small_x2").to_yaml()).keys() == set(Recipe.model_fields)
