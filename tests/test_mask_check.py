import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from early_fusion_seg.data import FileSource, Item, Source, mask_check
from early_fusion_seg.data.datamodule import SegmentationDataModule, Split
from early_fusion_seg.data.folder import FolderDataModule
from early_fusion_seg.data.frequencies import draw_rare_classes
from early_fusion_seg.errors import UserError
from early_fusion_seg.labels import LabelSet

ROWS = ["0,0,background,#404040", "1,1,cat,#dc3c3c", "255,255,unlabeled,#000000"]


def folder(root: Path, train: list[int], val: list[int] | None = None, rows: list[str] = ROWS, images: int = 3) -> Path:
    """Write images whose masks hold the given numbers, in columns."""
    root.mkdir(exist_ok=True)
    (root / "labels.csv").write_text("\n".join(["raw_id,train_id,name,color", *rows]) + "\n")
    for split, values in (("train", train), ("val", train if val is None else val)):
        mask = np.resize(np.array(values, np.uint8), (8, 12))
        for kind, pixels in (("images", np.zeros((8, 12, 3), np.uint8)), ("masks", mask)):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
            for number in range(images):
                Image.fromarray(pixels).save(root / kind / split / f"{number}.png")
    return root


def loaders(root: Path, **kwargs: Any) -> FolderDataModule:
    data = FolderDataModule(root, num_workers=0, **kwargs)
    data.train_dataloader()
    data.val_dataloader()
    return data


def warning(root: Path, **kwargs: Any) -> str:
    """Return the only warning of the loaders of a run."""
    with pytest.warns(UserWarning, match="no pixel of") as caught:
        loaders(root, **kwargs)
    assert len(caught) == 1
    return str(caught[0].message)


def test_binary_masks_of_0_and_255_are_questioned(tmp_path: Path) -> None:
    assert warning(folder(tmp_path, [0, 0, 255])) == (
        "no pixel of train has the class cat. The masks hold 0, 255, and 255 is ignored: does 255 mean cat? "
        f"If so, give it the train_id of the class in {tmp_path / 'labels.csv'}"
    )
    rows = [ROWS[0], "255,1,cat,#dc3c3c"]  # the advice
    loaders(folder(tmp_path, [0, 0, 255], rows=rows))


def test_a_class_that_never_occurs_is_named(tmp_path: Path) -> None:
    rows = [*ROWS, "2,2,dog,#00ff00"]
    assert warning(folder(tmp_path, [0, 1], rows=rows)) == "no pixel of train has the class dog. The masks hold 0..1"
    (rest,) = warning(folder(tmp_path, [255, 2], rows=rows)).split(". ")[1:]
    assert rest.startswith("The masks hold 2, 255, and 255 is ignored: does 255 mean one of these classes?")


def test_unknown_labels_are_named_once_with_their_number(tmp_path: Path) -> None:
    root = folder(tmp_path, [0, 128, 255])
    Image.fromarray(np.full((8, 12), 7, np.uint8)).save(root / "masks/train/1.png")
    with pytest.raises(UserError) as error:
        loaders(root)
    text = str(error.value)
    assert "does not have (it has 0..1, 255): " in text
    assert "128 (2 of 3 masks, such as " in text
    assert "7 (1 of 3 masks, such as " in text
    assert "masks/train/1.png" in text
    assert f"add a line for each to {root / 'labels.csv'}: '" in text


def test_labels_that_no_table_can_have_get_no_advice_to_add_them() -> None:
    labels = LabelSet("x", ("a",), ((0, 0, 0),), ((0, 0),), file="labels.csv")
    assert mask_check.unknown_labels(labels, {70000: ["a.tif"]}, 1).endswith("a.tif). Correct the masks")


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_training_split_without_labels_is_refused(tmp_path: Path, share: float) -> None:
    with pytest.raises(UserError, match="no pixel of train has a class, so there is nothing to train on"):
        loaders(folder(tmp_path, [255], [0, 1], images=9), rare_class_share=share)


def test_draws_from_counts_without_labels_are_refused() -> None:
    with pytest.raises(UserError, match="no pixel of the training images has a class"):
        draw_rare_classes(np.zeros((3, 2), np.int64), 0.5, (0,))


def test_an_evaluation_split_without_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no pixel of val has a class, .* nothing to score\..* 255 is ignored"):
        loaders(folder(tmp_path, [0, 1], [255]))


def test_scores_of_one_class_are_questioned_and_a_missing_class_of_several_is_not(tmp_path: Path) -> None:
    root = folder(tmp_path, [0, 1], [0, 255])
    with pytest.warns(UserWarning, match="no pixel of val has the class cat.* does 255 mean cat"):
        FolderDataModule(root, num_workers=0).val_dataloader()
    root = folder(tmp_path, [0, 1, 2], [0, 1], rows=[*ROWS, "2,2,dog,#00ff00"])
    loaders(root)


