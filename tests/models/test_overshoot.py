"""Results stay within the range of the low-resolution pixels around, widened by a share of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_case import NETWORK
from errors_case import assert_error
from pipeline_case import pipeline, pixels, run
from scipy.ndimage import maximum_filter, minimum_filter

from binarize.models import SRUNet, SuperResolutionPipeline
from binarize.models.overshoot import limit_overshoot
from binarize.recipes import build_pipeline, load_recipe


@pytest.mark.parametrize("scale", [1, 2, 3])
@pytest.mark.parametrize("overshoot", [0.0, 0.05, 1.0])
def test_the_limits_are_those_of_the_neighbourhood(scale: int, overshoot: float) -> None:
    low = torch.rand(3, 7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    image = torch.randn(3, 7 * scale, 9 * scale, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    lowest, highest = (
        np.stack([edge(plane, size=5, mode="nearest") for plane in low.numpy()])
        for edge in (minimum_filter, maximum_filter)
    )
    room = overshoot * (highest - lowest)
    bounds = [np.kron(bound, np.ones((1, scale, scale))) for bound in (lowest - room, highest + room)]
    np.testing.assert_allclose(limit_overshoot(image, low, overshoot).numpy(), image.numpy().clip(*bounds))
    batch = limit_overshoot(image[None], low[None], overshoot)
    assert torch.equal(batch[0], limit_overshoot(image, low, overshoot))


def test_a_pipeline_limits_its_results_and_keeps_the_limit(tmp_path: Path) -> None:
    image = pixels(6, 5)
    free, tight = run(pipeline(), image), run(pipeline(overshoot=0.1), image)
    low = torch.from_numpy(image).movedim(-1, 0)
    assert not torch.equal(free, tight)
    torch.testing.assert_close(tight[0], limit_overshoot(free[0], low.to(free), 0.1))
    flat = run(pipeline(overshoot=0.1), np.full((6, 5, 3), 0.3))
    torch.testing.assert_close(flat, torch.full_like(flat, 0.3))

    recipe = load_recipe("small_x2", ["overshoot=0.05"])
    build_pipeline(recipe, SRUNet(**NETWORK)).save_pretrained(tmp_path / "new")
    assert SuperResolutionPipeline.from_pretrained(tmp_path / "new").config["overshoot"] == 0.05
    build_pipeline(load_recipe("small_x2"), SRUNet(**NETWORK)).save_pretrained(tmp_path / "old")
    assert "overshoot" not in json.loads((tmp_path / "old" / "model_index.json").read_text())
    assert SuperResolutionPipeline.from_pretrained(tmp_path / "old").config.get("overshoot") is None


@pytest.mark.parametrize("value", [-0.1, 1.5, "much", float("nan"), True])
def test_limits_that_make_no_sense(value: Any) -> None:
    assert_error("overshoot=.*: pass the share", pipeline, overshoot=value)
    if not isinstance(value, bool):
        assert_error("overshoot: got", load_recipe, "small_x2", [f"overshoot={'.nan' if value != value else value}"])
