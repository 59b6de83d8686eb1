"""Studies: what they run, measure, skip and report, and that they survive being killed."""

import csv
import dataclasses
import io
import json
import shutil
import signal
import statistics
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from errors_case import assert_error
from PIL import Image
from studies_case import SHRINK, Finished, forbid_training, make, times, write_study
from typer.testing import CliRunner

import binarize
from binarize.cli import app
from binarize.evaluation import LpipsUnavailable, evaluate
from binarize.models import SuperResolutionPipeline
from binarize.recipes import build_model, load_recipe
from binarize.studies import ablation, list_studies, load_study
from binarize.studies.ablation import ablate
from binarize.studies.results import AblationResult, RunResult
from binarize.studies.schema import as_strings
from binarize.studies.state import StudyRun, folder_name
from binarize.training import TrainingInterrupted, load_checkpoint, loop, train


def test_every_cell_runs_with_every_seed(finished: Finished) -> None:
    _, result = finished
    assert result.complete
    assert not result.failed
    assert [(run.cell, run.seed) for run in result.runs] == [
        (cell, seed) for cell in ("method=bnn", "method=bidiffsr(groups=2)") for seed in (0, 7)
    ]
    for run in result.runs:
        recipe = load_recipe(run.folder / "recipe.yaml")
        counted = binarize.summary(build_model(recipe))
        assert (run.params, run.ops) == (counted.params, counted.ops)
        assert recipe.seed == run.seed
        assert run.train_step_seconds is not None
        assert run.sample_step_seconds is not None
        assert 0 < run.train_step_seconds < 10
        assert 0 < run.sample_step_seconds < 10


def test_a_run_equals_train_on_its_recipe(finished: Finished, pictures: Path, tmp_path: Path) -> None:
    study, result = finished
    texts = [*as_strings(study["overrides"]), "method={name: bidiffsr, groups: 2}", "seed=7", f"output_dir={tmp_path}"]
    alone = train(load_recipe("small_x2", texts), progress=False)
    expected = load_checkpoint(alone.checkpoint)[0]["model"]
    found = load_checkpoint(result.runs[3].folder / "checkpoint-4")[0]["model"]
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert result.runs[3].loss == alone.history[-1].loss


def test_results_are_those_of_the_saved_model(finished: Finished, pictures: Path) -> None:
    run = finished[1].runs[3]
    pipe = SuperResolutionPipeline.from_pretrained(run.folder / "model")
    pipe.set_progress_bar_config(disable=True)

    def upscale(image: Any) -> Any:
        return pipe(image, num_inference_steps=2, generator=torch.Generator().manual_seed(7)).images[0]

    mean = evaluate(upscale, pictures, scale=2, lpips=None, limit=2, progress=False).mean.model
    assert (run.psnr, run.ssim, run.lpips) == (mean.psnr, mean.ssim, None)


def test_one_table_is_written_in_every_form(finished: Finished) -> None:
    _, result = finished
    out = result.output_dir
    psnr = [run.psnr for run in result.runs[:2] if run.psnr is not None]
    markdown = (out / "table.md").read_text(encoding="utf-8")
    assert f"| {statistics.fmean(psnr):.2f} ± {np.std(psnr, ddof=1):.2f} |" in markdown
    assert f"| method=bnn | {result.runs[0].params / 1e6:.3f} | {result.runs[0].ops / 1e9:.3f} |" in markdown
    assert "Mean and standard deviation over the seeds 0, 7." in markdown
    assert "state" not in markdown
    assert "LPIPS" not in markdown

    rows = list(csv.DictReader(io.StringIO((out / "table.csv").read_text(encoding="utf-8"))))
    assert [float(row["psnr"]) for row in rows[:2]] == psnr
    assert [row["seed"] for row in rows] == ["0", "7", "0", "7"]
    assert {row["error"] for row in rows} == {""}

    content = json.loads((out / "table.json").read_text(encoding="utf-8"))
    assert [run["psnr"] for run in content["trials"][:2]] == psnr
    with Image.open(out / "table.png") as image:
        assert image.format == "PNG"
        assert image.width > 600
    titles = [axes.get_title() for axes in result.plot().axes]
    assert titles == ["PSNR (dB)", "SSIM", "params (M)", "OPs (G)", "sampling step (ms)"]
    assert (result.table().row_count, result.__rich__().columns[0].header) == (2, "cell")


