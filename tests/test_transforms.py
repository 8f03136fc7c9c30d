import os
import subprocess
import sys
from fractions import Fraction

import albumentations as A
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from early_fusion_seg.data import dataset, transforms
from early_fusion_seg.data.dataset import FileSource, Item, SegmentationDataset
from early_fusion_seg.data.transforms import (
    FILL_VALUES,
    Axis,
    TrainAugmentation,
    Window,
    align_to_reduced,
    largest_class_share,
    resize,
    resize_image,
    resize_mask,
    seed_transform,
)
from early_fusion_seg.errors import UserError
from early_fusion_seg.io.images import read_image
from early_fusion_seg.labels import LabelSet

RNG = np.random.default_rng(0)


def position_image(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an image with row and column as red and green, and a mask with labels computed from them."""
    rows, cols = np.mgrid[:height, :width]
    image = np.stack([rows, cols, np.full_like(rows, 77)], -1).astype(np.uint8)
    return image, label_of(rows, cols)


def label_of(rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    return ((rows // 10) % 3 + 3 * ((cols // 10) % 3)).astype(np.uint8)


def crop_only(size: tuple[int, int] | None, scale: tuple[float, float] = (0.5, 2.0)) -> TrainAugmentation:
    """The default augmentation without flip and color."""
    augmentation = TrainAugmentation(size, scale)
    augmentation.flip_and_color = ()
    return augmentation


def run(transform: A.BasicTransform, image: np.ndarray, mask: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    seed_transform(transform, (seed,))
    data = transform(image=image, mask=mask)
    return data["image"], data["mask"]


def test_import_opens_no_socket() -> None:
    script = (
        "import socket; opened = []\n"
        "class Spy(socket.socket):\n"
        "    def __init__(self, *a, **k): opened.append(1); super().__init__(*a, **k)\n"
        "socket.socket = Spy\n"
        "import early_fusion_seg.data.transforms\n"
        "print('opened', len(opened))"
    )
    env = {name: value for name, value in os.environ.items() if name != "NO_ALBUMENTATIONS_UPDATE"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("opened 0")


@pytest.mark.parametrize("crop", [None, (40, 60), (200, 30), (7, 250)])
def test_crop_has_the_right_size_and_type_and_image_and_mask_stay_aligned(crop: tuple[int, int] | None) -> None:
    image, mask = position_image(120, 160)
    transform = crop_only(crop)
    for seed in range(30):
        pixels, labels = run(transform, image, mask, seed)
        assert pixels.shape == (*(crop or (120, 160)), 3)
        assert labels.shape == pixels.shape[:2]
        assert pixels.dtype == labels.dtype == np.uint8
        filled = (pixels == FILL_VALUES["image"]).all(-1)
        np.testing.assert_array_equal(filled, labels == 255)
        rows, cols = pixels[..., 0].astype(int), pixels[..., 1].astype(int)
        inner = ~filled & (np.abs(rows % 10 - 4.5) < 2.6) & (np.abs(cols % 10 - 4.5) < 2.6)  # away from label borders
        np.testing.assert_array_equal(labels[inner], label_of(rows, cols)[inner])


def test_scale_is_uniform_in_its_range_and_the_same_in_both_directions() -> None:
    image, mask = position_image(250, 250)
    steps = []
    for seed in range(300):
        pixels, _ = run(crop_only((30, 30)), image, mask, seed)
        down, right = np.ptp(pixels[..., 0].astype(float)) / 29, np.ptp(pixels[..., 1].astype(float)) / 29
        assert abs(down - right) < 0.12
        steps.append(1 / down)
    assert 0.45 < min(steps) < 0.6
    assert 1.85 < max(steps) < 2.3
    assert 1.1 < float(np.mean(steps)) < 1.4


def test_crops_cover_the_whole_image() -> None:
    image, mask = position_image(100, 100)
    seen = np.zeros((100, 100), bool)
    for seed in range(400):
        pixels, labels = run(crop_only((20, 20), scale=(1.0, 1.0)), image, mask, seed)
        assert not (labels == 255).any()
        seen[pixels[..., 0], pixels[..., 1]] = True
    assert seen.mean() > 0.97


def test_small_image_is_padded_at_a_random_place() -> None:
    image = np.full((10, 10, 3), 200, np.uint8)
    corners = set()
    for seed in range(40):
        _, labels = run(crop_only((30, 40), scale=(1.0, 1.0)), image, np.zeros((10, 10), np.uint8), seed)
        assert (labels == 0).sum() == 100
        corners.add(tuple(np.argwhere(labels == 0)[0]))
    assert len(corners) > 20


def test_crops_of_one_class_are_avoided(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.zeros((100, 200), np.uint8)
    mask[:, 100:] = np.arange(100) // 10 % 4  # the left half has one class, the right half four
    image = np.zeros((100, 200, 3), np.uint8)

    def one_class(max_share: float, tries: int) -> int:
        monkeypatch.setattr(transforms, "MAX_CLASS_SHARE", max_share)
        monkeypatch.setattr(transforms, "MAX_TRIES", tries)
        transform = crop_only((24, 24), scale=(1.0, 1.0))
        return sum(largest_class_share(run(transform, image, mask, seed)[1]) > 0.75 for seed in range(200))

    assert one_class(max_share=1.0, tries=10) > 60
    assert one_class(max_share=0.75, tries=1) > 60
    assert one_class(max_share=0.75, tries=10) <= 3


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.7])
def test_window_is_centered_on_a_pixel_of_the_given_class(scale: float) -> None:
    mask = np.zeros((90, 120), np.uint8)
    mask[40, 60] = mask[2, 118] = 7  # one in the middle, one in a corner
    transform = crop_only((20, 30), scale=(scale, scale))
    height, width = round(20 / scale), round(30 / scale)
    seen = set()
    for seed in range(20):
        transform.seed((seed,))
        window = transform.draw_window((90, 120), mask, 7)
        assert window.scale == scale
        top, left = window.rows.source.start, window.cols.source.start
        assert (window.rows.source.stop - top, window.cols.source.stop - left) == (height, width)
        assert (window.rows.target, window.cols.target) == (slice(0, 20), slice(0, 30))
        seen.add((top, left))
    assert seen == {(40 - height // 2, 60 - width // 2), (0, 120 - width)}


def test_given_class_that_does_not_occur_changes_nothing_and_small_images_are_not_cropped() -> None:
    image, mask = position_image(90, 120)
    transform = TrainAugmentation((20, 30))
    for seed in range(5):
        expected = run(transform, image, mask, seed)
        seed_transform(transform, (seed,))
        data = transform(image=image, mask=mask, label=77)
        np.testing.assert_array_equal(data["image"], expected[0])
        np.testing.assert_array_equal(data["mask"], expected[1])
        seed_transform(transform, (seed,))
        assert transform(image=image, label=3)["image"].shape == (20, 30, 3)  # without a mask the class is not searched
    whole = crop_only((100, 200), scale=(1.0, 1.0))
    assert (whole(image=image, mask=mask, label=3)["mask"] != 255).sum() == 90 * 120


def test_image_without_labels_is_cropped() -> None:
    image, mask = np.zeros((50, 50, 3), np.uint8), np.full((50, 50), 255, np.uint8)
    _, labels = run(crop_only((20, 20)), image, mask, 0)
    assert labels.shape == (20, 20)


def test_image_without_mask_is_cropped() -> None:
    transform = crop_only((20, 20))
    assert transform(image=np.zeros((50, 50, 3), np.uint8))["image"].shape == (20, 20, 3)


def test_largest_class_share_ignores_255_and_is_approximate_on_large_masks() -> None:
    assert largest_class_share(np.array([[1, 1, 1, 2, 255, 255]], np.uint8)) == 0.75
    assert largest_class_share(np.full((3, 3), 255, np.uint8)) == 1.0
    large = RNG.choice(3, (1500, 2000), p=[0.6, 0.3, 0.1]).astype(np.uint8)
    assert abs(largest_class_share(large) - 0.6) < 0.01


def test_default_transform_flips_half_and_changes_colors_only_in_the_image() -> None:
    image, mask = position_image(120, 160)
    transform = TrainAugmentation((60, 80))
    flipped = blue = 0
    for seed in range(100):
        pixels, labels = run(transform, image, mask, seed)
        assert pixels.dtype == labels.dtype == np.uint8
        assert set(np.unique(labels)) <= {*range(9), 255}
        inside = np.flatnonzero((labels != 255).all(0))
        flipped += bool(pixels[30, inside[0], 1] > pixels[30, inside[-1], 1])
        blue += bool((pixels[..., 2][labels != 255] != 77).mean() > 0.5)
    assert 30 < flipped < 70
    assert blue > 60


def test_result_depends_only_on_the_seed_and_transforms_draw_independently() -> None:
    image, mask = position_image(120, 160)
    transform = TrainAugmentation((60, 80))
    first = run(transform, image, mask, 5)
    transform(image=image, mask=mask)  # changes the random state, which the next seed must reset
    for a, b in zip(first, run(transform, image, mask, 5), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first[0], run(transform, image, mask, 6)[0])

    spies = [A.RandomBrightnessContrast(p=1.0), A.RandomBrightnessContrast(p=1.0)]
    run(A.Compose(spies), image, mask, 0)
    assert spies[0].get_applied_params()["alpha"] != spies[1].get_applied_params()["alpha"]


def test_seeding_accepts_other_callables() -> None:
    seed_transform(lambda image, mask: {"image": image, "mask": mask}, (1, 2))


def nearest_centers(old: int, new: int) -> list[int]:
    """Return for each new pixel the old pixel with the nearest center, or the later of two."""
    distance = {
        (i, j): abs(Fraction(2 * i + 1, 2 * new) - Fraction(2 * j + 1, 2 * old)) for i in range(new) for j in range(old)
    }
    return [min(range(old), key=lambda j: (distance[i, j], -j)) for i in range(new)]


@pytest.mark.parametrize(
    ("scale", "size"), [(0.5, (18, 24)), (0.37, (13, 18)), (2.0, (72, 96)), (1.5, (54, 72)), (0.75, (27, 36))]
)
def test_resize_has_the_rounded_size_and_the_labels_of_the_nearest_centers(scale: float, size: tuple[int, int]) -> None:
    image, mask = RNG.integers(0, 256, (36, 48, 3), np.uint8), RNG.integers(0, 12, (36, 48), np.uint8)
    pixels, labels = resize(image, mask, scale)
    assert pixels.shape == (*size, 3)
    expected = mask[np.ix_(nearest_centers(36, size[0]), nearest_centers(48, size[1]))]
    np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_resize_down_averages_all_pixels(factor: int) -> None:
    image = RNG.integers(0, 256, (36, 48, 3), np.uint8)
    mean = image.reshape(36 // factor, factor, 48 // factor, factor, 3).mean((1, 3))
    assert np.abs(resize(image, None, 1 / factor)[0] - mean).max() <= 0.51


@pytest.mark.parametrize("size", [(72, 96), (54, 60), (27, 36), (18, 24)])
def test_resize_to_half_or_more_is_bilinear(size: tuple[int, int]) -> None:
    image = RNG.integers(0, 256, (36, 48, 3), np.uint8)
    floats = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    expected = F.interpolate(floats, size=size, mode="bilinear")[0].permute(1, 2, 0).numpy()
    assert np.abs(resize_image(image, *size) - expected).max() <= 1.01


def test_resize_by_one_returns_the_same_arrays_and_a_missing_mask_stays_none() -> None:
    image, mask = position_image(20, 30)
    assert resize(image, mask, 1.0) == (image, mask) or resize(image, mask, 1.0)[0] is image
    assert resize(image, None, 0.5)[1] is None
    assert resize(image, mask, 0.001)[0].shape == (1, 1, 3)


def test_resized_mask_has_no_new_labels() -> None:
    mask = np.where(RNG.random((37, 53)) < 0.5, 3, 200).astype(np.uint8)
    assert set(np.unique(resize_mask(mask, 50, 20))) <= {3, 200}


@pytest.mark.parametrize("size", [(40, 60), (400, 300)])
def test_short_side_is_applied_before_the_random_scale(size: tuple[int, int]) -> None:
    # stripes; the number of color changes shows the scale
    image = np.zeros((*size, 3), np.uint8)
    image[:, np.arange(size[1]) // (size[1] // 10) % 2 == 0] = 255
    transform = TrainAugmentation((100, 100), random_scale=(2.0, 2.0), short_side=100)
    seed_transform(transform, (0,))
    cut = transform(image=image, mask=np.zeros(size, np.uint8))["image"]
    changes = np.count_nonzero(np.diff(cut[50, :, 0].astype(int) > 127))
    width = 200 * size[1] / min(size)  # of the scaled image
    assert changes == pytest.approx(100 / (width / 10), abs=1)


def position_colors(height: int, width: int) -> np.ndarray:
    """Return a smooth image whose colors encode the position in steps of 4 pixels, which JPEG preserves."""
    rows, cols = np.mgrid[:height, :width]
    return np.stack([rows / 4, cols / 4, (rows + cols) / 8], -1).astype(np.uint8)


@pytest.mark.parametrize("size", [(803, 602), (64, 1000)])
def test_jpegs_are_decoded_at_reduced_size_and_stay_aligned_with_masks(size, tmp_path, monkeypatch) -> None:
    rows, cols = np.mgrid[: size[0], : size[1]]
    labels = (rows // 40 % 8 + 8 * (cols // 40 % 8)).astype(np.uint8)
    Image.fromarray(position_colors(*size)).save(tmp_path / "a.jpg", quality=98, subsampling=0)
    Image.fromarray(labels).save(tmp_path / "a.png")
    label_set = LabelSet("x", tuple(map(str, range(64))), ((0, 0, 0),) * 64, tuple((i, i) for i in range(64)))
    source = FileSource([Item("a", tmp_path / "a.jpg", tmp_path / "a.png")], label_set)
    reductions = []
    real = dataset.read_image
    monkeypatch.setattr(dataset, "read_image", lambda path, n=1: reductions.append(n) or real(path, n))
    for scale, reduction in ((0.13, 4), (0.3, 2), (0.5, 2), (0.6, 1), (0.12, 8)):
        data = SegmentationDataset(source, crop_only((40, 60), (scale, scale)))
        for epoch in range(6):
            sample = data[epoch, 0]
            pixels = sample["image"].permute(1, 2, 0).numpy().astype(float)
            mask = sample["mask"].numpy()
            assert pixels.shape == (40, 60, 3)
            inside = mask != 255
            at_rows, at_cols = pixels[..., 0] * 4 + 2, pixels[..., 1] * 4 + 2  # the position that a color encodes
            clear = inside & (np.abs(at_rows % 40 - 20) < 11) & (np.abs(at_cols % 40 - 20) < 11)
            expected = (at_rows // 40 % 8 + 8 * (at_cols // 40 % 8)).astype(int)
            assert clear.sum() > 50
            assert (mask[clear] == expected[clear]).all()
        assert set(reductions) == {reduction}
        reductions.clear()
    SegmentationDataset(source)[0]
    assert reductions == [1]  # not reduced in evaluation


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("vertical", [True, False])
def test_reduced_jpegs_of_every_size_stay_aligned_with_masks(factor: int, vertical: bool, tmp_path) -> None:
    label_set = LabelSet("x", tuple(map(str, range(128))), ((0, 0, 0),) * 128, tuple((i, i) for i in range(128)))
    for side in range(64, 129):
        position = np.repeat(np.arange(side, dtype=np.uint8)[:, None], 70, 1)  # the label of a row is its number
        position = position if vertical else np.ascontiguousarray(position.T)
        Image.fromarray(position * 2).convert("RGB").save(tmp_path / "a.jpg", quality=98, subsampling=0)
        Image.fromarray(position).save(tmp_path / "a.png")
        source = FileSource([Item("a", tmp_path / "a.jpg", tmp_path / "a.png")], label_set)
        data = SegmentationDataset(source, crop_only((32 // factor, 32 // factor), (1 / factor, 1 / factor)))
        for epoch in range(4):
            sample = data[epoch, 0]
            distance = sample["image"][0].float().mean() / 2 - sample["mask"].float().mean()
            assert abs(distance) < 1, side  # in pixels of the file


def test_reduced_image_of_another_size_than_its_mask_is_refused(tmp_path) -> None:
    Image.fromarray(position_colors(400, 300)).save(tmp_path / "a.jpg")
    Image.fromarray(np.zeros((400, 310), np.uint8)).save(tmp_path / "a.png")
    source = FileSource(
        [Item("a", tmp_path / "a.jpg", tmp_path / "a.png")], LabelSet("x", ("a",), ((0, 0, 0),), ((0, 0),))
    )
    for scale in (0.3, 1.0):
        with pytest.raises(UserError, match=r"a.jpg is 300x400 pixels .*a.png is 310x400"):
            SegmentationDataset(source, TrainAugmentation((40, 60), (scale, scale)))[0]


def test_reduced_jpeg_shows_the_given_class(tmp_path, monkeypatch) -> None:
    labels = np.zeros((803, 602), np.uint8)
    labels[650:690, 500:530] = 1
    Image.fromarray(position_colors(803, 602)).save(tmp_path / "a.jpg")
    Image.fromarray(labels).save(tmp_path / "a.png")
    label_set = LabelSet("x", ("a", "b"), ((0, 0, 0),) * 2, ((0, 0), (1, 1)))
    source = FileSource([Item("a", tmp_path / "a.jpg", tmp_path / "a.png")], label_set)
    reductions = []
    real = dataset.read_image
    monkeypatch.setattr(dataset, "read_image", lambda path, n=1: reductions.append(n) or real(path, n))
    data = SegmentationDataset(source, crop_only((40, 40), (0.3, 0.3)))
    for epoch in range(20):
        assert 1 in data[epoch, 0, 1, 0]["mask"][15:25, 15:25]
    assert not all(1 in data[epoch, 0]["mask"] for epoch in range(20))
    assert set(reductions) == {2}


@pytest.mark.parametrize("mask_size", [(200, 150), (800, 600), (1600, 1200), (40, 30)])
@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_mask_of_a_multiple_of_the_image_size_is_refused(mask_size, scale: float, tmp_path) -> None:
    Image.fromarray(position_colors(400, 300)).save(tmp_path / "a.jpg")
    Image.fromarray(np.zeros(mask_size, np.uint8)).save(tmp_path / "a.png")
    source = FileSource(
        [Item("a", tmp_path / "a.jpg", tmp_path / "a.png")], LabelSet("x", ("a",), ((0, 0, 0),), ((0, 0),))
    )
    with pytest.raises(UserError, match=r"a.jpg is 300x400 pixels"):
        SegmentationDataset(source, TrainAugmentation((40, 60), (scale, scale)))[0]


def test_reduced_jpeg_is_the_average_of_its_pixels(tmp_path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8).repeat(20, 0).repeat(20, 1)[:, :150]
    Image.fromarray(noise).save(tmp_path / "a.jpg", quality=95, subsampling=0)
    Image.fromarray(noise).save(tmp_path / "a.png")
    whole = read_image(tmp_path / "a.jpg")
    for factor in (2, 4, 8):
        small = read_image(tmp_path / "a.jpg", factor)
        assert small.shape == (-(-120 // factor), -(-150 // factor), 3)
        rows, cols = 120 // factor, 150 // factor
        means = whole[: rows * factor, : cols * factor].reshape(rows, factor, cols, factor, 3).mean((1, 3))
        assert np.abs(small[:rows, :cols] - means).mean() < 2
        assert read_image(tmp_path / "a.png", factor).shape == (120, 150, 3)
    Image.fromarray(noise[:60, :60]).save(tmp_path / "small.jpg")
    assert read_image(tmp_path / "small.jpg", 2).shape == (60, 60, 3)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_windows_of_reduced_images_start_at_whole_pixels(factor: int) -> None:
    rng = np.random.default_rng(factor)
    for _ in range(200):
        side = int(rng.integers(64, 400))
        start, stop = sorted(rng.integers(0, side + 1, 2).tolist())
        axis = Axis(slice(start, max(stop, start + 1)), slice(0, 10))
        rows = align_to_reduced(Window((10, 10), 0.1, axis, axis), factor, (side, side)).rows
        assert rows.target == slice(0, 10)
        assert rows.source.start % factor == 0
        assert rows.source.stop % factor == 0
        assert side >= rows.source.stop > rows.source.start
        assert abs(rows.source.start - min(axis.source.start, side - factor)) < factor
        assert abs(rows.source.stop - axis.source.stop) <= factor
    assert align_to_reduced(Window((10, 10), 1.0, axis, axis), 1, (side, side)).rows == axis
