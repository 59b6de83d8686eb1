"""Training from a full-precision network, in stages, and with a teacher."""

import contextlib
import functools
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from training_case import RESUME, SMALLEST, TINY, assert_same, interrupt_at, weights

import binarize
from binarize.conversion.export import packed_layers
from binarize.errors import BinarizeError
from binarize.layers import BinaryConv2d, Delayed, delayed, hard_sign, undelayed
from binarize.methods import Method, list_methods
from binarize.models import SRUNet, SuperResolutionPipeline
from binarize.recipes import build_model, build_scheduler, load_recipe, remove_stages
from binarize.training import TrainingInterrupted, load_checkpoint, train
from binarize.training.distillation import Distillation
from binarize.training.initial import initial_network, read_trained
from binarize.training.objective import Objective

BLOCKS = ("encoder.0", "encoder.1", "middle", "decoder.*")
STAGES = ("two_stage=0.4", f"progressive={{blocks: [{', '.join(map(repr, BLOCKS))}], until: 0.8}}")


def built(*overrides: str) -> SRUNet:
    torch.manual_seed(0)
    return build_model(load_recipe("small_x2", [*TINY, *overrides])).eval()


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, 16, 16), torch.tensor([5, 1500]), torch.rand(2, 3, 16, 16)


def test_delayed_parts_are_a_plain_convolution_at_first_and_the_method_later() -> None:
    scale = delayed("input_mean", 0.5)
    method = Method(activation=delayed("ste", 0.5), weight=delayed("scaled_sign", 0.75), scale=scale)
    layer = BinaryConv2d(3, 4, 3, padding=1, method=method)
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    weight = layer.weight.detach().clone().requires_grad_()

    layer(x).square().sum().backward()
    F.conv2d(twin, weight, padding=1).square().sum().backward()
    assert x.grad is not None
    assert twin.grad is not None
    torch.testing.assert_close(x.grad, twin.grad)
    torch.testing.assert_close(layer.weight.grad, weight.grad)

    signs = hard_sign(x.detach())
    mean = x.detach().abs().mean((1, 2, 3), keepdim=True)
    binarize.training_step(layer, 0.5)
    torch.testing.assert_close(layer(x), mean * F.conv2d(signs, weight, padding=1))
    binarize.training_step(layer, 0.75)
    alpha = weight.abs().mean((1, 2, 3)).view(1, -1, 1, 1)
    torch.testing.assert_close(layer(x), mean * alpha * F.conv2d(signs, hard_sign(weight), padding=1))


@pytest.mark.long
@pytest.mark.parametrize("method", [name for name in list_methods() if name != "custom"])
def test_after_its_stages_every_method_is_as_without(method: str) -> None:
    options = (f"method={method}",)
    staged, plain = built(*options, *STAGES), built(*options)
    plain.load_state_dict(undelayed(staged))
    for network in (staged, plain):
        binarize.training_step(network, 1.0)
    arguments = inputs()
    with torch.no_grad():
        expected = plain(*arguments).sample
        assert torch.equal(staged(*arguments).sample, expected)
        after = remove_stages(load_recipe("small_x2", [*TINY, *options, *STAGES]), staged)
        assert torch.equal(after(*arguments).sample, expected)
    assert not any(isinstance(module, Delayed) for module in after.modules())
    assert binarize.binary_state(after).keys() == binarize.binary_state(plain).keys()


def test_blocks_become_binary_one_after_another() -> None:
    network = built(*STAGES)
    binary: dict[str, bool] = {}
    layers = {name: module for name, module in network.named_modules() if isinstance(module, BinaryConv2d)}
    for name, layer in layers.items():
        watch = lambda module, inputs, output, name=name: binary.update({name: bool((output.abs() == 1).all())})  # noqa: E731
        layer.activation.register_forward_hook(watch)
    turns = {"encoder.0": 0.2, "encoder.1": 0.4, "middle": 0.6, "decoder": 0.8}
    for progress in (0.0, 0.19, 0.2, 0.4, 0.59, 0.6, 0.8, 1.0):
        binarize.training_step(network, progress)
        with torch.no_grad():
            network(*inputs())
        for name, layer in layers.items():
            turn = next(turn for block, turn in turns.items() if name.startswith(block))
            assert binary[name] == (progress >= turn), (name, progress)
            codes = layer.binary_weight().codes
            assert bool((codes.abs() == 1).all()) == (progress >= max(turn, 0.4)), (name, progress)


