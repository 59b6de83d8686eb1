"""Converted diffusers models, saved and loaded by diffusers' own calls."""

import copy
import json
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.quantizers import PipelineQuantizationConfig
from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from diffusers.training_utils import EMAModel
from errors_case import assert_error
from hosts_zoo import unet2d, unet2d_condition
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import binarize
from binarize.conversion.record import QUANT_METHOD
from binarize.models import SRUNet

WIDTHS = (8, 16)
SRUNET = {"base_channels": 16, "channel_mults": (1, 2), "res_blocks": 1, "norm_groups": 8}


def converted(method="bidiffsr", build=lambda: unet2d(WIDTHS), **options) -> nn.Module:
    torch.manual_seed(0)
    model = binarize.convert(build(), method, **options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def output(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(1)
    given = {"sample": torch.randn(2, model.config["in_channels"], 16, 16), "timestep": torch.tensor([3, 900])}
    if "cross_attention_dim" in model.config:
        given["encoder_hidden_states"] = torch.randn(2, 5, 8)
    with torch.no_grad():
        return model.eval()(**given).sample


def actions(model: nn.Module) -> list[tuple[str, str]]:
    return [(row.name, row.action) for row in binarize.report(model).rows if row.action != "new"]


def assert_same(loaded: nn.Module, model: nn.Module) -> None:
    assert torch.equal(output(loaded), output(model))
    assert binarize.is_packed(loaded) == binarize.is_packed(model)
    assert actions(loaded) == actions(model)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("build", [lambda: unet2d(WIDTHS), unet2d_condition])
def test_models_come_back_exactly(build, packed, tmp_path):
    model = converted(build=build)
    if packed:
        binarize.pack(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_same(loaded, model)
    assert_same(binarize.load(tmp_path), model)
    assert_error("leave model out", binarize.load, tmp_path, model)
    assert all(t.data_ptr() % 64 == 0 for t in loaded.state_dict().values())
    for copied in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert_same(copied, model)
    binarize.save(loaded, tmp_path / "ours")
    assert_same(binarize.load(tmp_path / "ours"), model)
    assert next(loaded.to(torch.bfloat16).parameters()).dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("method", binarize.list_methods())
def test_every_method(method, tmp_path):
    model = converted(method, structure="keep")
    model.save_pretrained(tmp_path / "latent")
    assert_same(UNet2DModel.from_pretrained(tmp_path / "latent"), model)
    binarize.pack(model).save_pretrained(tmp_path / "packed")
    assert_same(UNet2DModel.from_pretrained(tmp_path / "packed"), model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saving", "loading"),
    [
        ({"variant": "fp16"}, {"variant": "fp16"}),
        ({"max_shard_size": "50KB"}, {}),
        ({"safe_serialization": False}, {"use_safetensors": False}),
        ({}, {"device_map": {"": "cpu"}}),
        ({}, {"torch_dtype": torch.float64}),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_options_of_diffusers(saving, loading, packed, tmp_path):
    model = converted()
    if packed:
        binarize.pack(model)
    model.save_pretrained(tmp_path, **saving)
    if "max_shard_size" in saving:
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = UNet2DModel.from_pretrained(tmp_path, **loading)
    dtype = loading.get("torch_dtype", torch.float32)
    assert next(loaded.parameters()).dtype == dtype
    if dtype == torch.float32:
        assert_same(loaded, model)
    else:
        assert torch.equal(loaded.state_dict()["conv_in.weight"].float(), model.conv_in.weight)


LOAD = "print(DDPMPipeline.from_pretrained(sys.argv[1]).unet.mid_block.resnets[0].conv1)"
BINARIZE, DIFFUSERS = "import binarize", "from diffusers import DDPMPipeline"


@pytest.mark.long
@pytest.mark.parametrize("imports", [[BINARIZE, DIFFUSERS], [DIFFUSERS, BINARIZE], [DIFFUSERS]])
def test_pipelines_load_in_a_fresh_process(imports, tmp_path):
    DDPMPipeline(binarize.pack(converted()), DDPMScheduler()).save_pretrained(tmp_path)
    code = "\n".join(["import sys", *imports, LOAD])
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    if BINARIZE in imports:
        assert run.stdout.startswith("PackedConv2d"), run.stderr
    else:
        assert "`import binarize` before loading" in run.stderr.splitlines()[-1]


OPTIONS = {
    "keep": [lambda name, module: name.startswith("down_blocks.0")],
    "overrides": {"up_blocks.1.*": "bidiffsr"},
    "linear": True,
    "structure": "keep",
    "num_train_timesteps": 950,
}


def test_pretrained_networks_are_converted_while_they_load(tmp_path):
    host = unet2d(WIDTHS)
    host.save_pretrained(tmp_path / "float")
    loaded = UNet2DModel.from_pretrained(
        tmp_path / "float", quantization_config=binarize.BinarizeConfig("xnor", **OPTIONS)
    )
    assert_same(loaded, binarize.convert(host, "xnor", **OPTIONS))
    loaded.save_pretrained(tmp_path / "binary")
    assert_same(UNet2DModel.from_pretrained(tmp_path / "binary"), host)
    assert "lambda" not in repr(loaded.hf_quantizer.quantization_config)  # the record took its place: it can be pickled
    assert not hasattr(loaded.dequantize(), "hf_quantizer")
    with pytest.raises(binarize.BinarizeError, match="not converted"):
        binarize.report(loaded)


def test_components_of_a_pipeline_are_converted(tmp_path):
    DDPMPipeline(unet2d(WIDTHS), DDPMScheduler()).save_pretrained(tmp_path)
    chosen = PipelineQuantizationConfig(quant_mapping={"unet": binarize.BinarizeConfig("reactnet")})
    pipe = DDPMPipeline.from_pretrained(tmp_path, quantization_config=chosen)
    assert binarize.report(pipe.unet).method == "reactnet"


def test_srunet_is_converted_while_it_loads(tmp_path):
    config = binarize.BinarizeConfig("reactnet")
    SRUNet(**SRUNET).save_pretrained(tmp_path / "float")
    loaded = SRUNet.from_pretrained(tmp_path / "float", quantization_config=config)
    loaded.save_pretrained(tmp_path / "binary")
    assert binarize.report(SRUNet.from_pretrained(tmp_path / "binary")).method == "reactnet"
    binarize.pack(loaded).save_pretrained(tmp_path / "packed")
    for name, message in (("binary", "already converted"), ("packed", "leave quantization_config out")):
        assert_error(message, SRUNet.from_pretrained, tmp_path / name, quantization_config=config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "packed"), [({}, True), ({"max_shard_size": "20KB"}, False), ({"variant": "fp16"}, False)]
)
def test_damaged_weights_are_refused(options, packed, tmp_path):
    variant = {key: value for key, value in options.items() if key == "variant"}
    model = converted("bnn")
    model = binarize.pack(model) if packed else model
    (tmp_path / "notes.txt").write_text("mine")
    model.save_pretrained(tmp_path, max_shard_size="10KB", **variant)  # of which nothing may be left
    model.save_pretrained(tmp_path, **options)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert_same(UNet2DModel.from_pretrained(tmp_path, **variant), model)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == ("max_shard_size" in options)
    for path in files[:3]:
        whole = path.read_bytes()
        for at in (len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            assert_error(f"{path.name}: is damaged", UNet2DModel.from_pretrained, tmp_path, **variant)
        path.write_bytes(whole)
    assert_same(UNet2DModel.from_pretrained(tmp_path, **variant), model)


def test_networks_that_are_not_converted_are_saved_as_before(tmp_path):
    unet2d(WIDTHS).save_pretrained(tmp_path)
    with safe_open(tmp_path / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    UNet2DModel.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="nowhere"):
        UNet2DModel.from_pretrained(tmp_path / "nowhere", local_files_only=True)
    (tmp_path / "file").touch()
    assert_error("is a file; give a folder", converted("bnn").save_pretrained, tmp_path / "file")


def test_wrong_requests_are_refused(tmp_path):
    assert_error("unknown option 'group'; options: structure, keep", binarize.BinarizeConfig, "xnor", group=2)
    unet2d(WIDTHS).save_pretrained(tmp_path)
    spread = {"device_map": {"conv_in": "cpu", "": "disk"}, "offload_folder": tmp_path / "offload"}
    config = binarize.BinarizeConfig("xnor")
    message = "places the model on cpu, disk; load it on one device"
    assert_error(message, UNet2DModel.from_pretrained, tmp_path, quantization_config=config, **spread)


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    converted().save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    removed = min(state)
    save_file({name: value for name, value in state.items() if name != removed}, weights, metadata={"format": "pt"})
    message = f"do not belong together: 1 missing tensors, such as {removed}"
    assert_error(message, UNet2DModel.from_pretrained, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]["conversion"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_error("quantization_config has no conversion; got None", UNet2DModel.from_pretrained, tmp_path)


class BaseTunerLayer(nn.Module):
    """Named as PEFT's base class of layers with adapters."""


class DTensor(nn.Module):
    """Named as PyTorch's sharded tensor."""


def with_module(module: nn.Module) -> nn.Module:
    model = converted()
    model.time_embedding.extra = module
    return model


def partly() -> nn.Module:
    model = unet2d(WIDTHS)
    binarize.convert(model.mid_block, "xnor")
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: converted(binarize.methods.reactnet(norm=lambda spec: nn.Identity())), "no import path leads to it"),
        (lambda: with_module(BaseTunerLayer()), "'time_embedding.extra' has a PEFT adapter, .* save_lora_adapter"),
        (lambda: with_module(DTensor()), "holds only a shard of the parameters"),
        (partly, "only 'mid_block' of this UNet2DModel is converted"),
        (lambda: binarize.revert(converted()), "was converted and reverted, and keeps blocks"),
    ],
)
def test_what_would_not_come_back_is_not_saved(build, message, tmp_path):
    assert_error(message, build().save_pretrained, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_versions_of_diffusers_refuse_to_save(tmp_path, monkeypatch):
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, QUANT_METHOD)
    model = converted("reactnet")
    assert_error(r"call binarize\.save\(model, folder\)", model.save_pretrained, tmp_path / "theirs")
    assert_same(binarize.load(binarize.save(model, tmp_path / "ours")), model)


def test_a_reverted_model_is_saved_as_a_plain_one(tmp_path):
    model = binarize.revert(converted("reactnet"))
    model.save_pretrained(tmp_path)
    assert torch.equal(output(UNet2DModel.from_pretrained(tmp_path)), output(model))


@pytest.mark.parametrize("build", [lambda: unet2d(WIDTHS), lambda: SRUNet(**SRUNET, resampling="conv", fusion="wide")])
def test_averages_of_diffusers_are_saved_and_loaded(build, tmp_path):
    model = converted(build=build)
    average = EMAModel(model.parameters(), model_cls=type(model), model_config=model.config)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    average.step(model.parameters())
    average.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "It is deprecated to pass a pretrained model name", FutureWarning)
        loaded = EMAModel.from_pretrained(tmp_path, type(model))
    assert loaded.optimization_step == 1
    assert all(torch.equal(a, b) for a, b in zip(loaded.shadow_params, average.shadow_params, strict=True))
    built = type(model).from_config(model.config)
    average.copy_to(built.parameters())
    average.copy_to(model.parameters())
    assert built.state_dict().keys() == model.state_dict().keys()
    assert actions(built) == actions(model)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager"), nn.DataParallel])
def test_wrapped_models_are_unwrapped(wrap, tmp_path):
    model = converted("reactnet")
    wrapped = wrap(model)
    assert binarize.report(wrapped) is binarize.report(model)
    assert binarize.summary(wrapped) == binarize.summary(model)
    assert binarize.binary_state(wrapped).keys() == binarize.binary_state(model).keys()
    assert_same(binarize.load(binarize.save(wrapped, tmp_path / "latent")), model)
    expected = output(model)
    assert binarize.pack(wrapped) is wrapped
    assert_same(binarize.load(binarize.save(wrapped, tmp_path / "packed")), model)
    torch.testing.assert_close(output(model), expected)
    assert binarize.revert(binarize.unpack(wrapped)) is wrapped
    assert type(model.mid_block.resnets[0].conv1) is nn.Conv2d
    assert "quantization_config" not in model.config


ATTENTION = {"overrides": {"*.attn1.*": "reactnet"}}


def test_binary_projections_are_not_fused(tmp_path):
    model = converted("reactnet", unet2d_condition, **ATTENTION)
    model.save_pretrained(tmp_path)
    for network in (model, copy.deepcopy(model), type(model).from_pretrained(tmp_path), binarize.pack(model)):
        assert_error("are binary and cannot be fused", network.fuse_qkv_projections)
    plain = binarize.revert(type(model).from_pretrained(tmp_path))
    expected = output(plain)
    plain.fuse_qkv_projections()
    torch.testing.assert_close(output(plain), expected)


def test_fused_projections_are_not_converted():
    model = unet2d_condition()
    model.fuse_qkv_projections()
    before = output(model)
    assert_error(r"attn1' has fused projections", binarize.convert, model, "reactnet", **ATTENTION)
    assert torch.equal(output(model), before)
    binarize.convert(model, "reactnet")  # attention stays full precision
