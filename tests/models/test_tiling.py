"""Tiles: how they cover an image, how they are blended, and what they save."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_case import Local, local, pipeline, pixels, run
from torch import Tensor

from binarize.errors import BinarizeError
from binarize.models.tiling import tile_grid
from binarize.models.upscaler import default_scheduler


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 80), st.integers(0, 79), st.sampled_from([1, 2, 8]))
def test_tiles_cover_the_canvas_and_their_weights_add_up_to_one(height, width, tile, overlap, multiple):
    overlap = min(overlap, tile - 1)
    grid = tile_grid(height, width, tile=tile, overlap=overlap, multiple=multiple)
    assert grid.shape == tuple(math.ceil(side / multiple) * multiple for side in (height, width))
    for spans, side, length in zip((grid.rows, grid.columns), (height, width), grid.shape, strict=True):
        total = torch.zeros(length, dtype=torch.float64)
        for span in spans:
            assert span.start % multiple == 0
            assert (span.weights >= 0).all()
            total[span.pixels] += span.weights
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)
        sizes = {span.weights.numel() for span in spans}
        assert sizes == {length} if tile >= side else max(sizes) <= max(tile, multiple)
        size = sizes.pop()
        for one, other in pairwise(spans):
            assert one.pixels.stop - other.start >= min(overlap, size - multiple)


def test_the_outer_quarter_of_an_overlap_has_no_weight_and_the_image_edge_has_all():
    first, second = tile_grid(8, 48, tile=32, overlap=16, multiple=8).columns
    assert (first.start, second.start) == (0, 16)
    assert torch.cat([first.weights[:16], second.weights[16:]]).eq(1).all()
    assert torch.cat([first.weights[-4:], second.weights[:4]]).eq(0).all()
    assert (first.weights[16:].diff() <= 0).all()


def test_one_tile_hands_over_the_prediction_itself():
    prediction = torch.zeros(1, 3, 8, 8)
    assert tile_grid(5, 7, tile=7, multiple=8).blend(lambda x: prediction, torch.zeros(1, 3, 8, 8)) is prediction


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_blending_copies_gives_the_image_for_any_number_of_tiles_at_once(batch_size):
    x, y = torch.rand(2, 3, 40, 56, dtype=torch.float64), torch.rand(2, 1, 40, 56, dtype=torch.float64)
    grid = tile_grid(40, 56, tile=24, overlap=8, multiple=8)
    calls = []

    def predict(a: Tensor, b: Tensor) -> Tensor:
        calls.append(a.shape[0])
        return a * b

    torch.testing.assert_close(grid.blend(predict, x, y, batch_size=batch_size), x * y, rtol=0, atol=1e-14)
    assert sum(calls) == 2 * len(grid) == 12
    assert max(calls) == 2 * min(batch_size, len(grid))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": 4}, "overlap=4 has no meaning without tiles; pass tile=SIDE"),
        ({"tile": 0}, "tile=0: .* at least 1; pass None for no tiles"),
        ({"tile": 16.0}, "tile=16.0: .* whole number"),
        ({"tile": 16, "overlap": 16}, r"overlap=16 with tile=16: .* from 0 to tile - 1 \(15 here\)"),
        ({"tile": 16, "overlap": -1}, "overlap=-1 with tile=16"),
    ],
)
def test_tiles_that_cannot_be_laid_are_refused(options, message):
    with pytest.raises(BinarizeError, match=message):
        tile_grid(32, 32, **options)


@settings(max_examples=15, deadline=None)
@given(height=st.integers(1, 30), width=st.integers(1, 30), tile=st.integers(24, 70))
def test_a_local_network_gives_with_tiles_what_it_gives_without(height, width, tile):
    # The receptive field reaches 2 pixels beyond a tile; the outer quarter of 16 shared pixels carries no weight.
    pipe, image = pipeline(), pixels(height, width)
    whole = run(pipe, image)
    tiled = run(pipe, image, tile=tile, overlap=16)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-12)
    if tile >= 2 * max(height, width):
        assert torch.equal(tiled, whole)


class Tilewise(Local):
    """Predicts the noise of a clean image that depends on the mean of the whole input, as with GroupNorm."""

    def forward(self, sample: Tensor, timestep: Tensor, condition: Tensor) -> UNet2DOutput:
        alpha_bar = default_scheduler().alphas_cumprod[timestep].to(sample)
        clean = 0.8 * condition + 0.2 * condition.mean((1, 2, 3), keepdim=True)
        return UNet2DOutput(sample=(sample - alpha_bar.sqrt() * clean) / (1 - alpha_bar).sqrt())


def test_tiles_leave_no_seam_where_a_prediction_depends_on_the_whole_tile():
    ramp = np.linspace(0.1, 0.9, 64)[None, :, None].repeat(64, 0).repeat(3, 2)
    pipe = pipeline(Tilewise().double())

    def largest_step(overlap: int) -> float:
        columns = run(pipe, ramp, tile=64, overlap=overlap, num_inference_steps=5)[0, 0].mean(0)
        return columns[8:120].diff().abs().max().item()

    # Without an overlap there is the step of 0.2 * 0.4 that blending takes away.
    assert largest_step(overlap=32) < 0.02 < 0.08 < largest_step(overlap=0)


def test_the_network_never_sees_more_than_the_tile():
    unet = local()
    run(pipeline(unet), pixels(61, 90), tile=37, overlap=8, num_inference_steps=2)
    assert {tuple(x.shape) for sample, _, condition in unet.seen for x in (sample, condition)} == {(1, 3, 32, 32)}