def test_invalid_stages() -> None:
    with pytest.raises(BinarizeError, match=r"weight part 'delayed': there is nothing to delay; name a part"):
        BinaryConv2d(3, 3, 3, method=Method(weight={"name": "delayed", "part": None}))
    with pytest.raises(BinarizeError, match=r"DelayedWeight: until is a share of training, in \(0, 1\]; got 2"):
        BinaryConv2d(3, 3, 3, method=Method(weight=delayed("sign", 2)))
    with pytest.raises(BinarizeError, match=r"progressive\.blocks: the pattern 'tail' matches no binary layer; names"):
        built("progressive={blocks: [tail]}")
    with pytest.raises(BinarizeError, match=r"two_stage: got 0\.5; has no effect while method is null"):
        load_recipe("small_x2", ["method=null", "two_stage=0.5"])
    with pytest.raises(BinarizeError, match=r"distillation: output and features are both 0"):
        load_recipe("small_x2", ["distillation={teacher: x, output: 0}"])


def test_a_run_in_stages_resumes_and_saves_a_plain_model(recipe: Any, trained: Any, resume: Any) -> None:
    options = (*STAGES, "validation_steps=2", "checkpointing_steps=2")
    whole, resumed = trained(*options), resume(2, *options)
    assert [entry.step for entry in resumed.history] == [3, 4, 5, 6]
    assert_same(whole.checkpoint, resumed.checkpoint)

    final = SuperResolutionPipeline.from_pretrained(whole.model_dir, pack=False).unet
    assert not any(isinstance(module, Delayed) for module in final.modules())
    assert "delayed" not in json.dumps(final.config["conversion"])
    network = build_model(recipe(*options))
    network.load_state_dict(load_checkpoint(whole.checkpoint)[0]["model"])
    with torch.no_grad():
        arguments = inputs()
        assert torch.equal(network.eval()(*arguments).sample, final.eval()(*arguments).sample)


def test_a_model_saved_between_stages_stays_as_it_is(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at(3, monkeypatch, signal.SIGTERM)
    run = recipe(*STAGES, "validation_steps=2")
    with pytest.raises(TrainingInterrupted) as caught:
        train(run, progress=False)
    monkeypatch.undo()
    # The model is that of step 2: full-precision weights, one block with binary activations.
    saved = SuperResolutionPipeline.from_pretrained(run.output_dir / "model", pack=False).unet
    steps = {float(module.progress) for module in saved.modules() if isinstance(module, Delayed)}
    assert list(steps) == [pytest.approx(2 / 6)]
    with pytest.raises(BinarizeError, match="still full precision"):
        binarize.binary_state(saved)
    assert caught.value.checkpoint.name == "checkpoint-3"


@pytest.mark.parametrize("inside", ["", "model", "model/unet"])
def test_a_binary_network_starts_from_full_precision_weights(inside: str, twin: Path) -> None:
    trained = SRUNet.from_pretrained(twin / "model" / "unet")
    recipe = load_recipe("small_x2", [*TINY, f"init_from={twin / inside}", "method=binarydm", "model.dropout=0.1"])
    network = initial_network(recipe, read_trained("init_from", twin / inside, recipe))
    assert network.config["dropout"] == 0.1
    latents = dict(network.named_parameters())
    for name, value in trained.named_parameters():
        if name.endswith(".bias") and name not in latents:
            continue  # dropped by the method
        assert torch.equal(latents[name], value), name
    # Scales that a method initialises from weights are those of the trained ones.
    name, layer = next((n, m) for n, m in network.named_modules() if isinstance(m, BinaryConv2d))
    found = layer.weight_binarizer.scale
    assert isinstance(found, torch.Tensor)
    expected = trained.get_parameter(f"{name}.weight").abs().mean((1, 2, 3))
    torch.testing.assert_close(found[0].detach(), expected.detach())


def test_a_run_starts_from_a_trained_network_and_resumes_without_it(twin: Path, recipe: Any) -> None:
    options = (f"init_from={twin}", "learning_rate=1e-12", "lr_scheduler=constant")
    started = train(recipe(*options, "max_train_steps=1"), progress=False)
    latent = SRUNet.from_pretrained(twin / "model" / "unet").get_parameter("encoder.0.blocks.0.conv1.weight")
    torch.testing.assert_close(weights(started.checkpoint)["encoder.0.blocks.0.conv1.weight"], latent.detach())
    assert train(recipe("init_from=gone", *options[1:], "max_train_steps=2", RESUME), progress=False).steps == 2


def test_a_run_starts_from_the_same_binary_network(recipe: Any, trained: Any) -> None:
    first = trained("max_train_steps=2")
    second = recipe(f"init_from={first.output_dir}", "max_train_steps=1", "learning_rate=1e-12")
    one, other = weights(first.checkpoint), weights(train(second, progress=False).checkpoint)
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-6, rtol=0)