class ArraySource(Source):
    """Masks in memory; counts how many were read."""

    def __init__(self, masks: list[list[int]]) -> None:
        self.masks, self.read_count = masks, 0

    def __len__(self) -> int:
        return len(self.masks)

    def key(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        self.read_count += 1
        mask = np.array([self.masks[index]], np.uint8)
        return np.zeros((*mask.shape, 3), np.uint8), mask


class ArrayDataModule(SegmentationDataModule):
    """A data module of a user."""

    def __init__(self, masks: list[list[int]], classes: int = 2) -> None:
        super().__init__(".", num_workers=0)
        self.masks, self.classes = ArraySource(masks), classes

    @property
    def label_set(self) -> LabelSet:
        names = tuple("abcdef"[: self.classes])
        return LabelSet("own", names, ((0, 0, 0),) * self.classes, tuple((i + 5, i) for i in range(self.classes)))

    def source(self, split: Split) -> Source:
        return self.masks


def test_masks_of_an_own_data_module_are_checked() -> None:
    with pytest.warns(UserWarning, match="no pixel of train has the class b. The masks hold 0, 255, and 255 is ignor"):
        ArrayDataModule([[0, 255]] * 3).train_dataloader()
    with pytest.raises(UserError, match="no pixel of train has a class"):
        ArrayDataModule([[255]] * 3).train_dataloader()


def test_a_large_split_is_not_read_to_its_end() -> None:
    complete = ArrayDataModule([[0, 1]] * 1000)
    complete.train_dataloader()
    assert complete.masks.read_count == mask_check.CHUNK
    rare = ArrayDataModule([[0, 1]] * 999 + [[2]], classes=3)
    rare.train_dataloader()  # a third of the classes may well be in the masks that were not read
    assert rare.masks.read_count <= mask_check.MAX_MASKS
    with pytest.warns(UserWarning, match="no pixel of the 256 masks read of train, which has 1000, has the class b"):
        ArrayDataModule([[0]] * 1000).train_dataloader()
    late = ArrayDataModule([[255]] * 1000)
    late.masks.masks[int(np.random.default_rng(0).permutation(1000)[990])] = [0, 1]
    late.train_dataloader()  # the only label is found


def test_large_masks_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_check, "MAX_PIXELS", 40)
    data = ArrayDataModule([[0, 1, 2]] * 100, classes=4)
    data.train_dataloader()
    assert data.masks.read_count == 16


def test_counts_in_the_cache_make_the_warning_certain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_check, "MAX_MASKS", 8)
    root = folder(tmp_path, [0, 1, 2], rows=[*ROWS, "2,2,dog,#0000ff", "3,3,emu,#00ff00"], images=20)
    loaders(root).class_pixel_counts()  # too few masks were read
    assert "no pixel of train has the class emu" in warning(root)


def test_a_class_of_one_mask_is_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_check, "MAX_MASKS", 8)
    root = folder(tmp_path, [0], [0, 1], images=20)
    last = int(np.random.default_rng(0).permutation(20)[19])
    keys = sorted(path.name for path in (root / "masks/train").iterdir())
    Image.fromarray(np.ones((8, 12), np.uint8)).save(root / "masks/train" / keys[last])
    assert "the 8 masks read of train" in warning(root)
    FolderDataModule(root).class_pixel_counts()
    loaders(root)


def test_files_that_cannot_be_read_are_left_to_the_run(tmp_path: Path) -> None:
    root = folder(tmp_path, [0, 1])
    (root / "masks/train/1.png").write_text("no mask")
    loaders(root)
    labels = LabelSet.from_csv(root / "labels.csv")
    gone = FileSource([Item("a", root / "a.png", root / "gone.png")], labels)
    assert mask_check.check_masks(gone, labels, "train") == []


def test_numbers_of_any_type_are_found() -> None:
    for dtype in (np.uint8, np.uint16, np.int32):
        assert mask_check.raw_ids_in(np.array([[3, 200, 3]], dtype)) == [3, 200]
    assert mask_check.raw_ids_in(np.zeros((0, 4), np.uint8)) == []


def test_crops_that_are_mostly_filling_are_questioned(tmp_path: Path) -> None:
    root = folder(tmp_path, [0, 1])
    message = r"75% of each crop is filling: crop_size is 8x12 .*images are 4x6 after .* Take crop_size \[4, 6\]"
    for more in ({"scale": 0.5}, {"short_side": 4}):
        with pytest.warns(UserWarning, match=message):
            loaders(root, crop_size=(8, 12), **more)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaders(root, crop_size=(10, 14))  # a little larger, as usual for VOC
        loaders(root, scale=0.5)
        loaders(root, crop_size=(8, 12), scale=0.5, train_transform=lambda image, mask: {"image": image, "mask": mask})


def test_crops_have_the_size_of_the_scaled_images_by_default(tmp_path: Path) -> None:
    root = folder(tmp_path, [0, 1])
    for more, size in (({"scale": 0.5}, (4, 6)), ({"short_side": 4}, (4, 6)), ({}, (8, 12))):
        data = loaders(root, **more)
        assert data.dataset("train")[0]["image"].shape[1:] == size
