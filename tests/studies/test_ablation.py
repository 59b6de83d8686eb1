"""Studies: what they run, what they measure, what they skip, and that they survive being killed."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

import binarize
from binarize.errors import BinarizeError
from binarize.evaluation import LpipsUnavailable, evaluate
from binarize.models import SuperResolutionPipeline
from binarize.recipes import (
    EvaluationSection,
    build_model,
    list_recipes,
    list_studies,
    load_recipe,
    load_study,
    study_path,
)
from binarize.recipes.study import as_texts
from binarize.studies import ablation
from binarize.studies.ablation import ablate
from binarize.studies.results import AblationResult, TrialResult, columns
from binarize.studies.state import Trial, folder_name
from binarize.training import TrainingInterrupted, load_checkpoint, train

TINY: dict[str, Any] = {
    "model": {"base_channels": 8, "channel_mults": [1], "norm_groups": 4},
    "resolution": 16,
    "train_batch_size": 2,
    "max_train_steps": 4,
    "learning_rate": 1e-3,
    "lr_warmup_steps": 0,
    "checkpointing_steps": 2,
    "validation_steps": 1000,
    "logging_steps": 1,
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[0:32, 0:32]
    for number in range(2):
        waves = [np.sin(rows / random.uniform(3, 9) + columns / random.uniform(3, 9)) for _ in range(3)]
        Image.fromarray((np.stack(waves, axis=-1) * 90 + 128).astype(np.uint8)).save(folder / f"p{number}.png")
    return folder


def make(pictures: Path, out: Path, **changes: Any) -> dict[str, Any]:
    study = {
        "base": "small_x2",
        "overrides": {**TINY, "train_data_dir": str(pictures)},
        "grid": {"method": ["bnn", {"name": "bidiffsr", "groups": 2}]},
        "evaluation": {"data_dir": str(pictures), "num_inference_steps": 2, "lpips": None},
        "output_dir": str(out),
    }
    return {**study, **changes}


@pytest.fixture(scope="module")
def finished(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], AblationResult]:
    study = make(pictures, tmp_path_factory.mktemp("study"), seeds=[0, 7])
    return study, ablate(study, progress=False)


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.parent.name != folder.name}


def forbid_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr("binarize.training.loop.train", train)


# What a study runs and measures.


def test_every_cell_is_run_with_every_seed_and_costs_what_its_network_does(
    finished: tuple[dict[str, Any], AblationResult],
) -> None:
    _, result = finished
    assert result.complete
    assert not result.failed
    assert [(trial.cell, trial.seed) for trial in result.trials] == [
        (cell, seed) for cell in ("method=bnn", "method=bidiffsr(groups=2)") for seed in (0, 7)
    ]
    for trial in result.trials:
        recipe = load_recipe(trial.folder / "recipe.yaml")
        counted = binarize.summary(build_model(recipe))
        assert (trial.params, trial.ops) == (counted.params, counted.ops)
        assert recipe.seed == trial.seed
        assert trial.train_step_seconds is not None
        assert trial.sample_step_seconds is not None
        assert 0 < trial.train_step_seconds < 10
        assert 0 < trial.sample_step_seconds < 10


def test_a_cell_is_the_run_that_train_would_make_of_its_recipe(
    finished: tuple[dict[str, Any], AblationResult], pictures: Path, tmp_path: Path
) -> None:
    study, result = finished
    texts = [*as_texts(study["overrides"]), "method={name: bidiffsr, groups: 2}", "seed=7", f"output_dir={tmp_path}"]
    alone = train(load_recipe("small_x2", texts), progress=False)
    expected = load_checkpoint(alone.checkpoint)[0]["model"]
    found = load_checkpoint(result.trials[3].folder / "checkpoint-4")[0]["model"]
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert result.trials[3].loss == alone.history[-1].loss


def test_the_figures_are_those_of_an_evaluation_of_the_saved_model(
    finished: tuple[dict[str, Any], AblationResult], pictures: Path
) -> None:
    trial = finished[1].trials[3]
    pipe = SuperResolutionPipeline.from_pretrained(trial.folder / "model")
    pipe.set_progress_bar_config(disable=True)

    def upscale(picture: Any) -> Any:
        return pipe(picture, num_inference_steps=2, generator=torch.Generator().manual_seed(7)).images[0]

    mean = evaluate(upscale, pictures, scale=2, lpips=None, progress=False).mean.model
    assert (trial.psnr, trial.ssim, trial.lpips) == (mean.psnr, mean.ssim, None)


def test_one_table_is_written_in_every_form(finished: tuple[dict[str, Any], AblationResult]) -> None:
    _, result = finished
    out = result.output_dir
    psnr = [trial.psnr for trial in result.trials[:2] if trial.psnr is not None]
    markdown = (out / "table.md").read_text(encoding="utf-8")
    assert f"| {statistics.fmean(psnr):.2f} ± {np.std(psnr, ddof=1):.2f} |" in markdown
    assert f"| method=bnn | {result.trials[0].params / 1e6:.3f} | {result.trials[0].ops / 1e9:.3f} |" in markdown
    assert "Mean and standard deviation over the seeds 0, 7." in markdown
    assert "state" not in markdown
    assert "LPIPS" not in markdown

    rows = list(csv.DictReader(io.StringIO((out / "table.csv").read_text(encoding="utf-8"))))
    assert [float(row["psnr"]) for row in rows[:2]] == psnr
    assert [row["seed"] for row in rows] == ["0", "7", "0", "7"]
    assert {row["error"] for row in rows} == {""}

    content = json.loads((out / "table.json").read_text(encoding="utf-8"))
    assert [trial["psnr"] for trial in content["trials"][:2]] == psnr
    with Image.open(out / "table.png") as image:
        assert image.format == "PNG"
        assert image.width > 600
    titles = [axes.get_title() for axes in result.plot().axes]
    assert titles == ["PSNR (dB)", "SSIM", "params (M)", "OPs (G)", "sampling step (ms)"]
    assert result.table().row_count == 2
    assert result.__rich__().columns[0].header == "cell"


# What a study does not do twice.


def test_what_is_done_is_not_repeated(
    finished: tuple[dict[str, Any], AblationResult], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study, result = finished
    before = times(result.output_dir)
    forbid_training(monkeypatch)
    again = ablate(study)
    assert again == result
    assert times(result.output_dir) == before
    assert "4 of 4 runs are done already" in capsys.readouterr().out


def test_bookkeeping_keys_repeat_nothing(
    finished: tuple[dict[str, Any], AblationResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    study, result = finished
    forbid_training(monkeypatch)
    assert ablate(study, ["logging_steps=3", "checkpointing_steps=100"], progress=False).trials == result.trials


def test_another_measurement_does_not_train_again(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make(pictures, tmp_path, grid={"method": ["bidiffsr"]})
    first = ablate(study, progress=False).trials[0]
    forbid_training(monkeypatch)
    second = ablate(study, ["evaluation.num_inference_steps=3", "evaluation.limit=1"], progress=False).trials[0]
    assert second.psnr != first.psnr
    assert (second.loss, second.train_step_seconds) == (first.loss, first.train_step_seconds)


def test_another_recipe_is_refused_or_repeats_its_runs_alone(pictures: Path, tmp_path: Path) -> None:
    cells = [
        {"name": "slow", "overrides": {"method": "bidiffsr"}},
        {"name": "fast", "overrides": {"method": "bidiffsr", "learning_rate": 2e-3}},
    ]
    study = make(pictures, tmp_path, grid={}, cells=cells)
    first = ablate(study, progress=False)
    cells[1]["overrides"] = {"method": "bidiffsr", "learning_rate": 3e-3}
    message = r"holds runs of these cells with other recipes:\n  fast: learning_rate was 0.002, is 0.003\n.*--force"
    with pytest.raises(BinarizeError, match=message):
        ablate(study, progress=False)
    assert [trial.state for trial in ablate(study, dry_run=True).trials] == ["done", "other recipe"]
    second = ablate(study, force=True, progress=False)
    assert second.complete
    assert second.trials[0] == first.trials[0]
    assert second.trials[1].loss != first.trials[1].loss
    assert sorted(path.name for path in second.trials[1].folder.parent.iterdir()) == ["seed-0"]


def test_a_half_trained_run_goes_on_and_ends_as_if_never_stopped(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from binarize.training import loop

    study = make(pictures, tmp_path / "a", grid={"method": ["bidiffsr"]})
    whole = ablate(study, progress=False).trials[0]
    cut = make(pictures, tmp_path / "b", grid={"method": ["bidiffsr"]})
    real = loop._Run._optimizer_step

    def stopping(self: Any, batches: Any) -> Any:
        if self.step == 3:
            raise TrainingInterrupted(signal.SIGTERM, Path("checkpoint-2"))
        return real(self, batches)

    monkeypatch.setattr(loop._Run, "_optimizer_step", stopping)
    with pytest.raises(TrainingInterrupted):
        ablate(cut, progress=False)
    assert ablate(cut, dry_run=True).trials[0].state == "step 2"
    steps: list[int] = []

    def counting(self: Any, batches: Any) -> Any:
        steps.append(self.step)
        return real(self, batches)

    monkeypatch.setattr(loop._Run, "_optimizer_step", counting)
    resumed = ablate(cut, progress=False).trials[0]
    assert steps == [2, 3]
    assert (resumed.psnr, resumed.ssim) == (whole.psnr, whole.ssim)


def test_a_run_killed_after_its_last_checkpoint_still_gets_its_model(pictures: Path, tmp_path: Path) -> None:
    study = make(pictures, tmp_path, grid={"method": ["bidiffsr"]})
    whole = ablate(study, progress=False).trials[0]
    (whole.folder / "result.json").unlink()
    (whole.folder / "run.json").write_text(
        json.dumps({**json.loads((whole.folder / "run.json").read_text()), "trained": None}), encoding="utf-8"
    )
    shutil.rmtree(whole.folder / "model")
    again = ablate(study, progress=False).trials[0]
    assert again.psnr == whole.psnr
    assert again.loss is None  # no step was left from which to take it


def test_a_plugin_that_was_changed_makes_another_run(pictures: Path, tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    text = (
        "from dataclasses import dataclass\n"
        "from binarize import Method, register_method\n"
        "@register_method('from_study', replace=True)\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class FromStudy(Method):\n"
        "    '''Mine.'''\n"
    )
    plugin.write_text(text, encoding="utf-8")
    path = tmp_path / "mine.yaml"
    study = make(pictures, tmp_path / "out", grid={}, cells=[{"name": "mine", "overrides": {"method": "from_study"}}])
    study["overrides"] = {**study["overrides"], "plugins": ["mine.py"]}
    path.write_text(yaml.safe_dump(study), encoding="utf-8")
    loaded, _ = load_study(path)
    trial = Trial("mine", 0, loaded.recipes()["mine"], loaded)
    before = trial.fingerprint()
    assert ablate(path, dry_run=True).trials[0].params > 0
    plugin.write_text(text + "# changed\n", encoding="utf-8")
    assert trial.fingerprint() != before


def test_a_damaged_record_is_named(pictures: Path, tmp_path: Path) -> None:
    study = make(pictures, tmp_path, grid={"method": ["bnn"]})
    folder = ablate(study, dry_run=True).trials[0].folder
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(BinarizeError, match=r"run\.json is not as a study wrote it .*; remove it"):
        ablate(study, dry_run=True)


# Failures, selection, dry runs.


def test_a_failing_cell_is_recorded_and_the_others_go_on(pictures: Path, tmp_path: Path) -> None:
    cells = [
        {"name": "too big", "overrides": {"method": "bnn", "resolution": 512}},
        {"name": "fits", "overrides": {"method": "bnn"}},
    ]
    path = tmp_path / "mine.yaml"
    study = make(pictures, tmp_path / "out", grid={}, cells=cells)
    path.write_text(yaml.safe_dump(study), encoding="utf-8")
    from binarize.cli import app

    ran = CliRunner().invoke(app, ["ablate", str(path)])
    assert ran.exit_code == 1
    assert "1 of 2 runs failed; see error.txt in their folders" in ran.stderr
    assert "too big, seed 0, failed: " in ran.stdout
    result = ablate(path, dry_run=True)
    assert [trial.state for trial in result.trials] == ["to do", "done"]
    assert "512" in (result.trials[0].folder / "error.txt").read_text(encoding="utf-8")
    table = json.loads((tmp_path / "out" / "table.json").read_text(encoding="utf-8"))
    assert [trial["state"] for trial in table["trials"]] == ["failed", "done"]

    mended = CliRunner().invoke(app, ["ablate", str(path), "resolution=16", "--only", "too*"])
    assert mended.exit_code == 1  # without the override the two cells are the same run
    assert "are the same run" in mended.stderr


def test_what_was_not_foreseen_is_recorded_with_its_kind(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(trial: Any, lpips: Any, *, progress: bool) -> Any:
        raise MemoryError("no more")

    monkeypatch.setattr(ablation, "run_trial", fails)
    result = ablate(make(pictures, tmp_path))
    assert [trial.error for trial in result.failed] == ["MemoryError: no more"] * 2
    assert "method=bnn failed: MemoryError: no more" in capsys.readouterr().out
    assert "MemoryError" in (result.trials[0].folder / "error.txt").read_text(encoding="utf-8")
    assert "| failed |" in result.to_markdown()


def test_chosen_cells_are_run_alone(pictures: Path, tmp_path: Path) -> None:
    study = make(pictures, tmp_path)
    result = ablate(study, only="method=b?n", progress=False)
    assert [trial.state for trial in result.trials] == ["done", "to do"]
    assert "| - | - |" in result.to_markdown()
    with pytest.raises(BinarizeError, match=r"only: no cell is called 'bnn'; there are method=bnn, method=bidiffsr"):
        ablate(study, only=["bnn"])


def test_a_dry_run_writes_nothing(pictures: Path, tmp_path: Path) -> None:
    result = ablate(make(pictures, tmp_path / "out"), dry_run=True)
    assert not (tmp_path / "out").exists()
    assert [trial.state for trial in result.trials] == ["to do", "to do"]
    assert all(trial.params > 0 for trial in result.trials)


@pytest.mark.slow
def test_lpips_is_left_out_with_a_note_and_measured_once_it_can_be(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: Path
) -> None:
    import binarize.evaluation

    study = make(pictures, tmp_path, grid={"method": ["bidiffsr"]})
    backbone = shared / "metrics" / "squeeze.backbone.pth"
    study["evaluation"] |= {"lpips": "squeeze", "lpips_backbone": str(backbone)}

    class Missing:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise LpipsUnavailable("get it there")

    with monkeypatch.context() as patch:
        patch.setattr(binarize.evaluation, "Lpips", Missing)
        first = ablate(study, progress=False)
    assert first.trials[0].lpips is None
    assert first.notes == ("LPIPS is left out. get it there",)
    assert "LPIPS is left out. get it there." in first.to_markdown()
    forbid_training(monkeypatch)
    second = ablate(study, progress=False)
    assert second.trials[0].lpips is not None
    assert "LPIPS (squeeze)" in second.to_markdown()


def test_without_matplotlib_the_plot_alone_is_left_out(
    finished: tuple[dict[str, Any], AblationResult], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import dataclasses

    result = dataclasses.replace(finished[1], output_dir=tmp_path)
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert sorted(path.name for path in result.save()) == ["table.csv", "table.json", "table.md"]
    assert "The plot is left out; it needs matplotlib" in result.to_markdown()
    with pytest.raises(BinarizeError, match=r"plots need matplotlib: pip install 'binarize-diffusion\[plot\]'"):
        result.plot()


# The table.


def row(cell: str, seed: int = 0, **figures: Any) -> TrialResult:
    return TrialResult(cell, seed, Path("x"), figures.pop("state", "done"), 1e6, 2e9, **figures)


def table(*trials: TrialResult, lpips: str | None = "alex", dataset: str | None = "Set5") -> AblationResult:
    return AblationResult("mine", "", dataset, lpips, Path("x"), trials)


def test_published_figures_stand_beside_the_measured_ones() -> None:
    published = {"params_m": 1.01, "ops_g": 2.0, "results": {"Set5": {"psnr": 35.68, "lpips": 0.0277}}}
    trials = row("a|b", psnr=30.123, lpips=0.1, published=published), row("other", psnr=20.0)
    result = table(*trials)
    lines = result.to_markdown().splitlines()
    assert lines[2].startswith(
        "| Set5 | params (M) | published | OPs (G) | published | PSNR | published | LPIPS (alex)"
    )
    assert lines[4] == r"| a\|b | 1.000 | 1.010 | 2.000 | 2.000 | 30.12 | 35.68 | 0.1000 | 0.0277 |"
    assert lines[5] == "| other | 1.000 | - | 2.000 | - | 20.00 | - | - | - |"
    # LPIPS of another backbone is another quantity.
    assert "0.0277" not in table(*trials, lpips="squeeze").to_markdown()
    assert "35.68" not in table(*trials, dataset=None).to_markdown()
    loss = next(column for column in columns(None) if column.key == "loss")
    assert result.published("other", loss) is None


def test_seeds_that_are_missing_are_left_out_of_the_mean() -> None:
    result = table(row("a", 0, psnr=30.0), row("a", 1, state="to do"), row("b", 0, psnr=1.0, loss=0.5))
    assert "| a | 1.000 | 2.000 | 30.00 | - | done, to do |" in result.to_markdown()
    assert result.values("a", "psnr") == [30.0]
    with pytest.raises(BinarizeError, match=r"there is no cell 'c'; there are a, b"):
        result.values("c", "psnr")


def test_times_are_shown_in_a_fitting_unit() -> None:
    text = table(row("a", train_step_seconds=1.234, sample_step_seconds=0.0123)).to_markdown()
    assert "| 1.23 s | 12.3 ms |" in text


# Studies as files.


FULL_PRECISION = ("SR3 (FP)", "full precision")  # what cells without a method are called


@pytest.mark.parametrize("name", list_studies())
def test_every_installed_study_is_valid_described_and_seeded_alike(name: str) -> None:
    study, _ = load_study(name)
    assert study.description
    assert not study.description.endswith(".")
    assert study.seeds == (0,)
    assert study.output_dir == Path("runs/ablations") / name
    recipes = study.recipes()
    assert len(recipes) >= 3
    assert all(recipe.method is not None for cell, recipe in recipes.items() if cell not in FULL_PRECISION)
    if not name.startswith(("small_", "default_")):
        assert all(recipe.published is not None for recipe in recipes.values())


def test_studies_are_no_recipes() -> None:
    assert not [name for name in list_recipes() if "ablations" in name or name in list_studies()]
    assert {"table2_x2", "table2_x4", "breakdown", "fusion", "time_aware", "groups"} <= set(list_studies())
    small = {name.removeprefix("small_") for name in list_studies() if name.startswith("small_")}
    assert small == {"methods", "breakdown", "fusion", "time_aware", "groups"}


def test_small_studies_change_what_the_papers_do() -> None:
    def axes(name: str) -> list[tuple[str, str, Any]]:
        rows = []
        for recipe in load_study(name)[0].recipes().values():
            method = recipe.method
            spec = {} if method is None else binarize.get_method(method.spec)
            parts = [getattr(spec, key, None) for key in ("name", "groups", "tar", "taa", "shortcut")]
            rows.append((recipe.model.resampling, recipe.model.fusion, parts))
        return rows

    def effective(rows: list[tuple[str, str, Any]]) -> list[Any]:
        # One group is one group, whatever TaR and TaA are called.
        return [
            (a, b, p[0], p[1] if p[2] or p[3] else 1, p[2] and p[1] > 1, p[3] and p[1] > 1, p[4]) for a, b, p in rows
        ]

    for full, small in (("breakdown", "small_breakdown"), ("fusion", "small_fusion"), ("groups", "small_groups")):
        assert effective(axes(full)) == effective(axes(small)), full
    by_parts = {tuple(one[3:6]) for one in effective(axes("small_time_aware"))}
    assert by_parts == {tuple(one[3:6]) for one in effective(axes("time_aware"))}
    assert [(*one[:2], one[2][0]) for one in axes("table2_x2")] == [
        (*one[:2], one[2][0]) for one in axes("small_methods")
    ]


@pytest.mark.slow
def test_small_networks_of_every_study_can_be_built(pictures: Path) -> None:
    for name in list_studies():
        if name.startswith("small_"):
            result = ablate(name, dry_run=True)
            assert all(trial.params < 1e6 for trial in result.trials)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in list_studies() if not name.startswith("small_")])
def test_full_size_studies_count_as_published(name: str) -> None:
    for trial in ablate(name, dry_run=True).trials:
        if "params_m" in trial.published:
            assert trial.params / 1e6 == pytest.approx(trial.published["params_m"], abs=0.011)
            assert trial.ops / 1e9 == pytest.approx(trial.published["ops_g"], abs=0.011)


def test_a_file_finds_bases_beside_it_and_takes_its_own_name(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("base: demo\nlearning_rate: 5e-3\n", encoding="utf-8")
    text = "base: base.yaml\ncells:\n- {name: a, overrides: {seed_free: 1}}\n"
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("{seed_free: 1}", "{learning_rate: 4e-3}") + "- {name: b}\n", encoding="utf-8")
    study, rest = load_study(path, ["seeds=[3]", "model.base_channels=32", "evaluation.lpips=null", "output_dir=o"])
    assert study.seeds == (3,)
    assert study.evaluation.lpips is None
    assert study.output_dir == Path("o")
    assert rest == ["model.base_channels=32"]
    recipes = study.recipes(rest)
    assert {name: recipe.learning_rate for name, recipe in recipes.items()} == {"a": 4e-3, "b": 5e-3}
    assert {recipe.model.base_channels for recipe in recipes.values()} == {32}


def test_cells_times_a_grid() -> None:
    study, _ = load_study(
        {
            "base": "small_x2",
            "cells": [{"name": "a", "overrides": {"method": "bnn"}}, {"name": "b", "base": "sr3_x2"}],
            "grid": {"learning_rate": [1e-3, 2e-3], "loss": ["l1", "l2"]},
            "output_dir": "x",
        }
    )
    recipes = study.recipes()
    assert list(recipes)[:2] == ["a, learning_rate=0.001, loss=l1", "a, learning_rate=0.001, loss=l2"]
    assert len(recipes) == 8
    assert recipes["b, learning_rate=0.002, loss=l1"].method is None


def test_overrides_are_joined_as_recipes_join_their_base() -> None:
    assert as_texts({"model": {"fusion": "add"}, "method": {"name": "bnn"}, "seeded": [1, "é"]}) == [
        'model.fusion="add"',
        'method={"name": "bnn"}',
        'seeded=[1, "é"]',
    ]
    assert as_texts({"method": {"groups": 2}, "method.tar": False}) == ["method.groups=2", "method.tar=false"]


BASE = {"base": "small_x2", "output_dir": "x"}


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ({**BASE}, r"grid: there is nothing to run; give cells, a grid or both"),
        ({"grid": {"seedling": [1]}, "output_dir": "x"}, r"grid: needs base, the recipe that it changes"),
        ({**BASE, "grid": {"method": []}}, r"grid: 'method' has no values; give a list of at least one"),
        ({**BASE, "grid": {"method": "bnn"}}, r"grid.method: got 'bnn'; must be a valid tuple"),
        ({**BASE, "grid": {"seed": [1]}}, r"grid: 'seed' cannot be changed here: the study's seeds decide it"),
        ({**BASE, "overrides": {"output_dir": "y"}}, r"overrides: 'output_dir' cannot be changed here"),
        ({**BASE, "cells": [{"name": "a"}, {"name": "a"}]}, r"cells: two cells are called 'a'"),
        ({"cells": [{"name": "a"}], "output_dir": "x"}, r"cells: 'a' has no base and the study has none either"),
        (
            {**BASE, "cells": [{"name": "a", "override": {}}]},
            r"cells.0.override: unknown key. Did you mean 'overrides'",
        ),
        ({**BASE, "grid": {"scale": [2]}, "seeds": []}, r"seeds: there is none; give at least one"),
        ({**BASE, "grid": {"scale": [2]}, "seeds": [1, 1]}, r"seeds: a seed is given twice"),
        ({**BASE, "grid": {"scale": [2]}, "evaluation": {"lr_data_dir": "x"}}, r"lr_data_dir: got 'x'; needs data_dir"),
        ({"base": "small_x2", "grid": {"scale": [2]}}, r"output_dir: missing"),
        ({**BASE, "grid": {"scale": [2]}, "evaluations": {}}, r"evaluations: unknown key. Did you mean 'evaluation'"),
    ],
)
def test_what_is_no_study_is_refused(study: dict[str, Any], message: str) -> None:
    with pytest.raises(BinarizeError, match=message):
        load_study(study)


def test_every_mistake_of_a_study_is_listed_at_once() -> None:
    with pytest.raises(BinarizeError) as caught:
        load_study({**BASE, "seeds": [-1], "grids": {}, "cells": [{"overrides": {"base": "small_x2"}}]})
    assert str(caught.value).splitlines() == [
        "study 'given' has 4 errors:",
        "  cells.0.name: missing; give it a value.",
        "  cells.0.overrides: 'base' cannot be changed here: name the base beside the overrides.",
        "  seeds.0: got -1; must be greater than or equal to 0.",
        "  grids: unknown key. Did you mean 'grid'?",
    ]


def test_mistakes_of_cells_are_listed_at_once_each_with_its_cells() -> None:
    cells = [{"name": name, "overrides": {"loss": loss}} for name, loss in (("a", "l3"), ("b", "l2"), ("c", "l3"))]
    study, _ = load_study({**BASE, "cells": cells})
    with pytest.raises(
        BinarizeError, match=r"(?s)no valid recipe:\n  a, c: recipe 'small_x2' has 1 error:\n  loss: got 'l3'"
    ):
        study.recipes()
    study, _ = load_study({**BASE, "grid": {"loss": ["l1", "l1"]}})
    with pytest.raises(BinarizeError, match=r"two cells of the study are called 'loss=l1'"):
        study.recipes()
    study, _ = load_study({**BASE, "grid": {"loss": ["l1", "l2"]}})
    with pytest.raises(BinarizeError, match=r"the cells 'loss=l1' and 'loss=l2' are the same run"):
        study.recipes(["loss=l1"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("small_method", r"unknown study 'small_method'; installed: breakdown, .*Did you mean 'small_methods'"),
        ("nowhere.yaml", r"there is no study file 'nowhere.yaml'; `binarize ablate --list`"),
    ],
)
def test_an_unknown_study_is_refused(name: str, message: str) -> None:
    with pytest.raises(BinarizeError, match=message):
        study_path(name)


def test_overrides_that_a_study_decides_are_refused() -> None:
    with pytest.raises(BinarizeError, match=r"'seed=1' cannot be given to a study: the study's seeds decide it"):
        load_study("small_groups", ["seed=1"])
    with pytest.raises(BinarizeError, match=r"resume_from_checkpoint=latest' cannot be given .* resumes by itself"):
        load_study("small_groups", ["resume_from_checkpoint=latest"])


def test_what_cannot_be_run_is_refused_before_anything_is(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make(pictures, tmp_path)
    study["overrides"] = {key: value for key, value in study["overrides"].items() if key != "train_data_dir"}
    study["evaluation"] = {"lpips": None}
    message = r"(?s)train_data_dir: missing; name .*\(method=bnn, method=bidiffsr.*evaluation.data_dir: missing; name"
    with pytest.raises(BinarizeError, match=message):
        ablate(study)
    overrides = ["train_data_dir=nowhere", "evaluation.data_dir=nowhere"]
    with pytest.raises(BinarizeError, match=r"(?s)no folder 'nowhere' .*evaluation.data_dir: nowhere: no such folder"):
        ablate(study, overrides)
    with pytest.raises(
        BinarizeError, match=r"(?s)networks of some cells cannot be built:\n  method=bnm: unknown method"
    ):
        ablate(make(pictures, tmp_path, grid={"method": ["bnm", "bnn"]}))
    cells = [{"name": "a b", "overrides": {"method": "bnn"}}, {"name": "A_b", "overrides": {"method": "xnor"}}]
    with pytest.raises(BinarizeError, match=r"the cells 'a b' and 'A_b' would share the folder"):
        ablate(make(pictures, tmp_path, grid={}, cells=cells))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BinarizeError, match=r"a study runs in one process; start it without a launcher"):
        ablate(study)
    assert not list(tmp_path.iterdir())


def test_pictures_may_be_those_of_the_recipes_validation(pictures: Path, tmp_path: Path) -> None:
    study = make(pictures, tmp_path, grid={"method": ["bnn"]}, evaluation={"lpips": None, "num_inference_steps": 1})
    study["overrides"] = {**study["overrides"], "validation_data_dir": str(pictures), "num_inference_steps": 1}
    assert ablate(study, progress=False).complete


def test_folders_are_named_by_cells_on_any_system() -> None:
    assert folder_name("SR3 (FP)") == "SR3_FP"
    assert folder_name("+ CP-Down&Up") == "+_CP-Down_Up"
    assert folder_name("K = 1") == "K_1"
    assert folder_name("方法").startswith("-")
    assert folder_name("方法") != folder_name("其他")
    assert len(folder_name("x" * 300)) < 80


# The how-to.

PAGE = (Path(__file__).parents[2] / "docs" / "howto" / "ablate.md").read_text(encoding="utf-8")
SHRINK = [
    "max_train_steps=1",
    "model.channel_mults=[1]",
    "model.base_channels=8",
    "resolution=16",
    "train_batch_size=1",
]


def test_the_how_to_runs_as_it_stands(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "held-out"):
        shutil.copytree(pictures, folder)
    quick = [*SHRINK, "lr_warmup_steps=0", "evaluation.num_inference_steps=1"]
    monkeypatch.setattr(binarize, "ablate", lambda study, **options: ablate(study, quick, **options), raising=False)
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    exec(compile(code, "ablate.md", "exec"), {})
    assert "| method.groups=5 |" in capsys.readouterr().out


def test_the_how_tos_study_is_valid_and_its_table_complete(tmp_path: Path) -> None:
    whole, cells = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "mine.yaml").write_text(whole, encoding="utf-8")
    study, _ = load_study(tmp_path / "mine.yaml")
    assert next(iter(study.recipes())) == "method.groups=1, method.activation=approx_sign"
    assert len(study.recipes()) == 4
    (tmp_path / "cells.yaml").write_text(cells, encoding="utf-8")
    assert list(load_study(tmp_path / "cells.yaml")[0].recipes()) == ["SR3", "ReActNet", "mine"]
    keys = re.findall(r"^\| `(\w+)` \|", PAGE[PAGE.index("| key of `evaluation`") :], re.MULTILINE)
    assert keys == list(EvaluationSection.model_fields)
    assert set(re.findall(r"`([a-z]\w+)`", PAGE.partition("## Write")[0])) >= set(list_studies())


# The command.


def test_the_command_lists_shows_and_runs(pictures: Path, tmp_path: Path) -> None:
    from binarize.cli import app

    run = CliRunner().invoke
    listed = run(app, ["ablate", "--list"])
    assert listed.exit_code == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()] == list(list_studies())
    nothing = run(app, ["ablate"])
    assert nothing.exit_code == 2
    assert "STUDY" in nothing.stderr
    dry = run(app, ["ablate", "small_groups", "--dry-run", f"output_dir={tmp_path / 'none'}", *SHRINK])
    assert dry.exit_code == 0
    assert "| method.groups=5 |" in dry.stdout
    assert "table:" not in dry.stdout

    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(make(pictures, tmp_path / "out", grid={"method": ["bnn"]})), encoding="utf-8")
    done = run(app, ["ablate", str(path), "max_train_steps=1"])
    assert done.exit_code == 0, done.output
    assert f"table: {tmp_path / 'out' / 'table.md'}" in done.stdout


def test_a_signal_ends_the_command_with_the_shells_status(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from binarize.cli import app

    def stopped(*args: Any, **kwargs: Any) -> None:
        raise TrainingInterrupted(signal.SIGTERM, Path("checkpoint-2"))

    monkeypatch.setattr("binarize.training.loop.train", stopped)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(make(pictures, tmp_path / "out")), encoding="utf-8")
    ran = CliRunner().invoke(app, ["ablate", str(path)])
    assert ran.exit_code == 143
    assert "saved checkpoint-2. The same command goes on from there." in ran.stderr


@pytest.mark.slow
def test_a_study_survives_kill_9_and_repeats_nothing(pictures: Path, tmp_path: Path) -> None:
    changes = {**TINY, "train_data_dir": str(pictures), "max_train_steps": 40, "checkpointing_steps": 5}
    cells = [{"name": str(number), "overrides": {"learning_rate": 1e-3 * number}} for number in (1, 2, 3)]
    path = tmp_path / "mine.yaml"
    out = tmp_path / "out"
    study = make(pictures, out, overrides=changes, grid={}, cells=cells)
    path.write_text(yaml.safe_dump(study), encoding="utf-8")
    command = [sys.executable, "-m", "binarize.cli", "ablate", str(path)]
    first, second = (out / "cells" / number / "seed-0" for number in "12")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        deadline = time.monotonic() + 200
        while not list(second.glob("checkpoint-*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (first / "result.json").is_file()
    assert not (second / "result.json").exists()
    reached = max(int(folder.name.split("-")[1]) for folder in second.glob("checkpoint-*"))
    assert reached < 40
    before = times(first)

    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250)
    assert done.returncode == 0, done.stderr
    assert "1 of 3 runs are done already" in done.stdout
    assert f"going on from {second / f'checkpoint-{reached}'}, at step {reached}" in done.stdout
    assert times(first) == before
    for name in ("table.md", "table.csv", "table.json", "table.png"):
        assert (out / name).is_file()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the program above: another order of summation can flip a sign
    try:
        whole = ablate({**study, "output_dir": str(tmp_path / "whole")}, progress=False)
    finally:
        torch.set_num_threads(threads)
    found = ablate(path, dry_run=True)
    assert found.complete
    for one, other in zip(found.trials, whole.trials, strict=True):
        assert one.psnr is not None
        assert other.psnr is not None
        assert math.isclose(one.psnr, other.psnr, abs_tol=1e-6)