def packed(run: Any, folder: Path) -> Any:
    unet = binarize.pack(SRUNet.from_pretrained(run.model_dir / "unet"))
    unet.save_pretrained(folder)
    return unet


def test_a_run_starts_from_the_same_packed_network(recipe: Any, trained: Any, tmp_path: Path) -> None:
    first = trained("max_train_steps=2")
    start = packed(first, tmp_path / "packed")
    second = recipe(f"init_from={tmp_path / 'packed'}", "max_train_steps=1", "learning_rate=1e-12")
    run = train(second, progress=False)
    again = dict(packed_layers(packed(run, tmp_path / "again")))
    for name, layer in packed_layers(start):
        assert torch.equal(again[name].bits, layer.bits)
        torch.testing.assert_close(again[name].scales, layer.scales, rtol=1e-5, atol=0)
    one, other = weights(first.checkpoint), weights(run.checkpoint)
    latents = {f"{name}.weight" for name, _ in packed_layers(start)}
    assert latents < one.keys() == other.keys()
    for name in one.keys() - latents:
        torch.testing.assert_close(one[name], other[name], atol=1e-6, rtol=0)


def test_invalid_binary_networks_to_start_from(recipe: Any, trained: Any, tmp_path: Path) -> None:
    binary = trained("max_train_steps=2")
    message = r"init_from: .*packed is packed with method 'irnet', .*Give the model that it was packed from"
    packed(trained("max_train_steps=2", "method=irnet"), tmp_path / "packed")
    with pytest.raises(BinarizeError, match=message):
        train(recipe(f"init_from={tmp_path / 'packed'}", "method=irnet"), progress=False)
    with pytest.raises(BinarizeError, match=r"packed holds another network than the recipe's:\n  conversion: "):
        train(recipe(f"init_from={tmp_path / 'packed'}"), progress=False)
    with pytest.raises(BinarizeError, match=r"another network than the recipe's:\n  conversion: "):
        train(recipe(f"init_from={binary.output_dir}", "method=reactnet"), progress=False)


def lesson(twin: Path, section: str, *overrides: str) -> tuple[Any, SRUNet, SRUNet, Any]:
    recipe = load_recipe("small_x2", [*TINY, f"distillation={{teacher: {twin}, {section}}}", *overrides])
    student, teacher = built(*overrides), read_trained("distillation", twin, recipe).network
    assert recipe.distillation is not None
    distillation = Distillation(recipe.distillation, student, teacher, contextlib.nullcontext)
    return recipe, student, teacher, Objective(recipe, build_scheduler(recipe), distillation)


def batch() -> dict[str, torch.Tensor]:
    pictures = {name: torch.rand(2, 3, 16, 16) for name in ("hr", "condition")}
    return {**pictures, "noise": torch.randn(2, 3, 16, 16), "timestep": torch.tensor([300, 1200])}


