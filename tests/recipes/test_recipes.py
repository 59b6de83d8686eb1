"""Recipes: what they contain, how they are found, derived and built, and which mistakes are errors."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from errors_case import assert_error
from hypothesis import given
from hypothesis import strategies as st

from binarize import recipes
from binarize.errors import BinarizeError
from binarize.models import SRUNet
from binarize.recipes import Recipe, build_scheduler, copy_recipe, import_plugins, list_recipes, load_recipe
from binarize.recipes.yaml_text import parse_yaml, to_yaml

ROOT = Path(__file__).resolve().parents[2]
NAMES = list(list_recipes())


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_the_released_settings_are_the_published_ones() -> None:
    recipe = load_recipe("bidiffsr_x2")
    expected = parse_yaml(
        """{scale: 2, resolution: 128, augment: true, loss: l1, timesteps_per: sample, train_batch_size: 16,
        max_train_steps: 1_000_000, optimizer: adam, learning_rate: 1e-4, adam_beta1: 0.9, adam_beta2: 0.99,
        adam_weight_decay: 0.0, max_grad_norm: null, lr_scheduler: constant, use_ema: false}""",
        "settings",
    )
    assert {key: getattr(recipe, key) for key in expected} == expected
    assert recipe.method is not None
    assert recipe.method.spec == {"name": "bidiffsr", "groups": 5}
    torch.testing.assert_close(build_scheduler(recipe).betas, torch.linspace(1e-6, 1e-2, 2000))
    assert build_scheduler(recipe).config["prediction_type"] == "epsilon"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_installed_recipe_is_valid_described_and_survives_being_written_out(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.description == list_recipes()[name]
    assert 10 < len(recipe.description) <= 100
    assert recipe.output_dir == Path("runs") / Path(name).name
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe


def test_the_model_section_is_the_networks_configuration() -> None:
    parameters = inspect.signature(SRUNet.__init__).parameters
    theirs = {name: p.default for name, p in parameters.items() if name not in ("self", "conversion")}
    config = Recipe(scale=2).model.config(2000)
    assert config == {name: tuple(v) if isinstance(v, list) else v for name, v in theirs.items()}


def test_a_file_is_found_by_its_path_and_names_its_own_folder(tmp_path: Path) -> None:
    path = write(tmp_path, "scale: 2\n")
    assert recipes.recipe_path(path) == path
    assert load_recipe(path) == Recipe(scale=2, output_dir=Path("runs/mine"))


@pytest.mark.parametrize(
    ("parent", "child", "overrides", "method"),
    [
        ("base: bidiffsr_x4", "method: {tar: false}", [], {"name": "bidiffsr", "groups": 5, "tar": False}),
        ("base: bidiffsr_x4", "method: {name: reactnet}", [], {"name": "reactnet"}),
        (
            "scale: 4\nmethod: bnn",
            "method: {sign_zero: plus}",
            ["method.group=2"],
            {"name": "bnn", "sign_zero": "plus", "group": 2},
        ),
    ],
)
def test_a_derived_recipe(parent, child, overrides, method, tmp_path):
    own = "\npublished: {source: a table}\noutput_dir: there\ndescription: d\nseed: 7\nmodel: {base_channels: 32}\n"
    write(tmp_path, parent + own, "parent.yaml")
    recipe = load_recipe(write(tmp_path, f"base: parent.yaml\nmodel: {{norm_groups: 8}}\n{child}\n"), overrides)
    assert (recipe.scale, recipe.seed) == (4, 7)
    assert (recipe.model.base_channels, recipe.model.norm_groups, recipe.model.channel_mults) == (32, 8, (1, 2, 4, 8))
    assert (recipe.published, recipe.description, recipe.output_dir) == (None, "", Path("runs/mine"))
    assert recipe.method is not None
    assert recipe.method.spec == method


@pytest.mark.parametrize(
    ("parent", "child", "overrides", "model"),
    [
        ("{factory: a:b, width: 8}", "{class: UNet2DModel}", [], {"class": "UNet2DModel"}),
        ("a:b", "{class: UNet2DModel, act_fn: silu}", [], {"class": "UNet2DModel", "act_fn": "silu"}),
        ("{class: UNet2DModel, act_fn: silu}", "{factory: a:b}", [], {"factory": "a:b"}),
        ("{class: A, act_fn: silu}", "{class: B, from_pretrained: null}", [], {"class": "B", "act_fn": "silu"}),
        ("{factory: a:b, width: 8}", "{width: 4}", [], {"factory": "a:b", "width": 4}),
        ("{class: A, act_fn: silu}", "{act_fn: relu}", ["model.from_pretrained=x"], {"from_pretrained": "x"}),
        ("a:b", "{width: 4}", ["model.class=A", "model.width=2"], {"class": "A", "width": 2}),
        ("{class: A, factory: null}", "{act_fn: relu}", ["model.class=B"], {"class": "B", "act_fn": "relu"}),
    ],
)
def test_the_network_may_come_from_elsewhere(parent, child, overrides, model, tmp_path):
    write(tmp_path, f"task: generation\nmodel: {parent}\n", "parent.yaml")
    recipe: Any = load_recipe(write(tmp_path, f"base: parent.yaml\nmodel: {child}\n"), overrides)
    found = recipe.model.model_dump(by_alias=True, exclude_none=True)
    assert found == model
    digits: Any = load_recipe("generation/digits", ["model.from_pretrained=x"])
    assert (digits.model.from_pretrained, digits.model.class_name, digits.model.options) == ("x", None, {})


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("learning_rate=2e-4", "learning_rate", 2e-4),
        ("model.channel_mults=[1, 2]", "model.channel_mults", (1, 2)),
        ("method=null", "method", None),
        ("max_train_steps=1_000", "max_train_steps", 1000),
        ("use_ema=true", "use_ema", True),
        ("mixed_precision=no", "mixed_precision", "no"),
        ("train_data_dir=a=b", "train_data_dir", Path("a=b")),
        ("report_to=none", "report_to", None),
        ("scheduler.prediction_type=v_prediction", "scheduler.prediction_type", "v_prediction"),
        (" seed = 3", "seed", 3),
    ],
)
def test_overrides_are_yaml_and_reach_into_sections(override: str, key: str, value: object) -> None:
    found: Any = load_recipe("bidiffsr_x2", [override])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


# PyYAML writes some control characters and line separators in a way that it does not read back; no recipe has them.
words = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Zl", "Zp"]))
scalars = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | words


@given(st.dictionaries(words, scalars | st.lists(scalars) | st.dictionaries(words, scalars)))
def test_written_yaml_reads_back_the_same_here_and_elsewhere(data: dict[str, Any]) -> None:
    text = to_yaml(data)
    assert parse_yaml(text, "text") == data
    assert yaml.safe_load(text) == data


def test_all_errors_are_listed_at_once() -> None:
    invalid = "scale=3 resolution=64 learnin_rate=1 loss=charbonier train_batch_size=0 model.base_chanels=3"
    overrides = [*invalid.split(), "model.fusion=css", "scheduler.beta_start=2", "lr_warmup_steps=ten", "qqq=1"]
    with pytest.raises(BinarizeError) as caught:
        load_recipe("demo", overrides)
    lines = str(caught.value).splitlines()
    assert lines[0] == "recipe 'demo' has 9 errors:"
    expected = [
        r"resolution: got 64; must be a multiple of scale \(3\)\.",
        r"learnin_rate: unknown key\. Did you mean 'learning_rate'\?",
        r"loss: got 'charbonier'; must be 'l1', 'l2', 'charbonnier' or 'psnr'\. Did you mean 'charbonnier'\?",
        r"train_batch_size: got 0; must be greater than 0\.",
        r"model\.base_chanels: unknown key\. Did you mean 'base_channels'\?",
        r"model\.fusion: got 'css'; must be 'wide', 'concat', 'add', 'split' or 'cs'\. Did you mean 'cs'\?",
        r"scheduler\.beta_start: got 2; must be less than 1\.",
        r"lr_warmup_steps: got 'ten'; must be a valid integer.*",
        r"qqq: unknown key\. `binarize recipes show NAME --full` lists all keys\.",
    ]
    for pattern in expected:
        assert sum(re.fullmatch("  " + pattern, line) is not None for line in lines[1:]) == 1, pattern


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.num_train_timesteps=1000"], r"model: num_train_timesteps is 1000 but the noise schedule's is 2000"),
        (["loss=psnr", "snr_gamma=5"], r"snr_gamma: got 5; the gradient of loss: psnr .*; remove it, or"),
        (["method=null", "structure=keep"], r"structure: got 'keep'; has no effect while method is null"),
        (["method=null", "keep=[head]"], r"keep: has no effect while method is null"),
        (["resolution=60", "scale=2", "model.channel_mults=[1,2,4,8]"], r"resolution: got 60; must be a multiple of 8"),
        (["lr_scheduler=constant", "lr_warmup_steps=5"], r"lr_warmup_steps: .* no effect with lr_scheduler 'con"),
        (["train_lr_data_dir=x"], r"train_lr_data_dir: .*needs train_data_dir"),
        (["validation_lr_data_dir=x"], r"validation_lr_data_dir: .*needs validation_data_dir"),
        (["scheduler.rescale_betas_zero_snr=true", "scheduler.prediction_type=epsilon"], r"scheduler: .*pure noise"),
        (["scale=null"], r"scale: got None; must be a valid integer"),
        (["method={groups: 2, name: null}"], r"method\.name: got None; must be a valid string"),
        (["learning_rate=.inf"], r"learning_rate: got inf; must be a finite number"),
        (["published={}"], r"published\.source: missing; give it a value"),
        (["seed=3.5"], r"seed: got 3\.5; must be a valid integer"),
        (["train_data_dir=5"], r"train_data_dir: got 5; must be"),
    ],
)
def test_invalid_values(overrides: list[str], message: str) -> None:
    assert_error(message, load_recipe, "small_x2", overrides)


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        ("seed: 1", "seed=2", r"has 1 error:\n  scale: missing; give it a value\."),
        ("seed: 1", "seed", r"the override 'seed' is not key=value; write, for example, learning_rate=2e-4"),
        ("seed: 1", "=3", r"is not key=value"),
        ("seed: 5", "seed.x=3", r"reaches into seed, which is 5 and has no keys"),
        ("seed: 1", "model=[1", r"the override 'model=\[1' is not valid YAML at line 1"),
        ("scale: [2", "seed=2", r"mine\.yaml is not valid YAML at line"),
        ("- scale", "seed=2", r"is not a recipe: it must hold `key: value` lines"),
        ("", "seed=2", r"is not a recipe"),
        ("\xff", "seed=2", r"mine\.yaml: cannot be read as text"),
        ("scale: 2\nscale: 4", "seed=2", r"the key 'scale' is given twice, on lines 1 and 2"),
        ("scale: !!python/object:os.system {}", "seed=2", r"line 1 has a tag"),
        ("base: [a]", "seed=2", r"base is \['a'\]; it must be a recipe's name"),
        ("base: other.yaml", "seed=2", r"its base 'other\.yaml' does not exist beside it"),
        ("base: dem", "seed=2", r"unknown recipe 'dem'.* Did you mean 'demo'\?"),
        ("base: ../demo", "seed=2", r"unknown recipe '\.\./demo'"),
        ("base: mine.yaml", "seed=2", r"recipes are each other's base: mine\.yaml -> mine\.yaml"),
    ],
)
def test_invalid_files_and_overrides(text: str, override: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="latin-1")
    assert_error(message, load_recipe, path, [override])


def test_unknown_recipes() -> None:
    message = r"unknown recipe 'bidifsr_x2'; installed: bidiffsr_x2, .* Did you mean 'bidiffsr_x2'\?"
    assert_error(message, load_recipe, "bidifsr_x2")
    assert_error(r"there is no recipe file 'nowhere/mine\.yaml'", load_recipe, "nowhere/mine.yaml")


def test_a_copy_is_the_same_recipe_and_nothing_is_overwritten(tmp_path: Path) -> None:
    copied = copy_recipe("bidiffsr_x4", tmp_path)
    assert copied == tmp_path / "bidiffsr_x4.yaml"
    assert load_recipe(copied) == load_recipe("bidiffsr_x4")
    copied.write_text("scale: 2\n")
    for name, message in (("", "already exists"), ("d.txt", "must end in .yaml"), ("no/d.yaml", "does not exist")):
        assert_error(message, copy_recipe, "bidiffsr_x4", tmp_path / name)
    assert copied.read_text() == "scale: 2\n"
    copy_recipe("bidiffsr_x4", copied, force=True)
    assert load_recipe(copied) == load_recipe("bidiffsr_x4")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=bidifsr"], r"bidifsr.*bidiffsr"),
        (["method.group=3"], r"group.*groups"),
        (["keep=[no.such.module]"], r"no\.such\.module"),
        (["train_data_dir=no", "validation_data_dir=no"], r"not exist:\n  train_data_dir: .*\n  validation_data_dir: "),
        (["plugins=[nowhere.py]"], r"plugins: there is no file '.*nowhere\.py'"),
        (["plugins=[no_module]"], r"cannot import 'no_module': ModuleNotFoundError.*Name a file of your own by its p"),
    ],
)
def test_validation(overrides: list[str], message: str, tmp_path: Path) -> None:
    assert recipes.validate("demo", [f"train_data_dir={tmp_path}"]).train_data_dir == tmp_path
    assert_error(message, recipes.validate, "demo", overrides)


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
    assert_error(r"plugin\.py': RuntimeError: broken on purpose", import_plugins, [str(plugin)])
    plugin.write_text("")
    import_plugins([str(plugin)])


@pytest.mark.parametrize(
    "name", [name for name in list_recipes() if name.endswith("_x4") and name not in ("default_x4", "photo_x4")]
)
def test_an_x4_row_is_the_x2_row_at_another_scale(name: str) -> None:
    two, four = load_recipe(name[:-1] + "2").model_dump(), load_recipe(name).model_dump()
    own = {"description", "published", "scale", "resolution", "output_dir"}
    assert {key for key in two if two[key] != four[key]} <= own
    assert (four["scale"], four["resolution"]) == (4, 256)
