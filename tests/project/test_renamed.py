"""Public names and modules of version 0.1 keep working, with a DeprecationWarning."""

import importlib

import pytest

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
    with pytest.warns(DeprecationWarning, match=old.replace(":", ".")):
        found = find(old)
    assert found is find(OLD[old])


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        find("binarize.imaging:nothing")
