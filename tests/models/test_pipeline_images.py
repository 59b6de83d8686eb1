"""Inputs and outputs of the pipeline: types, modes, transparency, and arguments that are refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from errors_case import assert_error
from PIL import Image
from pipeline_case import local, pipeline, pixels, run, seeded

from binarize.imaging import to_image, upscale_bicubic
from binarize.models import SRUNet, SuperResolutionPipeline


def test_every_form_of_an_image_gives_the_same():
    pipe = pipeline()
    levels = (pixels(5, 6) * 255).astype(np.uint8)
    expected = run(pipe, levels)
    planes = torch.from_numpy(levels).permute(2, 0, 1)
    pil = Image.fromarray(levels)
    # uint8 is divided in float32
    for image in (pil, to_image(pil), levels[None], planes, planes[None], planes.float() / 255, [pil], (planes,)):
        assert torch.equal(run(pipe, image), expected)
    for image in (levels / 255, planes.double() / 255, (levels.astype(np.uint16) * 257)):
        torch.testing.assert_close(run(pipe, image), expected, rtol=0, atol=1e-6)
    for image in (planes.bfloat16() / 255, (levels / 255).astype(np.float16)):
        torch.testing.assert_close(run(pipe, image), expected, rtol=0, atol=1e-2)


def test_output_types_agree():
    pipe, image = pipeline(), (pixels(5, 6) * 255).astype(np.uint8)
    tensors, arrays = run(pipe, [image, image]), run(pipe, [image, image], output_type="np")
    assert (tensors.shape, arrays.dtype) == ((2, 3, 10, 12), np.float32)
    np.testing.assert_array_equal(arrays, tensors.permute(0, 2, 3, 1).float().numpy())
    pils = run(pipe, [image, image], output_type="pil")
    assert [p.mode for p in pils] == ["RGB", "RGB"]
    for pil, array in zip(pils, arrays, strict=True):
        assert np.abs(np.asarray(pil) / 255 - array).max() <= 0.5 / 255 + 1e-6
    (alone,) = pipe(image, 3, generator=seeded(), return_dict=False)
    assert alone[0].tobytes() == pils[0].tobytes()


@pytest.mark.parametrize("output_type", ["pt", "np"])
def test_results_of_different_shapes_come_as_a_list(output_type):
    images = run(pipeline(), [pixels(2, 3), pixels(3, 2), pixels(2, 3, channels=4)], output_type=output_type)
    shapes = [image.shape if output_type == "np" else (*image.shape[1:], image.shape[0]) for image in images]
    assert shapes == [(4, 6, 3), (6, 4, 3), (4, 6, 4)]


KEPT = [(mode, mode) for mode in ("RGB", "RGBA", "L", "LA", "I;16")]


@pytest.mark.parametrize(("mode", "expected"), [*KEPT, ("P", "RGBA"), ("1", "L"), ("CMYK", "RGB")])
def test_each_kind_of_image_comes_back_as_its_kind(mode, expected):
    if mode == "I;16":
        image = Image.fromarray((pixels(4, 6, 1)[..., 0] * 65535).astype(np.uint16))
    else:
        image = Image.fromarray((pixels(4, 6, 4) * 255).astype(np.uint8)).convert(mode)
    (large,) = run(pipeline(), image, output_type="pil")
    assert (large.mode, large.size) == (expected, (12, 8))


def test_transparency_is_upscaled_bicubically():
    image = pixels(4, 6, channels=4)
    expected = upscale_bicubic(torch.from_numpy(image).permute(2, 0, 1)[3:, None], 2)[0]
    pipe = pipeline()
    large = run(pipe, image)[0]
    torch.testing.assert_close(large[3:], expected, rtol=0, atol=1e-12)
    assert torch.equal(large[:3], run(pipe, image[..., :3])[0])
    torch.testing.assert_close(run(pipe, image[..., 2:])[0][3:], expected, rtol=0, atol=1e-12)


def test_exif_orientation_is_applied_once():
    image = Image.fromarray((pixels(4, 6) * 255).astype(np.uint8))
    turned = image.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # shown rotated by 90 degrees clockwise
    (large,), (expected,) = (run(pipeline(), i, output_type="pil") for i in (turned, image))
    assert (large.size, large.tobytes()) == ((12, 8), expected.tobytes())
    assert 0x0112 not in large.getexif()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": []}, "image is an empty list"),
        ({"image": "small.png"}, r"type str; allowed: .* Open a file with binarize.imaging.read_image"),
        ({"image": Path("small.png")}, r"Open a file with"),
        ({"image": np.zeros(3)}, r"ndarray of shape \(3,\)"),
        ({"image": np.zeros((4, 4, 5))}, r"image has the shape \(4, 4, 5\)"),
        ({"image": np.zeros((0, 4, 3))}, r"image has the shape \(0, 4, 3\)"),
        ({"image": np.zeros((4, 4), dtype=np.int32)}, r"image has the type int32; allowed: uint8, uint16"),
        ({"image": np.full((4, 4), 255.0)}, r"values from 255 to 255; .* Divide 8-bit levels by 255"),
        ({"image": torch.full((3, 4, 4), float("nan"))}, "values from nan to nan"),
        ({"num_inference_steps": 0}, "num_inference_steps=0; allowed: a whole number from 1 to the .* 2000"),
        ({"num_inference_steps": 2001}, "num_inference_steps=2001"),
        ({"batch_size": 0}, "batch_size=0; allowed: a whole number of at least 1"),
        ({"eta": 2.0}, "eta=2.0; allowed: from 0"),
        ({"output_type": "pill"}, "unknown output_type 'pill'; options: 'pil', 'np', 'pt'. Did you mean 'pil'"),
        ({"generator": [seeded(), seeded()]}, "2 generators for 1 images"),
        ({"generator": 7}, r"generator holds 7; .* pass torch.Generator\(\).manual_seed\(SEED\)"),
        ({"generator": [None]}, "generator holds None"),
        ({"latents": np.zeros((1, 3, 8, 8))}, "latents hold a ndarray; allowed: a tensor"),
        ({"latents": torch.zeros(1, 3, 4, 4)}, r"latents have the shapes \[\(3, 4, 4\)\]; needed: \[\(3, 8, 8\)\]"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"has \['noise'\]; allowed: \['latents', 'condition'\]"),
        ({"tile": 8, "overlap": 8}, "overlap=8 with tile=8"),
        ({"image": torch.zeros(3, 4, 4, device="meta")}, "is a tensor without values, sparse or quantized"),
        ({"image": torch.zeros(3, 4, 4).to_sparse()}, "is a tensor without values, sparse or quantized"),
        ({"image": np.broadcast_to(np.uint8(0), (10**6, 10**6, 3))}, "an image of shape .* needs about .* of memory"),
        ({"image": np.ndarray}, "must not be of type type"),
        ({"eta": "x"}, "eta='x'; allowed: a number"),
        ({"latents": 5}, "latents hold a int"),
        ({"callback_on_step_end": 5}, "callback_on_step_end is 5; pass a function"),
        ({"callback_on_step_end_tensor_inputs": None}, "is None; pass a list"),
    ],
)
def test_bad_arguments_are_refused_before_the_network_runs(options, message):
    unet = local()
    assert_error(message, lambda: run(pipeline(unet), **{"image": np.zeros((4, 4, 3)), **options}))
    assert not unet.seen


@pytest.mark.parametrize("scale", [None, 0, 2.0, True, 65, 2**70])
def test_a_scale_is_needed(scale):
    assert_error(r"a pipeline needs the whole number, from 1 to 64", pipeline, scale=scale)


@pytest.mark.parametrize("returned", [5, {"latents": 5}, {"latents": torch.zeros(1)}])
def test_a_callback_that_returns_something_else_is_refused(returned):
    options = {"image": np.zeros((4, 4, 3)), "callback_on_step_end": lambda *_: returned}
    assert_error("callback_on_step_end returned a .*; allowed: None, or a dict", lambda: run(pipeline(), **options))


@pytest.mark.parametrize("network", [None, 5, "x", SRUNet])
def test_what_is_no_network_is_refused(network):
    assert_error("pass a network, such as SRUNet", SuperResolutionPipeline, network, scale=2)
