"""Arrays and tensors in any memory layout, byte order and precision give the image that they hold."""

import numpy as np
import pytest
import torch
from errors_case import assert_error

from binarize.models.images import as_images

IMAGE = np.random.default_rng(0).random((5, 4, 3))


def read_only(values: np.ndarray) -> np.ndarray:
    values = values.copy()
    values.flags.writeable = False
    return values


LAYOUTS = {
    "reversed rows": lambda v: v[::-1].copy()[::-1],
    "reversed everywhere": lambda v: v[::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1],
    "Fortran order": np.asfortranarray,
    "every second": lambda v: np.repeat(v, 2, axis=1)[:, ::2],
    "from channels first": lambda v: np.ascontiguousarray(v.transpose(2, 0, 1)).transpose(1, 2, 0),
    "read-only": read_only,
    "broadcast": lambda v: np.broadcast_to(v, (1, *v.shape))[0],
    "unaligned": lambda v: np.frombuffer(b"x" + v.tobytes(), dtype=v.dtype, count=v.size, offset=1).reshape(v.shape),
}
TYPES = ["u1", "<u2", ">u2", "<f2", ">f2", "<f4", ">f4", "<f8", ">f8", "g"]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_byte_orders_and_precisions(layout: str, kind: str) -> None:
    dtype = np.dtype(kind)
    top = np.iinfo(dtype).max if dtype.kind == "u" else 1
    values = LAYOUTS[layout]((IMAGE * top).astype(dtype))
    before = values.copy()
    (image,) = as_images(values)
    expected = (values.astype(np.float64) / top).transpose(2, 0, 1)
    assert image.rgb.dtype == (torch.float64 if dtype.kind == "f" and dtype.itemsize > 4 else torch.float32)
    np.testing.assert_allclose(image.rgb.numpy(), expected, rtol=1e-6)
    assert np.array_equal(values, before)
    batch = as_images(np.stack([values, values]))
    assert len(batch) == 2
    assert torch.equal(batch[1].rgb, image.rgb)


@pytest.mark.parametrize("kind", ["i1", "i2", ">i4", "u4", "u8", "?", "c8", "O", "S3", "M8[s]"])
def test_other_types_are_refused(kind: str) -> None:
    assert_error("image has the type .*; allowed: uint8, uint16, or floating", as_images, np.zeros((2, 2, 3), kind))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1.5, -1.0, 1e300])
def test_values_outside_the_range_are_refused(value: float) -> None:
    for dtype in ("f4", ">f8", "g"):
        values = np.zeros((2, 2, 3), dtype)
        with np.errstate(over="ignore"):
            values[1, 1, 1] = value
        assert_error("floating-point images go from 0 to 1", as_images, values)
