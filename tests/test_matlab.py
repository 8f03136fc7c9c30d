from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from early_fusion_seg.data.coco import COCODataModule
from early_fusion_seg.data.coco.replica import fake_coco_stuff10k
from early_fusion_seg.data.matlab import read_mat
from early_fusion_seg.errors import UserError


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1), (3, 4)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float64])
def test_label_maps_keep_their_shape(tmp_path: Path, shape: tuple[int, int], dtype: type) -> None:
    labels = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    savemat(tmp_path / "a.mat", {"S": labels, "GTcls": {"Segmentation": labels, "Other": 1}})
    for read in (read_mat(tmp_path / "a.mat", "S"), read_mat(str(tmp_path / "a.mat"), "GTcls", "Segmentation")):
        assert np.issubdtype(read.dtype, np.integer)
        np.testing.assert_array_equal(read, labels)


def test_an_image_of_one_row_is_read(tmp_path: Path) -> None:
    fake_coco_stuff10k(tmp_path, images=1)
    dm = COCODataModule(tmp_path, labels="stuff10k")
    item = dm.source("val").items[0]
    Image.new("RGB", (7, 1)).save(item.image)
    savemat(item.mask, {"S": np.array([[1, 2, 0, 1, 92, 182, 0]], np.uint8)})
    assert dm.dataset("val")[0]["mask"].tolist() == [[0, 1, 255, 0, 80, 170, 255]]


@pytest.mark.parametrize("value", [np.zeros((2, 3, 4)), np.array([[0.5]]), "text", np.array([[np.nan]])])
def test_what_is_no_label_map_is_refused(tmp_path: Path, value: object) -> None:
    savemat(tmp_path / "a.mat", {"S": value})
    with pytest.raises(UserError, match=r"a\.mat: S is .* of shape .*; expected whole numbers \(h, w\)"):
        read_mat(tmp_path / "a.mat", "S")


def test_a_variable_without_the_field_is_refused(tmp_path: Path) -> None:
    for value in (np.zeros((2, 3)), {"Boundaries": 1}):
        savemat(tmp_path / "a.mat", {"GTcls": value})
        with pytest.raises(UserError, match=r"a\.mat (has no variable GTcls\.Segmentation|is damaged)"):
            read_mat(tmp_path / "a.mat", "GTcls", "Segmentation")
