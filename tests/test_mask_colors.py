from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from early_fusion_seg.data.folder import FolderDataModule, fake_folder
from early_fusion_seg.errors import UserError
from early_fusion_seg.io.images import write_indexed_png
from early_fusion_seg.labels import LabelSet, read_mask_or_colors
from early_fusion_seg.labels.mask_colors import raw_ids_of_colors

HEAD = "raw_id,train_id,name,color\n"
README = HEAD + "0,0,background,#404040\n1,1,cat,#dc3c3c\n255,255,unlabeled,#000000\n"
COLORS = {0: (0x40, 0x40, 0x40), 1: (0xDC, 0x3C, 0x3C), 255: (0, 0, 0)}


def table(tmp_path: Path, text: str) -> LabelSet:
    (tmp_path / "labels.csv").write_text(text)
    return LabelSet.from_csv(tmp_path / "labels.csv")


def rgb(*colors: tuple[int, int, int]) -> np.ndarray:
    return np.array([colors], np.uint8)


def gray(*numbers: int) -> np.ndarray:
    return rgb(*((number,) * 3 for number in numbers))


def test_colors_are_read_as_the_raw_ids_of_their_lines(tmp_path: Path) -> None:
    raw = np.random.default_rng(0).choice([0, 1, 255], (9, 11))
    pixels = np.array([[COLORS[number] for number in row] for row in raw.tolist()], np.uint8)
    np.testing.assert_array_equal(raw_ids_of_colors(table(tmp_path, README), pixels, "a.png"), raw)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("colored", [True, False])
def test_masks_of_a_folder_may_have_colors_or_equal_channels(tmp_path: Path, colored: bool, mode: str) -> None:
    root = fake_folder(tmp_path, images=2)
    before = FolderDataModule(root).dataset("val")[0]["mask"]
    palette = {1: (0x80, 0x40, 0), 2: (0, 0xA0, 0), 5: (0x60, 0xA0, 0xFF), 9: (0, 0, 0)}  # of fake_folder's labels.csv
    for path in (root / "masks").rglob("*.png"):
        numbers = np.asarray(Image.open(path))
        pixels = np.array([[palette[n] for n in row] for row in numbers.tolist()], np.uint8)
        Image.fromarray(pixels if colored else np.dstack([numbers] * 3)).convert(mode).save(path)
    np.testing.assert_array_equal(FolderDataModule(root).dataset("val")[0]["mask"], before)


def test_gray_pixels_that_are_no_colors_of_the_table_are_raw_ids(tmp_path: Path) -> None:
    labels = table(tmp_path, README)
    np.testing.assert_array_equal(raw_ids_of_colors(labels, gray(0, 1, 255), "a.png"), [[0, 1, 255]])
    np.testing.assert_array_equal(raw_ids_of_colors(labels, gray(64, 0), "a.png"), [[0, 255]])  # 64 is no raw id
    np.testing.assert_array_equal(raw_ids_of_colors(labels, gray(7), "a.png"), [[7]])  # LabelSet.encode refuses it


def test_gray_pixels_with_two_meanings_are_refused(tmp_path: Path) -> None:
    labels = table(tmp_path, README)
    with pytest.raises(UserError, match=r"two ways: 0 is a raw_id, and #000000 is the color of the raw_id 255"):
        raw_ids_of_colors(labels, gray(0, 0), "a.png")
    black = table(tmp_path, HEAD + "0,0,background,#000000\n1,1,cat,#ffffff\n255,255,unlabeled,#808080\n")
    with pytest.raises(UserError, match="255 is a raw_id, and #ffffff is the color of the raw_id 1"):
        raw_ids_of_colors(black, gray(0, 255), "a.png")
    np.testing.assert_array_equal(raw_ids_of_colors(black, gray(0, 0), "a.png"), [[0, 0]])  # both ways agree


def test_unknown_colors_are_listed_with_their_pixels(tmp_path: Path) -> None:
    labels = table(tmp_path, README)
    pixels = rgb((1, 2, 3), (1, 2, 3), (0xDC, 0x3C, 0x3C), (255, 0, 0))
    with pytest.raises(UserError, match=r"a\.png is in colors.*csv.* #010203 in 2 pixel\(s\), #ff0000 in 1 pixel"):
        raw_ids_of_colors(labels, pixels, "a.png")
    many = rgb(*((i, 0, 1) for i in range(8)))
    with pytest.raises(UserError, match=r"for 8 of them: .*#040001 in 1 pixel\(s\) and 3 more"):
        raw_ids_of_colors(labels, many, "a.png")


def test_a_color_of_several_classes_is_unknown(tmp_path: Path) -> None:
    same_class = HEAD + "0,0,ground,#010203\n3,0,ground,#010203\n1,1,cat,#040506\n2,2,dog,#040506\n"
    labels = table(tmp_path, same_class)
    np.testing.assert_array_equal(raw_ids_of_colors(labels, rgb((1, 2, 3)), "a.png"), [[0]])
    with pytest.raises(UserError, match="has no class, or several, for 1 of them: #040506"):
        raw_ids_of_colors(labels, rgb((4, 5, 6)), "a.png")


def test_a_label_set_without_colors_refuses_colors() -> None:
    labels = LabelSet("small", ("a",), ((1, 2, 3),), ((0, 0),))
    with pytest.raises(UserError, match="small has no class"):
        raw_ids_of_colors(labels, rgb((1, 2, 3)), "a.png")


def test_a_palette_that_was_renumbered_is_refused(tmp_path: Path) -> None:
    labels = table(tmp_path, HEAD + "0,0,ground,#404040\n1,1,cat,#dc3c3c\n2,2,dog,#00a000\n255,255,void,#000000\n")
    drawn = np.random.default_rng(0).integers(0, 3, (9, 11)).astype(np.uint8)
    colors = np.array([(0x40, 0x40, 0x40), (0xDC, 0x3C, 0x3C), (0, 0xA0, 0)], np.uint8)
    Image.fromarray(colors[drawn]).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_mask_or_colors(labels, tmp_path / "a.png"), drawn)
    write_indexed_png(tmp_path / "a.png", drawn, colors)
    np.testing.assert_array_equal(read_mask_or_colors(labels, tmp_path / "a.png"), drawn)
    write_indexed_png(tmp_path / "a.png", 2 - drawn, colors[::-1])  # the same picture in other numbers
    with pytest.raises(UserError, match=r"a\.png holds the number 0 in the color #00a000, .*csv gives to the raw_id 2"):
        read_mask_or_colors(labels, tmp_path / "a.png")


def test_a_palette_of_other_colors_is_ignored(tmp_path: Path) -> None:
    labels = table(tmp_path, README)
    palette = [(0, 0, 0), (128, 0, 0), (0, 128, 0)]  # of VOC: black is a color of README's table, for another raw id
    for numbers in ([[0, 1, 1]], [[0, 0, 0]]):
        write_indexed_png(tmp_path / "a.png", np.array(numbers, np.uint8), palette)
        np.testing.assert_array_equal(read_mask_or_colors(labels, tmp_path / "a.png"), numbers)
    write_indexed_png(tmp_path / "a.png", np.array([[7]], np.uint8), palette)  # LabelSet.encode refuses it
    np.testing.assert_array_equal(read_mask_or_colors(labels, tmp_path / "a.png"), [[7]])
