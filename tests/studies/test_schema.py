"""Studies as YAML files: what they contain, and which mistakes are errors."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from errors_case import assert_error
from studies_case import SHRINK

import binarize
from binarize.errors import BinarizeError
from binarize.recipes import build_model, list_recipes
from binarize.studies import EvaluationSection, GenerationEvaluation, list_studies, load_study
from binarize.studies.ablation import ablate
from binarize.studies.schema import as_strings

BASE = {"base": "small_x2", "output_dir": "x"}
FULL_PRECISION = ("SR3 (FP)", "full precision")  # what cells without a method are called


@pytest.mark.slow
@pytest.mark.parametrize("name", list_studies())
def test_every_installed_study_is_valid_described_and_seeded_alike(name: str) -> None:
    study, _ = load_study(name)
    assert study.description
    assert not study.description.endswith(".")
    generates = name.endswith("generation_methods")
    assert (study.seeds, study.output_dir) == ((0, 1) if generates else (0,), Path("runs/ablations") / name)
    recipes = study.recipes()
    assert len(recipes) >= 3
    assert all(recipe.method is not None for cell, recipe in recipes.items() if cell not in FULL_PRECISION)
    if not generates and not name.startswith(("small_", "default_")):
        assert all(recipe.published is not None for recipe in recipes.values())


@pytest.mark.slow
def test_studies_are_not_recipes() -> None:
    assert not [name for name in list_recipes() if "ablations" in name or name in list_studies()]
    assert {"table2_x2", "table2_x4", "breakdown", "fusion", "time_aware", "groups"} <= set(list_studies())
    small = {name.removeprefix("small_") for name in list_studies() if name.startswith("small_")}
    assert small == {"methods", "breakdown", "fusion", "time_aware", "groups", "generation_methods"}


@pytest.mark.long
def test_networks_of_every_study_have_the_published_sizes() -> None:
    counted: dict[str, Any] = {}  # equal networks, of which the studies have many, are built once
    for name in list_studies():
        for cell, recipe in load_study(name)[0].recipes().items():
            network = recipe.model_dump_json(include={"model", "scheduler", "method", "structure", "keep", "overrides"})
            published = recipe.published
            counts = published is not None and published.params_m is not None
            if network not in counted:
                with torch.device("meta"):
                    model = build_model(recipe)
                    counted[network] = binarize.summary(model) if counts or name.startswith("small_") else None
            found = counted[network]
            assert not name.startswith("small_") or found.params < 1e6, (name, cell)
            if counts:
                # The paper rounds; two of its rows are off by 0.01.
                assert found.params / 1e6 == pytest.approx(published.params_m, abs=0.0101), (name, cell)
                assert found.ops / 1e9 == pytest.approx(published.ops_g, abs=0.0101), (name, cell)


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
    cells = [{"name": "a", "overrides": {"method": "bnn"}}, {"name": "b", "base": "sr3_x2"}]
    study = {**BASE, "cells": cells, "grid": {"learning_rate": [1e-3, 2e-3], "loss": ["l1", "l2"]}}
    recipes = load_study(study)[0].recipes()
    assert list(recipes)[:2] == ["a, learning_rate=0.001, loss=l1", "a, learning_rate=0.001, loss=l2"]
    assert len(recipes) == 8
    assert recipes["b, learning_rate=0.002, loss=l1"].method is None


def test_overrides_are_joined_as_recipes_join_their_base() -> None:
    given = {"model": {"fusion": "add"}, "method": {"name": "bnn"}, "seeded": [1, "é"]}
    assert as_strings(given) == ['model.fusion="add"', 'method={"name": "bnn"}', 'seeded=[1, "é"]']
    moved = {"model": {"act_fn": "silu", "class": "UNet2DModel"}}  # the class first, which removes the base's options
    assert as_strings(moved) == ['model.class="UNet2DModel"', 'model.act_fn="silu"']
    assert as_strings({"method": {"groups": 2}, "method.tar": False}) == ["method.groups=2", "method.tar=false"]


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
        ({"cells": [{"name": "a"}], "output_dir": "x"}, r"cells: 'a' has no base and neither has the study"),
        ({**BASE, "cells": [{"name": "a", "override": {}}]}, r"override: unknown key. Did you mean 'overrides'"),
        ({**BASE, "grid": {"scale": [2]}, "seeds": []}, r"seeds: give at least one seed, and none twice"),
        ({**BASE, "grid": {"scale": [2]}, "seeds": [1, 1]}, r"seeds: give at least one seed, and none twice"),
        ("small_method", r"unknown study 'small_method'; installed: breakdown, .*Did you mean 'small_methods'"),
        ("nowhere.yaml", r"there is no study file 'nowhere.yaml'; `binarize ablate --list`"),
        ({**BASE, "grid": {"scale": [2]}, "evaluation": {"lr_data_dir": "x"}}, r"lr_data_dir: got 'x'; needs data_dir"),
        ({"base": "small_x2", "grid": {"scale": [2]}}, r"output_dir: missing"),
        ({**BASE, "grid": {"scale": [2]}, "evaluations": {}}, r"evaluations: unknown key. Did you mean 'evaluation'"),
    ],
)
def test_invalid_studies(study: Any, message: str) -> None:
    assert_error(message, load_study, study)


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
    twice, same = (load_study({**BASE, "grid": {"loss": losses}})[0] for losses in (["l1", "l1"], ["l1", "l2"]))
    for one, overrides, message in (
        (study, [], r"(?s)no valid recipe:\n  a, c: recipe 'small_x2' has 1 error: loss: got 'l3'"),
        (twice, [], r"two cells of the study are called 'loss=l1'"),
        (same, ["loss=l1"], r"the cells 'loss=l1' and 'loss=l2' are the same run"),
    ):
        assert_error(message, one.recipes, overrides)


@pytest.mark.parametrize("override", ["seed=1", "resume_from_checkpoint=latest"])
def test_overrides_that_a_study_decides(override: str) -> None:
    assert_error(rf"'{override}' cannot be given to a study: ", load_study, "small_groups", [override])


PAGE = (Path(__file__).parents[2] / "docs" / "howto" / "ablate.md").read_text(encoding="utf-8")


def test_the_how_to_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    # A dry run: other tests train and measure.
    planned = lambda study, dry_run=True: ablate(study, SHRINK, dry_run=True)  # noqa: E731
    monkeypatch.setattr(binarize, "ablate", planned, raising=False)
    exec(compile("\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)), "ablate.md", "exec"), {})
    assert "| method.groups=5 |" in capsys.readouterr().out


def test_the_how_tos_study_is_valid_and_its_table_complete(tmp_path: Path) -> None:
    whole, cells = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "mine.yaml").write_text(whole, encoding="utf-8")
    study, _ = load_study(tmp_path / "mine.yaml")
    assert next(iter(study.recipes())) == "method.groups=1, method.activation=approx_sign"
    assert len(study.recipes()) == 4
    (tmp_path / "cells.yaml").write_text(cells, encoding="utf-8")
    assert list(load_study(tmp_path / "cells.yaml")[0].recipes()) == ["SR3", "ReActNet", "mine"]
    for section, text in zip(
        (EvaluationSection, GenerationEvaluation), PAGE.split("| key of `evaluation`")[1:], strict=True
    ):
        assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == list(section.model_fields)
    assert set(re.findall(r"`([a-z]\w+)`", PAGE.partition("## Write")[0])) >= set(list_studies())
