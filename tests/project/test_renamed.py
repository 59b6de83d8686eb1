"""Public names and modules of version 0.1 keep working, with a DeprecationWarning."""

import importlib

import pytest
import torch
from torch import nn

from binarize.layers import BinaryConv2d, norm_silu

OLD = {
    "binarize.diagnosis:Trial": "binarize.diagnosis:ChangeResult",
    "binarize.packed.backends:use": "binarize.kernels.backends:use",
    "binarize.training.ablation:ablate": "binarize.studies.ablation:ablate",
    "binarize.training.ablation_results:TrialResult": "binarize.studies.results:RunResult",
    "binarize.imaging:enlarge": "binarize.imaging:upscale_bicubic",
    "binarize.imaging:Picture": "binarize.imaging:DecodedImage",
    "binarize.evaluation:PictureScores": "binarize.evaluation:ImageScores",
    "binarize.recipes:settled": "binarize.recipes:remove_stages",
    "binarize.recipes:load_study": "binarize.studies.schema:load_study",
}


def find(path: str) -> object:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("old", OLD)
def test_an_old_name_is_the_new_one(old: str) -> None:
    with pytest.warns(DeprecationWarning, match=old.replace(":", ".")) as warned:
        found = find(old)
    assert warned[0].filename == __file__  # Python shows the warning to whom the line belongs
    assert found is find(OLD[old])


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        find("binarize.imaging:nothing")


def test_old_calls_do_the_same() -> None:
    x, bias, norm = torch.randn(2, 8, 4, 4), torch.randn(2, 8), nn.GroupNorm(2, 8)
    with pytest.warns(DeprecationWarning, match=r"norm_silu\(shift=\) is now channel_bias="):
        found = norm_silu(x, norm, shift=bias)
    assert torch.equal(found, norm_silu(x, norm, channel_bias=bias))
    plain = nn.Conv2d(8, 8, 3)
    layer = BinaryConv2d.from_float(plain, "reactnet")
    parts = {"pre": layer.pre, "activation": layer.activation, "weight": layer.weight_binarizer, "scale": layer.scale}
    with pytest.warns(DeprecationWarning, match="is now from_float"):
        same = BinaryConv2d.from_parts(plain, layer.method, parts, had_bias=True)
    assert same.weight is plain.weight
    assert (same.pre, same.had_bias, same.training) == (layer.pre, True, False)