def test_the_distilled_loss_is_the_documented_sum(twin: Path) -> None:
    names = ["encoder.0.blocks.0", "middle.0", "middle.1"]
    section = "task: 0.5, output: 2, features: 3, blocks: [encoder.0.blocks.*, middle.*]"
    recipe, student, teacher, objective = lesson(twin, section)
    data = batch()
    losses = objective(student, data)

    noisy = build_scheduler(recipe).add_noise(data["hr"], data["noise"], data["timestep"])  # type: ignore[arg-type]
    outputs: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []
    predictions = []
    for network, found in zip((student, teacher), outputs, strict=True):
        for name in names:
            hook = lambda module, inputs, output, found=found: found.append(output.flatten(1))  # noqa: E731
            network.get_submodule(name).register_forward_hook(hook)
        with torch.no_grad():
            predictions.append(network(noisy, data["timestep"], data["condition"]).sample)
    cosines = [F.cosine_similarity(f, g) for f, g in zip(*outputs, strict=True)]
    expected = {
        "task": (predictions[0] - data["hr"]).abs().mean((1, 2, 3)),
        "output": (predictions[0] - predictions[1]).abs().mean((1, 2, 3)),
        "features": 2 - 2 * torch.stack(cosines).mean(0),
    }
    total = 0.5 * expected["task"] + 2 * expected["output"] + 3 * expected["features"]
    torch.testing.assert_close(losses.parts, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses.total.detach(), total, rtol=1e-4, atol=1e-6)
    losses.total.sum().backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not teacher.training


def test_lpips_is_a_term_beside_those_of_a_teacher(twin: Path, recipe: Any, backbone: Path) -> None:
    pytest.importorskip("lpips")
    section = f"perceptual={{weight: 0.3, backbone: {backbone}}}"
    options = (f"distillation={{teacher: {twin}, output: 0.5}}", "resolution=32", section)
    history = train(recipe(*options, "mixed_precision=bf16", "max_train_steps=2"), progress=False).history
    for entry in history:
        parts = entry.parts
        assert parts.keys() == {"task", "output", "perceptual"}
        assert entry.loss == pytest.approx(parts["task"] + 0.5 * parts["output"] + 0.3 * parts["perceptual"], rel=1e-5)


def test_a_distilled_run_resumes_exactly(twin: Path, trained: Any, resume: Any) -> None:
    options = (f"distillation={{teacher: {twin}, output: 0.5, features: 0.25}}",)
    whole = trained(*options)
    for entry in whole.history:
        parts = entry.parts
        assert entry.loss == pytest.approx(parts["task"] + 0.5 * parts["output"] + 0.25 * parts["features"], rel=1e-5)
    assert_same(whole.checkpoint, resume(3, *options).checkpoint)
    assert_same(whole.checkpoint, trained(*options, "gradient_checkpointing=true").checkpoint)


@pytest.mark.long
def test_a_compiled_student_learns_the_same(recipe: Any, trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = trained(*SMALLEST, "method=null", "max_train_steps=1").output_dir
    options = (*SMALLEST, f"distillation={{teacher: {teacher}, features: 1}}", "max_train_steps=2")
    plain = trained(*options)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    # Without a reset, its code would also run the second network, without the hooks that record block outputs.
    train(recipe(*SMALLEST, "max_train_steps=1", "compile=true", out="alone"), progress=False)
    compiled = train(recipe(*options, "compile=true", out="compiled"), progress=False)
    for one, other in zip(plain.history, compiled.history, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-4)
        assert other.parts == pytest.approx(one.parts, rel=1e-4)


def test_a_teacher_of_residuals_gives_its_scale(recipe: Any, trained: Any) -> None:
    residuals = ("target=residual", "scheduler.clip_sample=false")
    teacher = trained(*residuals, "residual_scale=0.07", "method=null", "max_train_steps=1")
    student = recipe(*residuals, f"distillation={{teacher: {teacher.output_dir}}}", "max_train_steps=1", out="student")
    assert SuperResolutionPipeline.from_pretrained(train(student, progress=False).model_dir).residual_scale == 0.07
    with pytest.raises(BinarizeError, match=r"predict something else:\n  residual_scale: 0\.07 there, None here\n"):
        train(recipe(f"distillation={{teacher: {teacher.output_dir}}}", out="pictures"), progress=False)
