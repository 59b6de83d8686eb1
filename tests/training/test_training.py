"""Training: the loss falls, runs resume exactly, checkpoints are whole, and what goes wrong is said."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from training_case import assert_same, interrupt_at, weights

from binarize.errors import BinarizeError
from binarize.recipes import DistillationSection, Recipe, build_scheduler, load_recipe
from binarize.training import Checkpoints, DivergedError, TrainingInterrupted, load_checkpoint, train
from binarize.training.checkpoint import STATE, replace_folder
from binarize.training.objective import prediction_target, sample_losses
from binarize.training.randomness import generator, torch_seed
from binarize.training.samples import BatchPlan

# Randomness and the order of samples.


def test_random_streams_are_fixed_for_good_and_differ_by_each_argument() -> None:
    first = generator(1, "noise", 2).standard_normal(4)
    np.testing.assert_array_equal(first, generator(1, "noise", 2).standard_normal(4))
    for other in (generator(2, "noise", 2), generator(1, "timestep", 2), generator(1, "noise", 3)):
        assert not np.array_equal(first, other.standard_normal(4))
    assert 0 <= torch_seed(0, "weights") < 2**63
    # Resuming a run after an update must not change its numbers.
    assert generator(0, "timestep", 5).integers(2000, size=4).tolist() == [37, 783, 1398, 279]


def test_noise_is_unit_gaussian_and_uncorrelated_between_samples() -> None:
    draws = np.stack([generator(0, "noise", index).standard_normal(4096) for index in range(64)])
    assert abs(draws.mean()) < 0.01
    assert abs(draws.std() - 1) < 0.01
    correlation = np.corrcoef(draws) - np.eye(64)
    assert np.abs(correlation).max() < 5 / math.sqrt(4096)


@given(size=st.integers(1, 4), accumulation=st.integers(1, 4), processes=st.integers(1, 4), step=st.integers(0, 10**6))
def test_a_step_has_the_same_samples_however_it_is_split(
    size: int, accumulation: int, processes: int, step: int
) -> None:
    total = size * accumulation * processes
    seen = [
        index
        for rank in range(processes)
        for forward in range(accumulation)
        for index in BatchPlan(size, accumulation, processes, rank).indices(step, forward)
    ]
    assert sorted(seen) == list(range(step * total, (step + 1) * total))


# The objective.


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_the_prediction_target_leads_the_scheduler_back_to_the_clean_picture(kind: str) -> None:
    scheduler = build_scheduler(load_recipe("small_x2", [f"scheduler.prediction_type={kind}"]))
    scheduler.set_timesteps(2000)
    clean, noise = torch.rand(1, 3, 4, 4, dtype=torch.float64), torch.randn(1, 3, 4, 4, dtype=torch.float64)
    for step in (0, 700, 1500):
        timesteps = torch.tensor([step])
        noisy = scheduler.add_noise(clean, noise, timesteps)
        target = prediction_target(scheduler, clean, noise, timesteps)
        found = scheduler.step(target, step, noisy).pred_original_sample
        torch.testing.assert_close(found, clean, atol=1e-5, rtol=0)


def test_an_unknown_prediction_type_is_refused() -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(prediction_type="flow")
    with pytest.raises(BinarizeError, match=r"prediction_type 'flow' cannot be trained; it must be 'epsilon'"):
        prediction_target(scheduler, torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.int64))


def test_losses_are_the_written_formulas_for_each_sample() -> None:
    prediction, target = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5)
    d = (prediction - target).numpy()
    expected = {"l1": np.abs(d), "l2": d**2, "charbonnier": np.sqrt(d**2 + 1e-6)}
    for kind, values in expected.items():
        found = sample_losses(kind, prediction, target).numpy()
        np.testing.assert_allclose(found, values.mean(axis=(1, 2, 3)), rtol=1e-6)
    with pytest.raises(BinarizeError, match=r"unknown loss 'huber'; it must be 'l1', 'l2' or 'charbonnier'"):
        sample_losses("huber", prediction, target)


# Checkpoints.


def state_of(step: int) -> dict[str, Any]:
    return {"step": step, "model": {"w": torch.full((3,), float(step))}}


def test_the_newest_are_kept_and_found(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, limit=2)
    assert checkpoints.find("latest") is None
    for step in (9, 10, 100):
        checkpoints.save(step, state_of(step), "scale: 2\n")
    assert list(checkpoints.list()) == [10, 100]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-100"]
    assert checkpoints.find("latest") == tmp_path / "checkpoint-100"
    assert checkpoints.find("checkpoint-10") == checkpoints.find(str(tmp_path / "checkpoint-10"))
    state, text = load_checkpoint(tmp_path / "checkpoint-100")
    assert (state["step"], text) == (100, "scale: 2\n")
    with pytest.raises(BinarizeError, match=r"'checkpoint-9' is not a complete checkpoint; .* has: checkpoint-10, "):
        checkpoints.find("checkpoint-9")


def test_all_are_kept_without_a_limit_and_a_second_write_replaces(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, limit=None)
    for step in (1, 2, 3, 3):
        checkpoints.save(step, {"step": step, "model": {"w": torch.tensor([float(len(checkpoints.list()))])}}, "")
    assert list(checkpoints.list()) == [1, 2, 3]
    assert weights(tmp_path / "checkpoint-3")["w"].item() == 3


class Unwritable:
    """Something that fails in the middle of being written, like a disk that is full."""

    def __reduce__(self) -> Any:
        raise OSError(28, "No space left on device")


def test_a_refused_write_leaves_the_previous_checkpoint_intact(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, limit=1)
    checkpoints.save(1, state_of(1), "")
    before = (tmp_path / "checkpoint-1" / STATE).read_bytes()
    with pytest.raises(BinarizeError, match=r"cannot write .*checkpoint-2: .*No space left.*checkpoint-1, is intact"):
        checkpoints.save(2, {**state_of(2), "x": Unwritable()}, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1"]
    assert (tmp_path / "checkpoint-1" / STATE).read_bytes() == before
    assert checkpoints.find("latest") == tmp_path / "checkpoint-1"


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_failure_at_any_call_leaves_the_old_folder(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"

    def fill(text: str) -> Any:
        return lambda folder: (folder / "a").write_text(text)

    replace_folder(target, fill("old"))
    real = getattr(os, call)
    calls = 0

    def failing_at(number: int) -> Any:
        def counted(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                raise OSError(5, "Input/output error")
            return real(*arguments)

        return counted

    for number in range(1, 10):
        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing_at(number))
            try:
                replace_folder(target, fill("new"))
            except OSError:
                assert (target / "a").read_text() in ("old", "new")
                assert [path.name for path in tmp_path.iterdir()] == ["model"]
            else:
                break
    assert 2 <= calls < number
    assert (target / "a").read_text() == "new"


def test_half_written_folders_are_never_chosen_and_are_tidied(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, limit=3)
    checkpoints.save(5, state_of(5), "")
    (tmp_path / ".checkpoint-9.abcd0123.tmp").mkdir()
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / ".step-1.abcd0123.tmp.png").touch()
    (tmp_path / "checkpoint-8").mkdir()  # no state in it
    assert list(checkpoints.list()) == [5]
    # A run killed between the two renames of a replacement.
    (tmp_path / "checkpoint-5").rename(tmp_path / ".checkpoint-5.abcd0123.old")
    assert list(checkpoints.list()) == []
    checkpoints.tidy()
    assert list(checkpoints.list()) == [5]
    assert not list(tmp_path.rglob(".*"))


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    folder = Checkpoints(tmp_path, limit=None).save(1, state_of(1), "")
    content = (folder / STATE).read_bytes()
    (folder / STATE).write_bytes(content[: len(content) // 2])
    with pytest.raises(BinarizeError, match=r"cannot read the checkpoint .*checkpoint-1: .*; remove it and resume"):
        load_checkpoint(folder)


# Runs.


@pytest.mark.parametrize("method", ["null", "bidiffsr"])
def test_thirty_steps_lower_the_loss_and_leave_a_pipeline(method: str, recipe: Any, pictures: Path) -> None:
    from binarize.models import SuperResolutionPipeline

    run = recipe(
        f"method={method}",
        "max_train_steps=30",
        "learning_rate=3e-3",
        "checkpointing_steps=30",
        "validation_steps=15",
        "use_ema=true",
        "ema_decay=0.9",
        f"validation_data_dir={pictures}",
        "num_validation_images=2",
    )
    result = train(run, progress=False)
    losses = [entry.loss for entry in result.history]
    assert len(losses) == 30
    assert np.mean(losses[-8:]) < 0.7 * np.mean(losses[:4])
    assert result.steps == 30
    assert result.validation.keys() == {15, 30}
    assert all(math.isfinite(psnr) for psnr in result.validation.values())

    shots = sorted(path.name for path in (run.output_dir / "samples").iterdir())
    assert shots == [f"step-{step:07d}-p{n}.png" for step in (15, 30) for n in (0, 1)]
    with Image.open(run.output_dir / "samples" / shots[0]) as strip:
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
    large = pipeline(torch.rand(3, 9, 7), num_inference_steps=2, output_type="pt").images
    assert tuple(large.shape[-2:]) == (18, 14)


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.dropout=0.3", "use_ema=true", "lr_scheduler=cosine", "lr_warmup_steps=2", "optimizer=adamw"),
        ("method=null", "timesteps_per=batch", "gradient_accumulation_steps=2", "train_batch_size=2"),
    ],
    ids=["binary", "full"],
)
def test_an_interrupted_run_ends_bit_for_bit_as_the_uninterrupted_one(
    overrides: tuple[str, ...], recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(recipe(*overrides, out="whole"), progress=False)

    run = recipe(*overrides, out="cut")
    interrupt_at(2 * run.gradient_accumulation_steps, monkeypatch, signal.SIGTERM)
    with pytest.raises(TrainingInterrupted, match=r"stopped by SIGTERM; saved .*checkpoint-2") as caught:
        train(run, progress=False)
    assert caught.value.exit_code == 143
    assert caught.value.checkpoint == run.output_dir / "checkpoint-2"
    monkeypatch.undo()
    torch.manual_seed(12345)  # the process that resumes has another random state
    resumed = train(recipe(*overrides, "resume_from_checkpoint=latest", out="cut"), progress=False)

    assert_same(weights(whole.checkpoint), weights(resumed.checkpoint))
    assert [e.loss for e in whole.history][2:] == [e.loss for e in resumed.history]
    assert [e.learning_rate for e in whole.history][2:] == [e.learning_rate for e in resumed.history]
    one, other = (load_checkpoint(result.checkpoint)[0] for result in (whole, resumed))
    if one["ema"] is not None:
        assert all(map(torch.equal, one["ema"]["shadow_params"], other["ema"]["shadow_params"]))


def test_ctrl_c_saves_and_leaves_with_its_own_status(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    interrupt_at(4, monkeypatch, signal.SIGINT)
    with pytest.raises(TrainingInterrupted, match="SIGINT") as caught:
        train(recipe(), progress=False)
    assert caught.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert list(Checkpoints(recipe().output_dir, None).list()) == [3, 4]


@pytest.fixture
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("timesteps_per", ["sample", "batch"])
def test_accumulated_passes_equal_one_large_batch(timesteps_per: str, recipe: Any) -> None:
    common = (f"timesteps_per={timesteps_per}", "model.dropout=0", "max_grad_norm=0.5")
    whole = train(recipe(*common, "train_batch_size=4", out="whole"), progress=False)
    parts = train(recipe(*common, "train_batch_size=1", "gradient_accumulation_steps=4", out="parts"), progress=False)
    one, other = weights(whole.checkpoint), weights(parts.checkpoint)
    assert one["conv_in.weight"].dtype == torch.float64
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-9, rtol=0)


@pytest.mark.usefixtures("_float64")
def test_a_resumed_run_may_split_its_batches_otherwise(recipe: Any) -> None:
    train(recipe("model.dropout=0", "max_train_steps=3"), progress=False)
    split = ("train_batch_size=2", "gradient_accumulation_steps=2", "resume_from_checkpoint=latest")
    resumed = train(recipe("model.dropout=0", *split), progress=False)
    whole = train(recipe("model.dropout=0", out="whole"), progress=False)
    one, other = weights(whole.checkpoint), weights(resumed.checkpoint)
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-9, rtol=0)


def test_workers_change_nothing(recipe: Any) -> None:
    alone = train(recipe("max_train_steps=2", out="alone"), progress=False)
    helped = train(recipe("max_train_steps=2", "dataloader_num_workers=2", out="helped"), progress=False)
    assert_same(weights(alone.checkpoint), weights(helped.checkpoint))


def test_gradient_checkpointing_changes_nothing(recipe: Any) -> None:
    plain = train(recipe("max_train_steps=2", "model.dropout=0.2", out="plain"), progress=False)
    saving = train(
        recipe("max_train_steps=2", "model.dropout=0.2", "gradient_checkpointing=true", out="saving"), progress=False
    )
    assert_same(weights(plain.checkpoint), weights(saving.checkpoint))


def test_training_leaves_the_global_random_state_alone(recipe: Any) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    train(recipe("max_train_steps=1"), progress=False)
    assert torch.equal(torch.rand(2), expected)


def test_half_precision_runs_and_a_next_run_may_have_another(recipe: Any) -> None:
    result = train(recipe("mixed_precision=bf16", "max_train_steps=2", out="bf16"), progress=False)
    assert weights(result.checkpoint)["conv_in.weight"].dtype == torch.float32
    train(recipe("mixed_precision=no", "max_train_steps=1", out="no"), progress=False)


def test_scalars_and_pictures_reach_tensorboard(recipe: Any, pictures: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = recipe("report_to=tensorboard", f"validation_data_dir={pictures}", "num_validation_images=1")
    result = train(run, progress=False)
    events = accumulator.EventAccumulator(str(run.output_dir / "tensorboard"))
    events.Reload()
    logged = {event.step: event.value for event in events.Scalars("loss")}
    assert logged.keys() == {1, 2, 3, 4, 5, 6}
    assert [logged[e.step] for e in result.history] == pytest.approx([e.loss for e in result.history])
    assert events.Scalars("learning_rate")[0].value == pytest.approx(1e-3)
    assert events.Scalars("validation/psnr")[0].value == pytest.approx(result.validation[6], rel=1e-4)
    assert events.Images("validation/p0")[0].width == 3 * 32


def test_progress_is_shown_with_loss_rate_and_speed(recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    train(recipe("max_train_steps=2", "resume_from_checkpoint=latest"))
    out, err = capsys.readouterr()
    assert "there is no checkpoint yet; starting anew" in out
    assert "4 samples x 1 forward passes x 1 processes = 4 per step, on" in out
    assert "2/2" in err
    assert "samples/s" in err
    assert "lr 1.00e-03" in err
    train(recipe("max_train_steps=3", "resume_from_checkpoint=latest"))
    assert "checkpoint-2, at step 2" in capsys.readouterr().out
    train(recipe("max_train_steps=3", "resume_from_checkpoint=latest"), progress=False)
    assert capsys.readouterr() == ("", "")


# What is refused or goes wrong.


def test_a_folder_that_holds_a_run_is_refused_without_resume_or_force(recipe: Any) -> None:
    run = recipe("max_train_steps=1")
    train(run, progress=False)
    (run.output_dir / "notes.txt").write_text("mine")
    with pytest.raises(BinarizeError, match=r"already holds a run; go on with it by resume_from_checkpoint=latest"):
        train(run, progress=False)
    result = train(recipe("max_train_steps=2", "seed=3"), force=True, progress=False)
    assert list(Checkpoints(run.output_dir, None).list()) == [2]
    assert (result.output_dir / "notes.txt").read_text() == "mine"
    with pytest.raises(BinarizeError, match=r"goes on with a run and force removes it; give one of them"):
        train(recipe("resume_from_checkpoint=latest"), force=True, progress=False)


def test_a_finished_run_resumes_to_itself(recipe: Any) -> None:
    first = train(recipe("max_train_steps=2"), progress=False)
    again = train(recipe("max_train_steps=2", "resume_from_checkpoint=latest"), progress=False)
    assert (again.steps, again.history, again.checkpoint) == (2, (), first.checkpoint)
    assert again.model_dir.is_dir()


def test_a_run_may_go_on_from_a_checkpoint_of_another_folder(recipe: Any) -> None:
    first = train(recipe("max_train_steps=3", out="first"), progress=False)
    resume = f"resume_from_checkpoint={first.checkpoint}"
    there = train(recipe("max_train_steps=3", resume, out="there"), progress=False)
    assert (there.checkpoint, there.steps) == (first.checkpoint, 3)
    assert there.model_dir == recipe(out="there").output_dir / "model"
    assert there.model_dir.is_dir()
    with pytest.raises(BinarizeError, match="already holds a run"):
        train(recipe(resume, out="there"), progress=False)


def test_a_model_that_cannot_be_written_leaves_the_one_before(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from binarize.models import SuperResolutionPipeline

    before = train(recipe("max_train_steps=1"), progress=False).model_dir
    files = {path: path.read_bytes() for path in before.rglob("*") if path.is_file()}

    def full(self: SuperResolutionPipeline, folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SuperResolutionPipeline, "save_pretrained", full)
    with pytest.raises(BinarizeError, match=r"cannot write the model to .*model: .*No space left on device"):
        train(recipe("max_train_steps=2", "resume_from_checkpoint=latest"), progress=False)
    assert {path: path.read_bytes() for path in before.rglob("*") if path.is_file()} == files


def test_an_output_folder_that_is_a_file_is_refused(recipe: Any) -> None:
    run = recipe()
    run.output_dir.write_text("")
    with pytest.raises(BinarizeError, match=r"output_dir: .* is a file; name a folder"):
        train(run, progress=False)


def test_an_output_folder_that_cannot_be_made_is_refused(recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BinarizeError, match=r"output_dir: cannot write .*file/run: Not a directory"):
        train(recipe(out="file/run"), progress=False)


def test_missing_training_pictures_are_asked_for(recipe: Any) -> None:
    with pytest.raises(BinarizeError, match=r"train_data_dir: missing; name the folder"):
        train(recipe("train_data_dir=null"), progress=False)


def test_a_changed_recipe_is_refused_with_the_difference(recipe: Any) -> None:
    train(recipe("max_train_steps=1"), progress=False)
    changed = ("learning_rate=5e-4", "model.dropout=0.5", "train_batch_size=2", "resume_from_checkpoint=latest")
    with pytest.raises(BinarizeError) as caught:
        train(recipe(*changed), progress=False)
    lines = str(caught.value).splitlines()
    assert "the recipe differs in what decides the result:" in lines[0]
    assert lines[1:-1] == [
        "  learning_rate: was 0.001, is 0.0005",
        "  model.dropout: was 0.0, is 0.5",
        "  samples per optimiser step: were 4, are 2; they are train_batch_size * gradient_accumulation_steps * "
        "processes",
    ]


def test_a_run_with_a_falling_rate_keeps_its_length(recipe: Any) -> None:
    train(recipe("lr_scheduler=cosine", "max_train_steps=2"), progress=False)
    with pytest.raises(BinarizeError, match="max_train_steps: was 2, is 3"):
        train(recipe("lr_scheduler=cosine", "max_train_steps=3", "resume_from_checkpoint=latest"), progress=False)


def test_a_loss_that_is_not_finite_names_the_pictures_and_spares_the_weights(
    recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from binarize.training import objective

    real = objective.sample_losses
    calls = 0

    def poisoned(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        losses = real(*arguments)
        return losses.clone().index_fill(0, torch.tensor([1]), float("nan")) if calls == 5 else losses

    monkeypatch.setattr(objective, "sample_losses", poisoned)
    with pytest.raises(
        DivergedError, match=r"loss of step 5 is not finite for the pictures p\d; .* The last checkpoint is .*-3\."
    ):
        train(recipe(), progress=False)


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_are_touched(
    recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from binarize.training import loop

    real = loop._Run._gradient_is_finite
    calls = 0

    def poisoned(run: Any) -> bool:
        nonlocal calls
        calls += 1
        if calls == 5:
            next(run.model.parameters()).grad[0] = float("inf")
        return real(run)

    monkeypatch.setattr(loop._Run, "_gradient_is_finite", poisoned)
    with pytest.raises(DivergedError, match=r"gradient of step 5 is not finite for the pictures p\d, .*-3\."):
        train(recipe(), progress=False)


def test_a_tracker_that_is_not_installed_is_refused(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from binarize.training import processes

    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BinarizeError, match=r"tensorboard is not installed; pip install 'binarize-diffusion\[train\]'"):
        train(recipe("report_to=tensorboard"), progress=False)


def test_a_dead_worker_is_reported(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from binarize.training.samples import NoisySamples

    def die(self: NoisySamples, index: int) -> dict[str, Any]:
        os._exit(1)

    monkeypatch.setattr(NoisySamples, "__getitem__", die)
    with pytest.raises(BinarizeError, match=r"a process that prepares batches died before step 1 .*num_workers"):
        train(recipe("dataloader_num_workers=1"), progress=False)


def test_a_second_signal_acts_as_usual() -> None:
    from binarize.training.signals import StopRequest

    # Shells have the jobs that they start in the background ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signum == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_every_free_key_is_a_key() -> None:
    from binarize.training.resume import _FREE

    keys = {*Recipe.model_fields, *(f"distillation.{key}" for key in DistillationSection.model_fields)}
    assert keys >= _FREE
    assert yaml.safe_load(load_recipe("small_x2").to_yaml()).keys() == set(Recipe.model_fields)
