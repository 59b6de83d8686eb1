"""Exported networks and graphs of whole images give in onnxruntime what they give in PyTorch."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_case import fails, make_image, succeeds
from diffusers import AutoencoderKL, DDIMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from onnx_case import difference, inputs, onnx, run, run_all
from packed_case import scatter
from PIL import Image
from pipeline_case import pipeline
from torch import Tensor, nn

import binarize
from binarize.errors import BinarizeError
from binarize.models import GenerationPipeline, SRUNet, SuperResolutionPipeline
from binarize.models.tiling import pad_noise
from binarize.onnx.pipelines import whole_of
from binarize.onnx.protos import finish

TINY: dict[str, Any] = {"base_channels": 16, "channel_mults": (1, 2), "res_blocks": 1, "norm_groups": 4}
METHODS = {
    "encoder.0.*": "dorefa", "encoder.1.*": "reactnet", "middle.0.*": "binarydm", "decoder.1.blocks.0.*": "irnet",
    "decoder.1.blocks.1.*": "bnn",
}  # fmt: skip
BETAS = {"num_train_timesteps": 1000, "clip_sample_range": 2.0, "timestep_spacing": "trailing"}


@pytest.fixture(autouse=True, scope="module")
def _no_trace() -> Iterator[None]:
    """Keep pytest from recording what PyTorch logs while it traces, which takes longer than tracing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
        yield


def tiny() -> SRUNet:
    torch.manual_seed(0)
    network = binarize.convert(SRUNet(**TINY, detail_factor=30.0), "bidiffsr", overrides=METHODS)
    return binarize.pack(scatter(network))


@pytest.fixture(scope="module")
def network() -> SRUNet:
    """A packed network with layers of six methods."""
    return tiny()


@pytest.fixture(scope="module")
def exported(network: SRUNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return binarize.export_onnx(network, tmp_path_factory.mktemp("onnx") / "network.onnx")


@pytest.mark.zoo
@pytest.mark.parametrize("size", [(5, 16, 16), (1, 8, 20), (2, 14, 2)])
def test_a_network_gives_the_same_for_any_batch_size_and_timesteps(network, exported, size) -> None:
    given = inputs(*size)
    with torch.no_grad():
        expected = network(**given).sample
    assert difference(run(exported, **given), expected) < 1e-5


@pytest.mark.zoo
def test_weights_are_bits_in_functions_of_standard_operators(network: SRUNet, exported: Path) -> None:
    model = onnx.load(exported)
    onnx.checker.check_model(model, full_check=True)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    binary = sum(np.prod(state.shape) * len(state.codes) for state in binarize.binary_state(network).values())
    bits = [tensor for name, tensor in stored.items() if name.endswith(".bits")]
    assert sum(tensor.dims[0] for tensor in bits) == binary // 8
    assert {tensor.data_type for tensor in bits} == {onnx.TensorProto.UINT8}
    names = {function.name for function in model.functions}
    assert {"Signs", "GroupNorm", "BinaryConv_TimestepShift_Scale_TimestepRPReLU_Shortcut"} <= names
    assert {node.domain for function in model.functions for node in function.node} == {"", "binarize"}
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 18, "binarize": 1}
    config = json.loads({entry.key: entry.value for entry in model.metadata_props}["binarize.config"])
    assert (config["class"], config["base_channels"], config["conversion"]["method"]["name"]) == (
        "SRUNet", 16, "bidiffsr",
    )  # fmt: skip


@pytest.mark.zoo
def test_exact_halves_are_stored_as_halves(network: SRUNet, exported: Path, tmp_path: Path) -> None:
    half = tiny().half().float()
    path = binarize.export_onnx(half, tmp_path / "half.onnx")
    folder = binarize.save(half, tmp_path / "packed", dtype=torch.float16)
    assert path.stat().st_size < 0.8 * exported.stat().st_size
    given = inputs(2, 8, 8)
    with torch.no_grad():
        expected = binarize.load(folder)(**given).sample
    assert difference(run(path, **given), expected) < 1e-5


@pytest.mark.zoo
def test_weights_of_8_bits_are_stored_in_8_bits(exported: Path, tmp_path: Path) -> None:
    integers = binarize.unpack(tiny())
    binarize.pack(integers, full_precision="int8")
    path = binarize.export_onnx(integers, tmp_path / "int8.onnx")
    assert exported.stat().st_size - path.stat().st_size > 0.9 * (saved_bytes(tiny()) - saved_bytes(integers))
    given = inputs(2, 8, 8)
    with torch.no_grad():
        expected = integers(**given).sample
    assert difference(run(path, **given), expected) < 1e-5


