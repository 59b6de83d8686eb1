"""Studies of recipes for generation: measures by number of steps, resuming, overrides, and what is refused."""

import csv
import io
import json
import shutil
import signal
import statistics
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from errors_case import assert_error
from generation_case import CONDITIONAL, TINY, write_images
from PIL import Image
from studies_case import forbid_training
from typer.testing import CliRunner

from binarize.cli import app
from binarize.evaluation.generation import evaluate_generator
from binarize.models.loading import load_generator
from binarize.recipes import load_recipe
from binarize.studies import GenerationStudy, load_study
from binarize.studies.ablation import ablate
from binarize.studies.results import AblationResult, RunResult
from binarize.studies.tasks import file_problems
from binarize.training import TrainingInterrupted, loop

pytest.importorskip("torchmetrics")
pytestmark = pytest.mark.slow

Finished = tuple[dict[str, Any], AblationResult]


def make(images: Path, out: Path, **changes: Any) -> dict[str, Any]:
    overrides = dict(text.split("=", 1) for text in (*TINY, CONDITIONAL, f"train_data_dir={images}"))
    study = {
        "base": "generation/digits",
        "overrides": {key: yaml.safe_load(value) for key, value in overrides.items()},
        "cells": [{"name": "full", "overrides": {"method": None, "structure": "auto"}}, {"name": "binary"}],
        "evaluation": {"num_inference_steps": [2, 3], "count": 8},
        "output_dir": str(out),
    }
    return {**study, **changes}


@pytest.fixture(scope="module")
def symbols(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("symbols"))


