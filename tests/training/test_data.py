"""Training patches: crops, augmentation, order, cache and errors; and pairs of images."""

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from errors_case import assert_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from binarize.errors import BinarizeError
from binarize.imaging import ImagePairs, degrade, upscale_bicubic
from binarize.training.data import PairedPatches


def write(path: Path, height: int, width: int, seed: int = 0) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hr")
    for number, (height, width) in enumerate([(37, 41), (24, 24), (50, 26), (31, 64), (28, 33)]):
        write(root / f"p{number}.png", height, width, seed=number)
    return root


@pytest.fixture(scope="module")
def paired(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Low-resolution images that no degradation produces, to see that the files are used."""
    low = tmp_path_factory.mktemp("lr")
    for path in folder.iterdir():
        with Image.open(path) as image:
            width, height = image.size
        write(low / f"{path.stem}x2.png", height // 2, width // 2, seed=99)
    return folder, low


def symmetries(patch: torch.Tensor) -> list[torch.Tensor]:
    turns = [torch.rot90(patch, k, (-2, -1)) for k in range(4)]
    return turns + [turn.flip(-1) for turn in turns]


def positions(whole: torch.Tensor, patch: torch.Tensor) -> list[tuple[int, int]]:
    """Every place where ``patch`` occurs in ``whole``, bit for bit."""
    height, width = patch.shape[-2:]
    equal = whole.unfold(-2, height, 1).unfold(-2, width, 1).eq(patch[:, None, None]).flatten(3).all(-1).all(0)
    return [(int(row), int(column)) for row, column in equal.nonzero()]


SEEDS = st.integers(0, 2**64 - 1)


class TestPatches:
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(index=st.integers(0, 10_000), seed=SEEDS, scale=st.integers(1, 4), units=st.integers(1, 6))
    def test_patches_are_crops(self, folder: Path, index: int, seed: int, scale: int, units: int) -> None:
        options = {"seed": seed, "length": 10_001, "cache_bytes": 0, "augment": False}
        item = PairedPatches(folder, scale=scale, patch_size=units * scale, **options)[index]
        pair = next(pair for pair in ImagePairs(folder, scale=scale) if pair.name == item["name"])
        lr = degrade(pair.hr, scale)
        upscaled = upscale_bicubic(lr.float()[None] / 255, scale)[0]
        whole = {"hr": pair.hr.float() / 255, "lr": lr.float() / 255, "condition": upscaled}
        assert item["index"] == index
        for key, side in (("hr", units * scale), ("lr", units), ("condition", units * scale)):
            assert (item[key].shape, item[key].dtype) == ((3, side, side), torch.float32)
            assert item[key].is_contiguous()
        places = set(positions(whole["lr"], item["lr"]))
        for key in ("hr", "condition"):
            found = positions(whole[key], item[key])
            places &= {(row // scale, column // scale) for row, column in found if row % scale == column % scale == 0}
        assert places

    def test_low_resolution_files_are_used(self, paired: tuple[Path, Path]) -> None:
        for item in PairedPatches(*paired, scale=2, patch_size=12, length=20, augment=False):
            with Image.open(paired[1] / f"{item['name']}x2.png") as image:
                lr = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
            assert positions(lr, item["lr"])
            assert positions(upscale_bicubic(lr[None], 2)[0], item["condition"])

    def test_degraded_patches(self, folder: Path) -> None:
        parts: list[tuple[int, ...]] = []

        def degrader(hr: torch.Tensor, scale: int, index: int) -> torch.Tensor:
            parts.append((index, *hr.shape))
            return hr[..., ::scale, ::scale] // 2

        write(folder.parent / "large" / "a.png", 120, 130)
        options = {"scale": 2, "patch_size": 8, "length": 60, "degrader": degrader}
        for index, item in enumerate(PairedPatches(folder.parent / "large", augment=False, **options)):
            assert torch.equal(item["lr"], (item["hr"][..., ::2, ::2] * 255).round() // 2 / 255)
            assert parts[-1][0] == index
        assert len({shape[2] for shape in parts}) > 10  # the grid of compressed blocks has a random phase
        (pair,) = ImagePairs(folder.parent / "large", scale=2, degrader=degrader)
        assert torch.equal(pair.lr, pair.hr[..., ::2, ::2] // 2)
        message = "degrader has no effect on the images of lr_dir"
        assert_error(message, PairedPatches, folder, folder, scale=2, patch_size=8, degrader=degrader)

    def test_degraded_patches_have_the_condition_of_sampling(self, folder: Path) -> None:
        def box(hr: torch.Tensor, scale: int, index: int) -> torch.Tensor:
            return torch.nn.functional.avg_pool2d(hr.float(), scale).round().to(torch.uint8)

        for item in PairedPatches(folder, scale=2, patch_size=12, length=20, augment=False, degrader=box):
            pair = next(pair for pair in ImagePairs(folder, scale=2, degrader=box) if pair.name == item["name"])
            places = positions(pair.lr.float() / 255, item["lr"])
            whole = upscale_bicubic(pair.lr.float()[None] / 255, 2)[0]
            assert any((2 * row, 2 * column) in positions(whole, item["condition"]) for row, column in places)

    def test_all_eight_symmetries_alike_for_the_three(self, folder: Path) -> None:
        plain = PairedPatches(folder, scale=2, patch_size=8, seed=3, length=200, augment=False)
        turned = PairedPatches(folder, scale=2, patch_size=8, seed=3, length=200)
        seen: Counter[int] = Counter()
        for before, after in zip(plain, turned, strict=True):
            kinds = [
                {k for k, view in enumerate(symmetries(before[key])) if torch.equal(view, after[key])}
                for key in ("hr", "lr", "condition")
            ]
            (kind,) = set.intersection(*kinds)
            seen[kind] += 1
        assert set(seen) == set(range(8))
        assert max(seen.values()) < 50  # 25 expected; five standard deviations

    def test_each_epoch_uses_every_image_once(self, folder: Path) -> None:
        names = [item["name"] for item in PairedPatches(folder, scale=2, patch_size=8, length=100)]
        passes = [tuple(names[start : start + 5]) for start in range(0, 100, 5)]
        assert all(sorted(one) == [f"p{k}" for k in range(5)] for one in passes)
        assert len(set(passes)) > 10

    def test_crops_reach_every_position_evenly(self, tmp_path: Path) -> None:
        write(tmp_path / "a.png", 12, 8)
        patches = PairedPatches(tmp_path, scale=2, patch_size=8, length=600, augment=False)
        whole = ImagePairs(tmp_path, scale=2)[0].hr.float() / 255
        rows = Counter(positions(whole, item["hr"])[0] for item in patches)
        assert set(rows) == {(0, 0), (2, 0), (4, 0)}
        assert min(rows.values()) > 140  # 200 expected; five standard deviations

    def test_an_item_is_a_function_of_seed_and_index(self, folder: Path) -> None:
        first = PairedPatches(folder, scale=2, patch_size=16, seed=7, length=30)
        second = PairedPatches(folder, scale=2, patch_size=16, seed=7, length=300, cache_bytes=4000)
        third = pickle.loads(pickle.dumps(first))
        other = PairedPatches(folder, scale=2, patch_size=16, seed=8, length=30)
        for index in reversed(range(30)):
            for key in ("hr", "lr", "condition"):
                assert torch.equal(first[index][key], second[index][key])
                assert torch.equal(first[index][key], third[index][key])
        assert any(not torch.equal(first[index]["hr"], other[index]["hr"]) for index in range(3))

    def test_the_order_of_the_stream_is_frozen(self, folder: Path) -> None:
        # A run that resumes with another version of this package must get the same items.
        patches = PairedPatches(folder, scale=2, patch_size=8, seed=1, length=10)
        assert "".join(item["name"] for item in patches) == "p3p2p0p1p4p3p1p0p4p2"
        for index in (-1, 10):
            with pytest.raises(IndexError, match=r"outside 0\.\.9"):
                patches[index]

    def test_the_cache_keeps_to_its_budget(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        decoded: list[int] = []
        read = ImagePairs.read
        counted = lambda pairs, index: decoded.append(index) or read(pairs, index)  # noqa: E731
        monkeypatch.setattr(ImagePairs, "read", counted)
        patches = PairedPatches(folder, scale=2, patch_size=8, length=5, cache_bytes=3 * (36 * 40 + 24 * 24))
        assert decoded == [0, 1]
        list(patches)
        assert sorted(decoded) == [0, 1, 2, 3, 4]
        decoded.clear()
        list(PairedPatches(folder, scale=2, patch_size=8, length=50))
        assert sorted(decoded) == [0, 1, 2, 3, 4]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"patch_size": 9}, "multiple of the scale 2, got 9"),
            ({"patch_size": 0}, "multiple of the scale 2, got 0"),
            ({"scale": 0}, "multiple of the scale 0"),
            ({"seed": -1}, r"seed must be within 0\.\.2\*\*64 - 1, got -1"),
            ({"length": 0}, "length must be at least 1, got 0"),
            ({"candidates": 0}, "candidates must be at least 1, got 0"),
        ],
    )
    def test_bad_options(self, folder: Path, options: dict[str, int], message: str) -> None:
        assert_error(message, PairedPatches, folder, **{"scale": 2, "patch_size": 8, **options})


class TestPairs:
    def test_made_on_the_fly(self, tmp_path: Path, folder: Path) -> None:
        pairs = ImagePairs(folder, scale=4)
        assert pairs[0].hr.shape == (3, 36, 40)
        assert torch.equal(pairs[0].lr, degrade(pairs[0].hr, 4))
        assert [one.name for one in pairs[3:]] == ["p3", "p4"]
        for folders, message in (([tmp_path / "missing"], "no such folder"), ([folder, tmp_path], "holds no images")):
            assert_error(message, ImagePairs, *folders, scale=2)

    @pytest.mark.parametrize("name", ["a.png", "ax2.png", "a_x2.png", "AX2.PNG"])
    def test_names_that_match(self, name: str, tmp_path: Path) -> None:
        write(tmp_path / "hr" / "a.png", 8, 8)
        lr = write(tmp_path / "lr" / name, 4, 4, seed=1)
        (pair,) = ImagePairs(tmp_path / "hr", tmp_path / "lr", scale=2)
        assert pair.lr.permute(1, 2, 0).numpy().tolist() == lr.tolist()

    def test_all_problems_at_once(self, tmp_path: Path) -> None:
        hr, lr = tmp_path / "hr", tmp_path / "lr"
        for name in ("good", "alone", "twice", "wrong"):
            write(hr / f"{name}.png", 8, 10)
        write(hr / "small.png", 4, 9)
        (hr / "text.png").write_text("hello")
        for name in ("good", "twice", "small", "text", "extra"):
            write(lr / f"{name}.png", 4, 5)
        write(lr / "twice.bmp", 4, 5)
        write(lr / "wrongx2.png", 5, 5)
        with pytest.raises(BinarizeError, match="6 images cannot be used") as caught:
            ImagePairs(hr, lr, scale=2, min_side=6)
        message = str(caught.value)
        assert "\n" not in message
        for part in (
            f"{hr / 'alone.png'}: no low-resolution partner in {lr}; looked for alone, alonex2, alone_x2",
            f"{hr / 'twice.png'}: several low-resolution partners: twice.bmp, twice.png",
            f"{hr / 'wrong.png'} is 10x8 and {lr / 'wrongx2.png'} is 5x5; at scale 2 the latter must be 5x4",
            f"{hr / 'small.png'}: is 9x4 pixels, at least 6x6 are needed",
            f"{hr / 'text.png'}: is not an image that Pillow can read",
            f"{lr / 'extra.png'}: no high-resolution partner",
        ):
            assert part in message
        assert "good" not in message

    def test_many_problems_are_cut_short(self, tmp_path: Path) -> None:
        for number in range(23):
            (tmp_path / f"{number:02}.png").touch()
        assert_error(r"23 images cannot be used: .*19\.png: [^;]*; and 3 more$", ImagePairs, tmp_path, scale=2)

    def test_truncated_images_are_found_at_construction(self, tmp_path: Path) -> None:
        for name in ("a", "b", "c"):
            write(tmp_path / f"{name}.png", 64, 64)
        for name in ("a", "c"):
            path = tmp_path / f"{name}.png"
            path.write_bytes(path.read_bytes()[:5000])
        for make in (lambda: PairedPatches(tmp_path, scale=2, patch_size=8), ImagePairs(tmp_path, scale=2).check):
            assert_error(r"2 images cannot be used: .*a\.png.*c\.png", make)


def test_candidates_choose_the_place_with_most_texture(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    image = np.full((64, 64, 3), 128, np.uint8)
    image[32:, 32:] = random.integers(0, 256, (32, 32, 3))
    Image.fromarray(image).save(tmp_path / "half.png")
    options = {"scale": 2, "patch_size": 16, "augment": False, "length": 200}

    def texture(candidates: int) -> list[float]:
        patches = PairedPatches(tmp_path, candidates=candidates, **options)  # type: ignore[arg-type]
        return [float(patches[i]["hr"].std()) for i in range(200)]

    one, four = texture(1), texture(4)
    assert np.mean(four) > 1.5 * np.mean(one)
    assert all(b >= a - 0.05 for a, b in zip(one, four, strict=True))  # the first position is always a candidate
    assert texture(4) == four
