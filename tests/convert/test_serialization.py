"""Saving and loading converted models, and what is refused."""

import json

import pytest
import torch
from errors_case import assert_error
from hosts_zoo import unet2d
from safetensors.torch import load_file, save_file
from torch import nn

import binarize
from binarize.errors import BinarizeError
from binarize.models import SRUNet

TINY = {"base_channels": 16, "channel_mults": (1, 2), "res_blocks": 1, "norm_groups": 8}


def outputs(model: nn.Module) -> torch.Tensor:
    x = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
    with torch.no_grad():
        return model.eval()(x, torch.tensor([3, 900]), x.flip(0)).sample


def test_srunet_round_trips_with_method_structure_and_selection(tmp_path):
    model = binarize.convert(
        SRUNet(**TINY, resampling="conv", fusion="wide"),
        binarize.methods.bidiffsr(groups=3),
        keep=["middle.1.*", lambda name, module: name == "encoder.0.down.convs.0"],
        overrides={"encoder.1.*": "reactnet"},
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    again = SRUNet.from_pretrained(tmp_path)
    assert torch.equal(outputs(again), outputs(model))
    first, second = ([(r.name, r.action) for r in binarize.report(m).rows if r.action != "new"] for m in (again, model))
    assert first == second
    assert torch.equal(outputs(binarize.load(tmp_path)), outputs(model))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["conversion"]["method"] == {"name": "bidiffsr", "groups": 3}


def small_host(width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.Conv2d(width, width, 3), nn.Conv2d(width, 3, 3))


def test_a_diffusers_host_is_rebuilt(tmp_path):
    model = binarize.convert(unet2d((8, 16)), "bidiffsr").eval()
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 900])
    again = binarize.load(binarize.save(model, tmp_path / "deep" / "folder"))
    with torch.no_grad():
        assert torch.equal(again(x, t).sample, model(x, t).sample)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"has no config\.json"),
        ("{", "is not valid JSON"),
        ("[]", "must be a JSON object"),
        ('{"binarize_format": 1}', "has no host and no conversion"),
        ('{"binarize_format": 9}', "binarize_format 9; this version reads 1"),
        ('{"_class_name": "SRUNet"}', "is rebuilt from its files; leave model out"),
    ],
)
def test_broken_folders_are_refused(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert_error(message, lambda: binarize.load(tmp_path, model=small_host()))


def test_what_cannot_be_saved_is_refused(tmp_path):
    assert_error("is not converted", binarize.save, nn.Conv2d(3, 3, 1), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(BinarizeError, match="is a file; give a folder"):
        binarize.save(binarize.convert(SRUNet(**TINY), "bidiffsr"), tmp_path / "file")


def test_weights_that_do_not_fit_are_refused(tmp_path):
    binarize.save(binarize.convert(small_host(), "bbcu"), tmp_path)
    assert_error(r"pass an unconverted instance: binarize\.load\(folder, model=\.\.\.\)", binarize.load, tmp_path)
    other = small_host(16)
    assert_error(r"does not fit the host: 8 of another shape, such as 0\.bias", binarize.load, tmp_path, model=other)
    assert type(other[1]) is nn.Conv2d  # as it was
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    assert_error(r"model\.safetensors cannot be read", lambda: binarize.load(tmp_path, model=small_host()))
    SRUNet(**TINY).save_pretrained(tmp_path / "unet")
    weights = next((tmp_path / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    assert_error("cannot be read as a safetensors file", binarize.load, tmp_path / "unet")


def test_weights_that_are_missing_or_extra_are_refused(tmp_path):
    binarize.save(binarize.convert(small_host(), "bbcu"), tmp_path / "host")
    SRUNet(**TINY).save_pretrained(tmp_path / "unet")
    for weights in (tmp_path / "host" / "model.safetensors", tmp_path / "unet" / "diffusion_pytorch_model.safetensors"):
        state = load_file(weights)
        first = next(iter(state))
        save_file({**{k: v for k, v in state.items() if k != first}, "extra": torch.zeros(1)}, weights)
    with pytest.raises(BinarizeError, match=r"1 missing, such as .*; 1 unexpected, such as extra"):
        binarize.load(tmp_path / "host", model=small_host())
    for read in (binarize.load, SRUNet.from_pretrained):
        assert_error("1 missing keys, 1 unexpected keys, such as", read, tmp_path / "unet")


def test_a_conversion_that_no_file_can_name_is_refused_before_writing(tmp_path):
    model = binarize.convert(SRUNet(**TINY), binarize.methods.bidiffsr(norm=lambda spec: nn.Identity()))
    for write in (model.save_pretrained, lambda folder: binarize.save(model, folder)):
        assert_error("cannot be saved, since no import path leads to it", write, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("conversion", "message"),
    [
        ({"format": 3, "method": {"name": "bbcu"}}, "has format 3; this version of binarize reads formats 1 and 2"),
        ({"format": 2, "method": {"name": "bbcu"}}, "must list the names of its binary layers; got None"),
        (
            {"format": 2, "binary": ["middle.9"], "method": {"name": "bbcu"}},
            r"layers that SRUNet does not .*'middle\.9'",
        ),
        ({"format": 1}, "unknown or missing keys: method"),
        ({"format": 1, "method": {"name": "bbcu"}, "extra": 1}, "unknown or missing keys: extra"),
        ({"format": 1, "method": {"name": "future"}}, "unknown method 'future'"),
        ({"unsaveable": "a lambda"}, "was not saveable: a lambda"),
    ],
)
def test_records_of_other_versions_are_refused(conversion, message):
    assert_error(message, SRUNet, **TINY, conversion=conversion)


def test_each_tensor_keeps_its_dtype(tmp_path):
    model = binarize.convert(small_host(), "bbcu").bfloat16()
    model[2].float()
    fresh = small_host()
    assert binarize.load(binarize.save(model, tmp_path), model=fresh) is fresh
    assert [layer.weight.dtype for layer in fresh] == [torch.bfloat16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("packed", [False, True])
def test_loaded_tensors_are_aligned_copies(packed, tmp_path):
    """Tensors of a mapped file are not aligned, so that sums, and then signs, could differ from the saved model's."""
    for name, network in {"unet": SRUNet(**TINY), "host": small_host()}.items():
        binarize.convert(network, "bbcu")
        binarize.save(binarize.pack(network) if packed else network, tmp_path / name)
    for loaded in (binarize.load(tmp_path / "unet"), binarize.load(tmp_path / "host", model=small_host())):
        assert all(t.data_ptr() % 64 == 0 for t in loaded.state_dict().values())
