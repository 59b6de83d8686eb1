"""Building what recipes describe: networks, plugins, and the published rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from studies_case import count

from binarize.errors import BinarizeError
from binarize.layers import BinaryConv2d
from binarize.recipes import build_model, import_plugins, list_recipes, load_recipe, validate


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_build_gives_the_networks_of_the_recipes() -> None:
    small = ["model.base_channels=8", "model.norm_groups=4", "model.channel_mults=[1,2]", "model.res_blocks=1"]
    full = build_model(load_recipe("sr3_x2", small))
    assert (full.config["resampling"], full.config["fusion"]) == ("conv", "wide")
    binary = build_model(load_recipe("bidiffsr_x2", [*small, "method.groups=3"]))
    assert not any(isinstance(module, BinaryConv2d) for module in full.modules())
    assert any(isinstance(module, BinaryConv2d) for module in binary.modules())
    assert binary.config["num_train_timesteps"] == 2000


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=bidifsr"], r"bidifsr.*bidiffsr"),
        (["method.group=3"], r"group.*groups"),
        (["keep=[no.such.module]"], r"no\.such\.module"),
        (["train_data_dir=no", "validation_data_dir=no"], r"not exist:\n  train_data_dir: .*\n  validation_data_dir: "),
        (["plugins=[nowhere.py]"], r"plugins: there is no file '.*nowhere\.py'"),
        (
            ["plugins=[no_module]"],
            r"cannot import 'no_module': ModuleNotFoundError.*Name a file of your own by its path",
        ),
    ],
)
def test_validation(overrides: list[str], message: str, tmp_path: Path) -> None:
    assert validate("demo", [f"train_data_dir={tmp_path}"]).train_data_dir == tmp_path
    with pytest.raises(BinarizeError, match=message):
        validate("demo", overrides)


def test_a_plugin_beside_the_recipe_is_imported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = tmp_path / "count.txt"
    write(tmp_path, f"with open({str(counter)!r}, 'a') as f: f.write('x')\n", "plugin.py")
    path = write(tmp_path, "base: demo\nplugins: [plugin.py, json]\n")
    monkeypatch.chdir("/")
    for _ in range(2):
        import_plugins(load_recipe(path).plugins)
    assert counter.read_text() == "x"


def test_a_failing_plugin_is_named_with_its_error_and_can_be_tried_again(tmp_path: Path) -> None:
    plugin = write(tmp_path, "raise RuntimeError('broken on purpose')\n", "plugin.py")
    with pytest.raises(BinarizeError, match=r"plugin\.py': RuntimeError: broken on purpose"):
        import_plugins([str(plugin)])
    plugin.write_text("")
    import_plugins([str(plugin)])


# The paper's rows.

COUNTS = {
    "paper/table2_bidiffsr_x2": (4.575043, 36.6686),
    "paper/table2_sr3_x2": (55.407, 176.408),
    "paper/table2_bbcu_x2": (4.822, 37.748),
    "paper/table2_reactnet_x2": (4.853, 37.934),
    "paper/table2_bnn_x2": (4.787, 37.934),
    "paper/table2_dorefa_x2": (4.787, 37.934),
    "paper/table2_xnor_x2": (4.787, 37.934),
    "paper/table2_irnet_x2": (4.787, 37.934),
    "paper/ablation_baseline": (4.2885, 36.67),
    "paper/ablation_identity": (4.2885, 36.67),
    "paper/ablation_cp": (4.2901, 36.67),
    "paper/ablation_cs": (4.2975, 36.67),
    "paper/ablation_add": (4.094, 33.40),
    "paper/ablation_split": (4.2975, 36.67),
    "paper/ablation_tar": (4.367, 36.67),
    "paper/ablation_taa": (4.506, 36.67),
    "paper/ablation_k2": (4.367, 36.67),
    "paper/ablation_k5": (4.575043, 36.6686),
}


def test_every_row_of_the_paper_is_counted_below() -> None:
    assert COUNTS.keys() == {name for name in list_recipes() if name.startswith("paper/") and not name.endswith("_x4")}


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_a_row_of_the_paper_has_the_published_size(name: str) -> None:
    recipe = load_recipe(name)
    summary, (params, ops) = count(recipe), COUNTS[name]
    assert summary.params / 1e6 == pytest.approx(params, abs=1e-3)
    assert summary.ops / 1e9 == pytest.approx(ops, abs=1e-2)
    assert recipe.published is not None
    # The paper rounds; two of its rows are off by 0.01.
    if recipe.published.params_m is not None and recipe.published.ops_g is not None:
        assert summary.params / 1e6 == pytest.approx(recipe.published.params_m, abs=0.0101)
        assert summary.ops / 1e9 == pytest.approx(recipe.published.ops_g, abs=0.0101)


@pytest.mark.parametrize("name", [name for name in list_recipes() if name.endswith("_x4") and name != "default_x4"])
def test_an_x4_row_is_the_x2_row_at_another_scale(name: str) -> None:
    two, four = load_recipe(name[:-1] + "2").model_dump(), load_recipe(name).model_dump()
    own = {"description", "published", "scale", "resolution", "output_dir"}
    assert {key for key in two if two[key] != four[key]} <= own
    assert (four["scale"], four["resolution"]) == (4, 256)