@pytest.fixture(scope="module")
def finished(symbols: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    study = make(symbols, tmp_path_factory.mktemp("study"), seeds=[0, 7])
    return study, ablate(study, progress=False)


@pytest.mark.long
def test_results_are_those_of_the_saved_models(finished: Finished, symbols: Path) -> None:
    _, result = finished
    assert result.complete, result.to_markdown()
    assert (result.steps, result.features) == ((2, 3), "pixels")
    run = result.runs[3]
    assert (run.cell, run.seed, load_recipe(run.folder / "recipe.yaml").seed) == ("binary", 7, 7)
    pipe = load_generator(run.folder)
    pipe.set_progress_bar_config(disable=True)
    for steps in (2, 3):
        report = evaluate_generator(pipe, symbols, count=8, num_inference_steps=steps, progress=False)
        assert run.scores is not None
        found = {key: run.scores[f"{key}_{steps}"] for key in ("frechet", "kid", "precision", "recall", "nearest")}
        assert found == pytest.approx({key: report.values()[key] for key in found}, rel=1e-4)
        saved = json.loads((run.folder / f"{steps}-steps" / "evaluation.json").read_text())
        assert (saved["frechet"], saved["steps"]) == (run.scores[f"frechet_{steps}"], steps)
        # The first samples of both classes, from the noise of the seeds 0 and 1 in every run.
        with Image.open(run.folder / f"{steps}-steps" / "samples.png") as grid:
            pixels = np.asarray(grid)
        noise = [torch.Generator().manual_seed(seed) for seed in range(4)]  # in another batch, signs might flip
        images = pipe(class_labels=[0, 1, 0, 1], generator=noise, num_inference_steps=steps).images
        assert abs(pixels[:8, :8].astype(int) - np.asarray(images[0]).astype(int)).max() <= 1


@pytest.mark.long
def test_the_table_has_means_over_seeds(finished: Finished) -> None:
    _, result = finished
    values = result.values("binary", "frechet_3")
    markdown = (result.output_dir / "table.md").read_text(encoding="utf-8")
    assert "| FD, 2 steps | FD, 3 steps | KID | precision | recall | loss |" in markdown
    assert f"| {statistics.fmean(values):.4g} ± {statistics.stdev(values):.4g} |" in markdown
    assert "features by pixels; KID, precision and recall are at 3 steps." in markdown
    rows = list(csv.DictReader(io.StringIO((result.output_dir / "table.csv").read_text(encoding="utf-8"))))
    assert [float(row["frechet_3"]) for row in rows[2:]] == values
    content = json.loads((result.output_dir / "table.json").read_text(encoding="utf-8"))
    assert content["trials"][2]["scores"]["frechet_3"] == values[0]
    assert_error("there is no value 'fid'; there are params, ", result.values, "full", "fid")
    axes = result.plot().axes
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["full", "binary"]
    line = axes[0].containers[1].lines[0]
    assert list(line.get_ydata()) == [statistics.fmean(result.values("binary", f"frechet_{n}")) for n in (2, 3)]


def test_a_table_without_results_has_a_plot(tmp_path: Path) -> None:
    failed = RunResult("a", 0, tmp_path, "failed", 1.0, 1.0, error="reason")
    result = AblationResult("study", "", None, None, tmp_path, (failed,), features="pixels", steps=(2, 3))
    assert result.plot().axes[0].get_legend() is None


@pytest.mark.long
def test_finished_runs_are_kept_and_measured_anew(
    finished: Finished, symbols: Path, tmp_path: Path, monkeypatch
) -> None:
    study, result = finished
    forbid_training(monkeypatch)
    assert ablate(study, ["logging_steps=3"], progress=False) == result
    shutil.copytree(result.output_dir, tmp_path / "copy")
    moved = {**study, "output_dir": str(tmp_path / "copy")}
    other = ablate(moved, ["evaluation.num_inference_steps=1"], only="binary", progress=False)
    assert other.steps == (1,)
    assert [run.state for run in other.runs] == ["trained", "trained", "done", "done"]
    assert "| FD, 1 step | KID |" in other.to_markdown()
    assert other.runs[3].loss == result.runs[3].loss
    assert [axes.get_title() for axes in other.plot().axes][:2] == ["FD, 1 step", "KID"]
    states = [run.state for run in ablate(moved, ["learning_rate=3e-3"], dry_run=True).runs]
    assert states == ["other recipe"] * 4
    assert ablate(moved, ["guidance_scale=2"], dry_run=True).runs[0].state == "trained"


@pytest.mark.long
def test_an_interrupted_run_resumes_exactly(finished: Finished, symbols: Path, tmp_path: Path, monkeypatch) -> None:
    study = make(symbols, tmp_path, seeds=[7], cells=[{"name": "binary"}])
    real = loop._Run._optimizer_step

    def stopping(self: Any, batches: Any) -> Any:
        if self.step == 4:
            raise TrainingInterrupted(signal.SIGTERM, Path("checkpoint-3"))
        return real(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_optimizer_step", stopping)
        with pytest.raises(TrainingInterrupted):
            ablate(study, progress=False)
    assert ablate(study, dry_run=True).runs[0].state == "step 3"
    assert ablate(study, progress=False).runs[0].scores == finished[1].runs[3].scores


@pytest.mark.long
def test_cells_start_from_and_learn_from_a_twin(symbols: Path, tmp_path: Path) -> None:
    twin = str(tmp_path / "cells" / "full" / "seed-0" / "model")
    taught = {"init_from": twin, "distillation": {"teacher": twin, "output": 1}}
    cells = [
        {"name": "full", "overrides": {"method": None, "structure": "auto"}},
        {"name": "taught", "overrides": taught},
    ]
    study = make(symbols, tmp_path, cells=cells, evaluation={"num_inference_steps": 1, "count": 4})
    result = ablate(study, ["max_train_steps=2"], progress=False)
    assert result.complete, result.to_markdown()
    assert "output" in (result.runs[1].folder / "log.csv").read_text(encoding="utf-8").splitlines()[0]
    shutil.rmtree(tmp_path / "cells")
    elsewhere = {**study, "output_dir": str(tmp_path / "elsewhere")}
    message = "(?s)init_from: there is no model 'nowhere'; train it first.*distillation.teacher: there is no model "
    cells[1]["overrides"] = {**taught, "init_from": "nowhere"}
    assert_error(message, ablate, elsewhere)


def test_errors_before_the_first_run(symbols: Path, tmp_path: Path) -> None:
    full = [{"name": "full", "overrides": {"method": None, "structure": "auto"}}]
    one = tmp_path / "one"
    for name in ("bars", "dots"):
        (one / name).mkdir(parents=True)
        shutil.copy(symbols / name / "0.png", one / name)
    wrong = [
        "evaluation.num_inference_steps=[5, 2000]",
        "evaluation.features=nowhere.pth",
        f"evaluation.data_dir={one}",
    ]
    (tmp_path / "no.py").write_text("raise OSError('gone')\n")
    for overrides, message in (
        (wrong, "num_inference_steps: 2000 is above the 1000 .*features: nowhere.pth.*holds 2 images; at least 4"),
        ([f"evaluation.features={tmp_path}/no.py:f"], "evaluation.features: .*OSError: gone"),
        (["evaluation.data_dir=nowhere"], "evaluation.data_dir: there is no folder 'nowhere'"),
        (["resolution=16"], r"evaluation.data_dir: .*symbols\d+: 12 images cannot be used: .*is 8x8 pixels"),
        (["train_data_dir=null"], "train_data_dir: missing"),
        (["evaluation.features=squeeze"], "features: .*'squeeze' is unknown; allowed: pixels"),
        (["evaluation.lpips=alex"], "evaluation.lpips: unknown key"),
        (["evaluation.num_inference_steps=[2, 2]"], "give at least one number of steps, and none twice"),
        (["max_train_steps=1", "evaluation.count=3"], "evaluation.count: got 3"),
    ):
        assert_error(f"(?s){message}", ablate, make(symbols, tmp_path / "out", cells=full), overrides)
    both = [{"name": "a"}, {"name": "b", "base": "small_x2"}]
    study = {"base": "generation/digits", "cells": both, "output_dir": "x"}
    message = "b: the task of small_x2 is super_resolution, and the study's is generation"
    assert_error(message, load_study(study)[0].recipes)
    on_the_hub = load_recipe("small_x2", [f"train_data_dir={symbols}", "init_from=user/repository"])
    assert not list(file_problems(on_the_hub, tmp_path))
    study |= {"base": "generation/digts", "cells": full, "evaluation": {"count": 8}}
    assert_error("Did you mean 'generation/digits'", load_study, study)
    study["cells"] = [{**full[0], "base": "generation/digits"}]  # so the study's is not used
    assert isinstance(load_study(study)[0], GenerationStudy)
    assert not (tmp_path / "out").exists()


def test_code_of_a_study_is_beside_its_file(symbols: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "own.py").write_text(
        "from diffusers import UNet2DModel\n"
        "def features():\n    return lambda images: images.mean(dim=(2, 3))\n"
        "def net(**options):\n    return UNet2DModel(**options)\n"
    )
    network = {"factory": "own.py:net", "sample_size": 8, "in_channels": 1, "out_channels": 1, "norm_num_groups": 4}
    network |= {"block_out_channels": [8, 8], "down_block_types": ["DownBlock2D"] * 2}
    network |= {"up_block_types": ["UpBlock2D"] * 2, "layers_per_block": 1, "num_class_embeds": 3}
    study = make(symbols, tmp_path / "out", cells=[{"name": "own", "overrides": {"model": network}}])
    study["overrides"] = {k: v for k, v in study["overrides"].items() if not k.startswith("model.")}
    study["evaluation"] = {"features": "own.py:features", "num_inference_steps": 1}
    path = tmp_path / "mine.yaml"
    overrides = {f"model.{key}": value for key, value in network.items()}
    dotted = {**study, "cells": [{"name": "own", "overrides": overrides}]}
    path.write_text(yaml.safe_dump(dotted), encoding="utf-8")
    assert load_study(path)[0].recipes()["own"].model.factory == f"{tmp_path}/own.py:net"
    path.write_text(yaml.safe_dump(study), encoding="utf-8")
    run = CliRunner().invoke
    refused = run(app, ["ablate", str(path), "max_train_steps=1"])
    assert refused.exit_code == 1
    assert "own.py" in refused.stderr
    done = run(app, ["ablate", str(path), "max_train_steps=1", "--trust"])
    assert done.exit_code == 0, done.output
    forbid_training(monkeypatch)
    text = (tmp_path / "own.py").read_text()
    with mock.patch.dict("sys.modules"):
        assert ablate(path, ["max_train_steps=1"], dry_run=True).runs[0].state == "done"
        (tmp_path / "own.py").write_text(text + "# changed\n")
        assert ablate(path, ["max_train_steps=1"], dry_run=True).runs[0].state == "other recipe"


@pytest.mark.parametrize("name", ["generation_methods", "small_generation_methods"])
def test_installed_studies_compare_methods_at_one_budget(name: str) -> None:
    study, _ = load_study(name)
    assert isinstance(study, GenerationStudy)
    recipes = study.recipes()
    assert len(study.seeds) == 2
    assert [recipe.method and recipe.method.name for recipe in recipes.values()] == [
        None, "bnn", "reactnet", "bbcu", "bidm", "binarydm", "bidiffsr", "bidiffsr",
    ]  # fmt: skip
    assert [recipe.structure for recipe in recipes.values()][-2:] == ["keep", "cp_cs"]
    assert len({(recipe.max_train_steps, recipe.train_batch_size) for recipe in recipes.values()}) == 1