def test_finished_runs_are_not_repeated(finished, monkeypatch, capsys):
    study, result = finished
    before = times(result.output_dir)
    forbid_training(monkeypatch)
    again = ablate(study, ["logging_steps=3", "checkpointing_steps=100"])  # keys that change no result
    assert again == result
    assert times(result.output_dir) == before
    assert "4 of 4 runs are already done" in capsys.readouterr().out


def test_another_evaluation_trains_nothing(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make(pictures, tmp_path, grid={"method": ["bidiffsr"]})
    first = ablate(study, progress=False).runs[0]
    forbid_training(monkeypatch)
    second = ablate(study, ["evaluation.num_inference_steps=3", "evaluation.limit=1"], progress=False).runs[0]
    assert second.psnr != first.psnr
    assert (second.loss, second.train_step_seconds) == (first.loss, first.train_step_seconds)


def test_a_study_measures_with_its_degradation(pictures: Path, tmp_path: Path, monkeypatch) -> None:
    study = make(pictures, tmp_path, grid={"method": ["bidiffsr"]})
    first = ablate(study, progress=False).runs[0]
    plain = StudyRun("a", 0, load_recipe("small_x2"), load_study(study)[0])
    assert "degradation" not in plain.task.evaluation_keys()  # so the results of 0.1 stay valid
    forbid_training(monkeypatch)
    override = ["evaluation.degradation=[{reduce: box}, {jpeg: 20}]"]
    second = ablate(study, override, progress=False)
    assert second.runs[0].psnr != first.psnr
    assert second.runs[0].loss == first.loss
    assert "Low-resolution images are made by [{reduce: " in second.to_markdown()
    assert ablate(study, override, dry_run=True).runs[0].state == "done"
    assert ablate(study, dry_run=True).runs[0].state == "trained"
    message = "evaluation.degradation: has no effect on the images of "
    assert_error(message, ablate, study, [*override, f"evaluation.lr_data_dir={pictures}"], progress=False)


def test_another_recipe_is_refused_or_repeats_its_runs_alone(pictures: Path, tmp_path: Path) -> None:
    fast = {"method": "bidiffsr", "learning_rate": 2e-3}
    cells = [{"name": "slow", "overrides": {"method": "bidiffsr"}}, {"name": "fast", "overrides": fast}]
    study = make(pictures, tmp_path, grid={}, cells=cells)
    first = ablate(study, progress=False)
    cells[1]["overrides"] = {"method": "bidiffsr", "learning_rate": 3e-3}
    message = r"with other recipes or images:\n  fast: learning_rate: was 0.002, is 0.003\n.*--force"
    assert_error(message, ablate, study, progress=False)
    assert [run.state for run in ablate(study, dry_run=True).runs] == ["done", "other recipe"]
    second = ablate(study, force=True, progress=False)
    assert second.complete
    assert second.runs[0] == first.runs[0]
    assert second.runs[1].loss != first.runs[1].loss
    assert sorted(path.name for path in second.runs[1].folder.parent.iterdir()) == ["seed-0"]


def test_results_are_of_the_images_that_are_there(pictures: Path, tmp_path: Path, monkeypatch) -> None:
    training, test = (Path(shutil.copytree(pictures, tmp_path / name)) for name in ("training", "test"))
    study = make(training, tmp_path / "out", grid={"method": ["bidiffsr"]})
    study["evaluation"] |= {"data_dir": str(test)}
    first = ablate(study, progress=False).runs[0]
    names = sorted(path.name for path in test.iterdir())
    whole = {folder / name: (folder / name).read_bytes() for folder in (training, test) for name in names}

    def states() -> list[str]:
        return [run.state for run in ablate(study, dry_run=True).runs]

    (test / "zz.png").write_bytes(whole[test / names[0]])  # beyond the limit of two images
    assert states() == ["done"]
    (test / names[0]).write_bytes(whole[test / names[2]])
    assert states() == ["trained"]
    with monkeypatch.context() as patch:
        forbid_training(patch)
        second = ablate(study, progress=False).runs[0]
    assert second.psnr != first.psnr
    (training / names[1]).write_bytes(whole[training / names[2]])
    assert states() == ["other images"]
    message = rf"method=bidiffsr: training images: 1 changed, such as {names[1]}\n.*--force"
    assert_error(message, ablate, study, progress=False)
    (training / names[1]).write_bytes(whole[training / names[1]])
    assert states() == ["done"]
    training.rename(tmp_path / "elsewhere")
    assert states() == ["done"]
    record = json.loads((first.folder / "run.json").read_text())
    assert record.pop("images").keys() == set(names)
    (first.folder / "run.json").write_text(json.dumps(record))  # as version 0.1 wrote it
    assert states() == ["done"]


def test_an_interrupted_run_resumes_exactly(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ablate(make(pictures, tmp_path / "a", grid={"method": ["bidiffsr"]}), progress=False).runs[0]
    cut = make(pictures, tmp_path / "b", grid={"method": ["bidiffsr"]})
    real = loop._Run._optimizer_step
    steps: list[int] = []

    def stopping(self: Any, batches: Any) -> Any:
        steps.append(self.step)
        if steps == [0, 1, 2, 3]:
            raise TrainingInterrupted(signal.SIGTERM, Path("checkpoint-2"))
        return real(self, batches)

    monkeypatch.setattr(loop._Run, "_optimizer_step", stopping)
    with pytest.raises(TrainingInterrupted):
        ablate(cut, progress=False)
    assert ablate(cut, dry_run=True).runs[0].state == "step 2"
    resumed = ablate(cut, progress=False).runs[0]
    assert steps == [0, 1, 2, 3, 2, 3]
    assert (resumed.psnr, resumed.ssim) == (whole.psnr, whole.ssim)


def test_a_run_killed_after_its_last_checkpoint_still_gets_its_model(pictures: Path, tmp_path: Path) -> None:
    study = make(pictures, tmp_path, grid={"method": ["bidiffsr"]})
    whole = ablate(study, progress=False).runs[0]
    (whole.folder / "result.json").unlink()
    record = json.loads((whole.folder / "run.json").read_text())
    (whole.folder / "run.json").write_text(json.dumps({**record, "trained": None}))
    shutil.rmtree(whole.folder / "model")
    again = ablate(study, progress=False).runs[0]
    assert again.psnr == whole.psnr
    assert again.loss is None  # no step was left from which to take it
    (whole.folder / "run.json").write_text("{")
    assert_error(r"run\.json is not a file of a study .*; remove it", ablate, study, dry_run=True)


def test_a_plugin_that_was_changed_makes_another_run(pictures: Path, tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    text = (
        "import binarize\nbinarize.register_method('from_study', replace=True)(binarize.get_method('bnn').__class__)\n"
    )
    plugin.write_text(text, encoding="utf-8")
    study = make(pictures, tmp_path / "out", grid={}, cells=[{"name": "mine", "overrides": {"method": "from_study"}}])
    study["overrides"] = {**study["overrides"], "plugins": ["mine.py"]}
    path = write_study(study, tmp_path)
    loaded, _ = load_study(path)
    run = StudyRun("mine", 0, loaded.recipes()["mine"], loaded)
    before = run.fingerprint()
    assert ablate(path, dry_run=True).runs[0].params > 0
    plugin.write_text(text + "# changed\n", encoding="utf-8")
    assert run.fingerprint() != before


def test_a_failing_cell_is_recorded_and_the_others_go_on(pictures: Path, tmp_path: Path) -> None:
    overrides = {"too big": {"method": "bnn", "resolution": 512}, "fits": {"method": "bnn"}}
    cells = [{"name": name, "overrides": changes} for name, changes in overrides.items()]
    # The images may be those of the recipes' validation.
    evaluation = {"lpips": None, "num_inference_steps": 1}
    study = make(pictures, tmp_path / "out", grid={}, cells=cells, evaluation=evaluation)
    study["overrides"] = {**study["overrides"], "validation_data_dir": str(pictures)}
    path = write_study(study, tmp_path)
    ran = CliRunner().invoke(app, ["ablate", str(path)])
    assert ran.exit_code == 1
    assert "1 of 2 runs failed; see error.txt in their folders" in ran.stderr
    assert "too big, seed 0, failed: " in ran.stdout
    result = ablate(path, dry_run=True)
    assert [run.state for run in result.runs] == ["to do", "done"]
    assert "512" in (result.runs[0].folder / "error.txt").read_text(encoding="utf-8")
    table = json.loads((tmp_path / "out" / "table.json").read_text(encoding="utf-8"))
    assert [run["state"] for run in table["trials"]] == ["failed", "done"]

    mended = CliRunner().invoke(app, ["ablate", str(path), "resolution=16", "--only", "too*"])
    assert mended.exit_code == 1  # without the override the two cells are the same run
    assert "are the same run" in mended.stderr


def test_unexpected_errors_are_recorded(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablation, "train_and_measure", mock.Mock(side_effect=MemoryError("no more")))
    result = ablate(make(pictures, tmp_path))
    assert [run.error for run in result.failed] == ["MemoryError: no more"] * 2
    assert "method=bnn failed: MemoryError: no more" in capsys.readouterr().out
    assert "MemoryError" in (result.runs[0].folder / "error.txt").read_text(encoding="utf-8")
    assert "| failed |" in result.to_markdown()


def test_chosen_cells_are_run_alone(pictures: Path, tmp_path: Path) -> None:
    study = make(pictures, tmp_path / "out")
    planned = ablate(study, dry_run=True)
    assert not (tmp_path / "out").exists()
    assert [run.state for run in planned.runs] == ["to do", "to do"]
    assert all(run.params > 0 for run in planned.runs)
    result = ablate(study, only="method=b?n", progress=False)
    assert [run.state for run in result.runs] == ["done", "to do"]
    assert "| - | - |" in result.to_markdown()
    assert_error(r"only: no cell matches 'bnn'; there are method=bnn, method=bidiffsr", ablate, study, only=["bnn"])


def test_lpips_is_measured_once_available(pictures, tmp_path, monkeypatch, shared):
    study = make(pictures, tmp_path, grid={"method": ["bidiffsr"]})
    backbone = shared / "metrics" / "squeeze.backbone.pth"
    study["evaluation"] |= {"lpips": "squeeze", "lpips_backbone": str(backbone)}
    with monkeypatch.context() as patch:
        patch.setattr(ablation, "Lpips", mock.Mock(side_effect=LpipsUnavailable("get it there")))
        first = ablate(study, progress=False)
    assert first.runs[0].lpips is None
    assert first.notes == ("LPIPS is left out. get it there",)
    assert "LPIPS is left out. get it there." in first.to_markdown()
    forbid_training(monkeypatch)
    second = ablate(study, progress=False)
    assert second.runs[0].lpips is not None
    assert "LPIPS (squeeze)" in second.to_markdown()


def test_without_matplotlib_only_the_plot_is_missing(finished, monkeypatch, tmp_path):
    result = dataclasses.replace(finished[1], output_dir=tmp_path)
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert sorted(path.name for path in result.save()) == ["table.csv", "table.json", "table.md"]
    assert "The plot is left out; it needs matplotlib" in result.to_markdown()
    assert_error(r"plots need matplotlib: pip install 'binarize-diffusion\[plot\]'", result.plot)


def test_errors_before_the_first_run(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make(pictures, tmp_path)
    study["overrides"] = {key: value for key, value in study["overrides"].items() if key != "train_data_dir"}
    study["evaluation"] = {"lpips": None}
    nowhere = ["train_data_dir=nowhere", "evaluation.data_dir=nowhere"]
    typing_error = make(pictures, tmp_path, grid={"method": ["bnm", "bnn"]})
    cells = [{"name": "a b", "overrides": {"method": "bnn"}}, {"name": "A_b", "overrides": {"method": "xnor"}}]
    same_folder = make(pictures, tmp_path, grid={}, cells=cells)
    for invalid, overrides, message in (
        (study, [], r"train_data_dir: missing; .*\(method=bnn, method=bidiffsr.*evaluation.data_dir: missing; name"),
        (study, nowhere, r"no folder 'nowhere' .*evaluation.data_dir: nowhere: no such folder"),
        (typing_error, [], r"networks of some cells cannot be built:\n  method=bnm: unknown method"),
        (same_folder, [], r"the cells 'a b' and 'A_b' would share the folder"),
    ):
        assert_error(f"(?s){message}", ablate, invalid, overrides)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_error(r"a study runs in one process; start it without a launcher", ablate, study)
    assert not list(tmp_path.iterdir())


def test_folders_are_named_by_cells_on_any_system() -> None:
    assert [folder_name(cell) for cell in ("SR3 (FP)", "+ CP-Down&Up")] == ["SR3_FP", "+_CP-Down_Up"]
    assert folder_name("方法").startswith("-")
    assert folder_name("方法") != folder_name("其他")
    assert len(folder_name("x" * 300)) < 80


def row(cell: str, seed: int = 0, **figures: Any) -> RunResult:
    return RunResult(cell, seed, Path("x"), figures.pop("state", "done"), 1e6, 2e9, **figures)


def table(*runs: RunResult, lpips: str | None = "alex", dataset: str | None = "Set5") -> AblationResult:
    return AblationResult("mine", "", dataset, lpips, Path("x"), runs)


def test_published_figures_stand_beside_the_measured_ones() -> None:
    published = {"params_m": 1.01, "ops_g": 2.0, "results": {"Set5": {"psnr": 35.68, "lpips": 0.0277}}}
    trials = row("a|b", psnr=30.123, lpips=0.1, published=published), row("other", psnr=20.0)
    text = table(row("a", train_step_seconds=1.234, sample_step_seconds=0.0123)).to_markdown()
    assert "| 1.23 s | 12.3 ms |" in text
    result = table(*trials)
    lines = result.to_markdown().splitlines()
    heading = "| Set5 | params (M) | published | OPs (G) | published | PSNR | published | LPIPS (alex)"
    assert lines[2].startswith(heading)
    assert lines[4] == r"| a\|b | 1.000 | 1.010 | 2.000 | 2.000 | 30.12 | 35.68 | 0.1000 | 0.0277 |"
    assert lines[5] == "| other | 1.000 | - | 2.000 | - | 20.00 | - | - | - |"
    # LPIPS of another backbone is another quantity.
    assert "0.0277" not in table(*trials, lpips="squeeze").to_markdown()
    assert "35.68" not in table(*trials, dataset=None).to_markdown()
    assert result.published("other", "loss") is None


def test_seeds_that_are_missing_are_left_out_of_the_mean() -> None:
    result = table(row("a", 0, psnr=30.0), row("a", 1, state="to do"), row("b", 0, psnr=1.0, loss=0.5))
    assert "| a | 1.000 | 2.000 | 30.00 | - | done, to do |" in result.to_markdown()
    assert result.values("a", "psnr") == [30.0]
    assert_error(r"there is no cell 'c'; there are a, b", result.values, "c", "psnr")


def test_the_command_lists_shows_and_runs(pictures: Path, tmp_path: Path) -> None:
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

    path = write_study(make(pictures, tmp_path / "out", grid={"method": ["bnn"]}), tmp_path)
    done = run(app, ["ablate", str(path), "max_train_steps=1"])
    assert done.exit_code == 0, done.output
    assert f"table: {tmp_path / 'out' / 'table.md'}" in done.stdout


def test_the_exit_status_after_a_signal(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = mock.Mock(side_effect=TrainingInterrupted(signal.SIGTERM, Path("checkpoint-2")))
    monkeypatch.setattr("binarize.training.loop.train", stopped)
    ran = CliRunner().invoke(app, ["ablate", str(write_study(make(pictures, tmp_path / "out"), tmp_path))])
    assert ran.exit_code == 143
    assert "saved checkpoint-2. The same command goes on from there." in ran.stderr
