"""Outputs, loss and gradients of the released BI-DiffSR code with random weights, in float64, from a fixture."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from errors_case import assert_error
from safetensors.torch import load_file, safe_open

import binarize
from binarize.models import SRUNet, load_official
from binarize.models.official import _prefixes, official_to_ours

FIXTURES = Path(__file__).parents[1] / "fixtures"
CHECKPOINT = FIXTURES / "small.pth"


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / "small.safetensors")


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    with safe_open(FIXTURES / "small.safetensors", "pt") as file:
        return {key: json.loads(value) for key, value in file.metadata().items()}


@pytest.fixture
def model(metadata: dict[str, Any]) -> SRUNet:
    return load_official(CHECKPOINT, **metadata["config"]).double()


def test_outputs_at_every_timestep(model, reference, metadata):
    for t in metadata["timesteps"]:
        with torch.no_grad():
            out = model(reference["x_t"], t, reference["lr"]).sample
        torch.testing.assert_close(out, reference[f"eps.t{t}"], rtol=0, atol=1e-9)


def test_all_timesteps_in_one_batch_equal_the_reference_one_by_one(model, reference, metadata):
    steps = torch.tensor(metadata["timesteps"])
    x, lr = (reference[key][:1].expand(len(steps), -1, -1, -1) for key in ("x_t", "lr"))
    with torch.no_grad():
        out = model(x, steps, lr).sample
    expected = torch.cat([reference[f"eps.t{t}"][:1] for t in metadata["timesteps"]])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)


def test_loss_and_every_gradient(model, reference, metadata):
    out = model(reference["x_t"], metadata["loss_timestep"], reference["lr"]).sample
    loss = (out - reference["target"]).abs().mean()
    torch.testing.assert_close(loss, reference["loss"][0], rtol=0, atol=1e-12)
    loss.backward()

    prefixes = sorted(_prefixes(model).items(), key=lambda item: -len(item[0]))
    parameters = dict(model.named_parameters())
    selected: dict[str, set[int]] = {}
    checked = set()
    for key in reference:
        if not key.startswith("grad."):
            continue
        name, _, row = (official_to_ours(key[5:], prefixes) or "").partition("@")
        grad = parameters[name].grad
        assert grad is not None, name
        if row:
            selected.setdefault(name, set()).add(int(row))
            grad = grad[int(row)]
        checked.add(name)
        torch.testing.assert_close(grad.reshape(reference[key].shape), reference[key], rtol=0, atol=1e-9, msg=name)
    assert checked == set(parameters)
    for name, rows in selected.items():
        unselected = [row for row in range(len(parameters[name])) if row not in rows]
        assert len(unselected) == 4
        assert not parameters[name].grad[unselected].any(), name


def test_the_default_mode_differs_from_parity_only_where_a_sign_is_zero(metadata, reference):
    plus = load_official(CHECKPOINT, sign_zero="plus", **metadata["config"]).double()
    zero = load_official(CHECKPOINT, **metadata["config"]).double()
    assert binarize.report(plus).replaced == binarize.report(zero).replaced
    with torch.no_grad():  # no sign of the fixture is exactly zero
        a, b = (m(reference["x_t"], 1000, reference["lr"]).sample for m in (plus, zero))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    for network, expected in ((plus, 1.0), (zero, 0.0)):
        layer = next(m for m in network.modules() if isinstance(m, binarize.layers.BinaryConv2d))
        assert layer.activation(torch.zeros(1)).item() == expected


def test_round_trip_keeps_parity_mode_and_weights(model, reference, tmp_path):
    model.float().save_pretrained(tmp_path)
    again = SRUNet.from_pretrained(tmp_path)
    assert binarize.conversion.record.conversion(again).method.sign_zero == "zero"
    torch.testing.assert_close(dict(again.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner_channel": 32}, "of another shape: .*Pass the configuration"),
        ({"channel_mults": [1, 2]}, "unexpected"),
        ({"channel_mults": [1, 2, 4, 8]}, "missing"),
        ({"fp_res": []}, "missing"),
        ({"dynamic_group": 3}, "timestep groups"),
        ({"fp_res": [100]}, r"fp_res holds 100; with image_size 32, use \[32, 16, 8\]"),
        ({"inner_chanel": 32}, "unknown configuration name 'inner_chanel'.*Did you mean 'inner_channel'"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_with_names(metadata, change, message):
    assert_error(message, load_official, CHECKPOINT, **{**metadata["config"], **change})


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    assert_error("is not a file", load_official, tmp_path / "missing.pth")
    broken = tmp_path / "broken.pth"
    broken.write_bytes(CHECKPOINT.read_bytes()[:5000])
    assert_error("not a readable torch checkpoint", load_official, broken)
    torch.save({"state_dict": {"a": torch.zeros(1)}}, broken)
    assert_error(r"must hold \{'params': state_dict\}; it holds state_dict", load_official, broken)