def saved_bytes(network: SRUNet) -> int:
    return binarize.summary(network).bytes


class Lines(nn.Module):
    """Layers of one and three dimensions, and a linear one, whose padding and strides differ."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.line = nn.Conv1d(8, 12, 3, stride=2, padding=1, groups=2)
        self.cube = nn.Conv3d(3, 5, (1, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1), dilation=(1, 1, 2))
        self.flat = nn.Conv2d(5, 7, 3, padding=2, padding_mode="reflect")
        self.tokens = nn.Linear(12, 9)

    def forward(self, line: Tensor, cube: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.line(self.first(line).transpose(1, 2)).transpose(1, 2)
        return self.tokens(tokens), self.flat(self.cube(cube).mean(2))


W1A4 = {"name": "bbcu", "activation": {"name": "lsq", "bits": 4}}
TERNARY = {"name": "custom", "activation": "none", "weight": "twn"}
MORE = [pytest.param(method, marks=pytest.mark.zoo) for method in ("xnor", "bimacosr", TERNARY)]


@pytest.mark.long
@pytest.mark.parametrize("method", ["bbcu", W1A4, *MORE], ids=str)
def test_layers_of_other_dimensions(method: Any, tmp_path: Path) -> None:
    example = torch.randn(2, 10, 6), torch.randn(2, 3, 4, 9, 8)
    model = binarize.convert(Lines(), method, linear=True, keep=["first"], example_inputs=example)
    packed = binarize.pack(scatter(model))
    path = binarize.export_onnx(model, tmp_path / "lines.onnx", example_inputs=example)
    given = {"line": torch.randn(3, 7, 6), "cube": torch.randn(3, 3, 5, 7, 6)}
    with torch.no_grad():
        expected = packed(**given)
    for found, wanted in zip(run_all(path, **given), expected, strict=True):
        assert difference(found, wanted) < 1e-5


@pytest.mark.parametrize(
    ("channels", "kernel", "groups", "stored"),
    [
        (3, 3, 1, 3),
        (5, 3, 1, 5),
        (6, 3, 1, 8),
        (9, 3, 1, 12),
        (9, 1, 1, 9),
        (12, 3, 1, 12),
        (15, 2, 1, 16),
        (18, 3, 2, 9),
    ],
)
def test_channels_that_webgpu_sums_wrongly_are_padded(channels, kernel, groups, stored, tmp_path: Path) -> None:
    """Twice with one weight, as a graph of several denoising steps has it."""
    weight = torch.randn(4, channels // groups, kernel, kernel)
    nodes = [onnx.helper.make_node("Conv", [name, "w"], [f"{name}.y"], group=groups) for name in ("a", "b")]
    values = [onnx.helper.make_tensor_value_info(name, 1, ["n", channels, "h", "w"]) for name in ("a", "b")]
    outputs = [onnx.helper.make_tensor_value_info(name, 1, ["n", 4, "y", "x"]) for name in ("a.y", "b.y")]
    graph = onnx.helper.make_graph(nodes, "two", values, outputs, [onnx.numpy_helper.from_array(weight.numpy(), "w")])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    finish(model, {})
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, tmp_path / "two.onnx")
    weights = [tuple(tensor.dims) for tensor in model.graph.initializer if len(tensor.dims) == 4]
    assert weights == [(4, stored, kernel, kernel)]
    images = {"a": torch.randn(2, channels, 7, 5), "b": torch.randn(2, channels, 7, 5)}
    for found, image in zip(run_all(tmp_path / "two.onnx", **images), images.values(), strict=True):
        expected = nn.functional.conv2d(image.double(), weight.double(), groups=groups)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def ddim(**options: Any) -> DDIMScheduler:
    return DDIMScheduler(**{**BETAS, **options})


def sampling(steps: int, scheduler: Any, **options: Any) -> SuperResolutionPipeline:
    unet = binarize.pack(binarize.convert(SRUNet(**TINY, num_train_timesteps=1000), "bbcu"))
    return pipeline(unet, scale=2, scheduler=scheduler, num_inference_steps=steps, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "scheduler", "options"),
    [
        (3, {}, {}),
        (1, {"prediction_type": "sample", "clip_sample": False}, {}),
        (4, {"prediction_type": "v_prediction", "set_alpha_to_one": False}, {"residual_scale": 0.1}),
        (2, {"prediction_type": "sample"}, {"residual_scale": 0.1, "residual_strength": 1.5, "overshoot": 0.1}),
        (2, {"prediction_type": "sample", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, {}),
    ],
)
@pytest.mark.parametrize("size", [(5, 4), (1, 1)])
def test_a_whole_image_is_what_the_pipeline_gives(steps, scheduler, options, size) -> None:
    pipe = sampling(steps, ddim(**scheduler), **options)
    image, noise = torch.rand(1, 3, *size), torch.randn(1, 3, *(2 * side for side in size))
    whole = whole_of(pipe, pipe.unet, steps).module
    padded = pad_noise(noise, 2 * size[0] + 2, 2 * size[1] + 4)
    expected = pipe(image, latents=noise, output_type="pt").images
    with torch.no_grad():
        found = whole(image, pad_noise(noise, 2 * size[0], 2 * size[1]))
        assert whole(image, padded).shape == found.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=1 / 255)


def check_program_without_torch(folder: Path, pipe: SuperResolutionPipeline) -> None:
    """Run the program of the documentation, beside which are small.png and upscale.onnx."""
    page = (Path(__file__).parents[2] / "docs/howto/deploy.md").read_text(encoding="utf-8")
    code = page.partition("```python\n")[2].partition("```")[0]
    assert code.count("\n") <= 30
    make_image(6, 4).save(folder / "small.png")
    code += "import sys\nassert 'torch' not in sys.modules\n"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, text=True)
    noise = np.random.default_rng(0).standard_normal((1, 3, 18, 12), np.float32)
    expected = pipe(make_image(6, 4), latents=torch.from_numpy(noise)).images[0]
    with Image.open(folder / "large.png") as large:
        apart = np.abs(np.asarray(large).astype(int) - np.asarray(expected).astype(int))
    assert apart.max() <= 1


@pytest.mark.zoo
def test_the_command_writes_a_graph_from_an_image_and_noise(tmp_path: Path) -> None:
    unet = binarize.convert(SRUNet(**TINY, num_train_timesteps=1000), "bbcu")
    pipe = pipeline(unet, scale=3, scheduler=ddim(prediction_type="sample"), num_inference_steps=1, overshoot=0.2)
    pipe.save_pretrained(tmp_path / "model")
    path = tmp_path / "upscale.onnx"
    output = succeeds("export", tmp_path / "model", path, "--steps", "1")
    assert f"{path.stat().st_size / 1e6:.2f} MB" in output
    assert "image (batch, 3, height, width), noise (batch, 3, noise_height, noise_width) to enlarged" in output
    binarize.pack(pipe.unet)
    for batch, height, width in ((1, 5, 6), (2, 4, 8), (1, 1, 2)):
        image, noise = torch.rand(batch, 3, height, width), torch.randn(batch, 3, 3 * height, 3 * width)
        expected = pipe(image, latents=noise, output_type="pt", batch_size=batch).images
        padded = pad_noise(noise, 3 * height + height % 2, 3 * width + width % 2)
        found = run(path, image=image, noise=padded)
        assert found.shape == expected.shape
        assert (255 * (found - expected).abs() < 1).float().mean() >= 0.999
    check_program_without_torch(tmp_path, pipe)
    described = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(described["binarize.sampling"])["sampler"]["steps"][0]["clean"] == [0.0, 1.0]


def generation(scheduler: Any, **options: Any) -> GenerationPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, num_class_embeds=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, add_attention=False,
    )  # fmt: skip
    unet = binarize.pack(scatter(binarize.convert(unet, "bidiffsr", structure="keep")))
    pipe = GenerationPipeline(unet.eval(), scheduler, **{"classes": ["a", "b", "c"], **options})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.slow
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_generated_image_is_what_the_pipeline_gives(prediction_type: str, guidance_scale: float) -> None:
    pipe = generation(ddim(prediction_type=prediction_type), guidance_scale=guidance_scale)
    noise, labels = torch.randn(3, 3, 8, 8), [2, 0, 1]
    expected = pipe(class_labels=labels, latents=noise, num_inference_steps=4, output_type="pt").images
    with torch.no_grad():
        found = whole_of(pipe, pipe.unet, 4).module(noise, torch.tensor(labels))
    torch.testing.assert_close(found, expected, rtol=0, atol=1 / 255)
    assert expected.std() > 0.1


@pytest.mark.zoo
def test_the_command_exports_a_generator(tmp_path: Path) -> None:
    pipe = generation(ddim(prediction_type="v_prediction"), guidance_scale=2.5, num_inference_steps=3)
    pipe.save_pretrained(tmp_path / "model")
    output = succeeds("export", tmp_path / "model", tmp_path / "whole.onnx", "--steps", "2")
    assert "noise (batch, 3, height, width), class_labels (batch) to images (batch, 3, height, width)" in output
    noise, labels = torch.randn(5, 3, 8, 8), torch.tensor([2, 0, 1, 1, 0])
    expected = pipe(class_labels=labels.tolist(), latents=noise, num_inference_steps=2, output_type="pt").images
    found = run(tmp_path / "whole.onnx", noise=noise, class_labels=labels)
    assert (255 * (found - expected).abs() < 1).float().mean() >= 0.999
    succeeds("export", tmp_path / "model", tmp_path / "network.onnx")
    described = {entry.key: entry.value for entry in onnx.load(tmp_path / "network.onnx").metadata_props}
    settings = json.loads(described["binarize.sampling"])
    assert (settings["image_shape"], settings["classes"]) == ([3, 8, 8], ["a", "b", "c"])
    assert (settings["guidance_scale"], len(settings["sampler"]["steps"])) == (2.5, 3)
    given = {"sample": noise, "timestep": torch.tensor([0.0, 10, 500, 998, 999]), "class_labels": labels + 1}
    with torch.no_grad():
        assert difference(run(tmp_path / "network.onnx", **given), pipe.unet(**given).sample) < 1e-5
    assert "--scale 2:" in fails("export", tmp_path / "model", tmp_path / "new.onnx", "--scale", "2")


@pytest.mark.slow
def test_what_cannot_be_exported_is_refused(network: SRUNet, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "model.onnx"

    def refused(match: str, model: Any = network, **options: Any) -> None:
        with pytest.raises(BinarizeError, match=match):
            binarize.export_onnx(model, path, **options)
        assert not path.exists()

    refused(r"steps=2 needs a SuperResolutionPipeline or a GenerationPipeline; got a SRUNet", steps=2)
    refused("steps='2': must be from 1 to 50", sampling(2, ddim()), steps="2")
    refused("example_inputs has no effect with steps", sampling(2, ddim()), steps=2, example_inputs=torch.zeros(1))
    with pytest.raises(BinarizeError, match=r"the folder .* does not exist"):
        binarize.export_onnx(network, tmp_path / "no" / "model.onnx")
    refused("steps=51: must be from 1 to 50, since the file repeats the network", sampling(2, ddim()), steps=51)
    refused("is not converted; call binarize.convert first", SRUNet(**TINY))
    refused(r"sample in example_inputs needs a batch of at least 2; got the shape \(1, 3, 8, 8\)",
            example_inputs=tuple(inputs(1, 8, 8).values()))  # fmt: skip
    refused("cannot export this network: .* missing 2 required pos", example_inputs=torch.zeros(2, 3, 8, 8))
    other = DPMSolverMultistepScheduler.from_config(ddim().config)
    refused("steps of DPMSolverMultistepScheduler cannot be written into a file; use DDIM", sampling(2, other), steps=2)
    unusual = ddim(prediction_type="sample", thresholding=True, clip_sample=False)
    refused("settings of this DDIMScheduler, such as thresholding", sampling(2, unusual), steps=2)
    pure = sampling(2, ddim())
    pure.scheduler = ddim(rescale_betas_zero_snr=True, timestep_spacing="trailing")  # past the pipeline's own check
    refused("epsilon prediction cannot start from pure noise", pure, steps=2)
    latent = generation(ddim(), vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=3))
    for count in (None, 2):
        refused("an autoencoder cannot be written into a file; in Python, export the network", latent, steps=count)
    handle = next(m for _, m in binarize.conversion.export.packed_layers(network)).register_forward_hook(print)
    refused("has hooks or another forward than PackedConv2d's")
    handle.remove()
    monkeypatch.setattr("binarize.onnx.export.find_spec", lambda name: None)
    refused(r"needs onnx: pip install 'binarize-diffusion\[onnx\]'")


@pytest.mark.slow
def test_an_error_of_pytorch_is_one_line(tmp_path: Path) -> None:
    class Branching(Lines):
        def forward(self, line: Tensor, cube: Tensor) -> tuple[Tensor, Tensor]:
            tokens, image = super().forward(line, cube)
            return (tokens, image) if float(line.sum()) > 0 else (image, tokens)

    example = torch.randn(2, 10, 6), torch.randn(2, 3, 4, 9, 8)
    model = binarize.pack(binarize.convert(Branching(), "bnn", example_inputs=example))
    with pytest.raises(BinarizeError, match=r"^export: PyTorch cannot export this network: [^\n]+$"):
        binarize.export_onnx(model, tmp_path / "model.onnx", example_inputs=example)


def test_the_command_names_the_model_and_keeps_files(tmp_path: Path) -> None:
    SRUNet(**TINY).save_pretrained(tmp_path / "plain")
    assert "is not converted" in fails("export", tmp_path / "plain", tmp_path / "model.onnx")
    assert "does not store its scale" in fails("export", tmp_path / "plain", tmp_path / "model.onnx", "--steps", "1")
