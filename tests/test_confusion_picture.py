import numpy as np
import pytest

from early_fusion_seg.visualize import PAPER, confusion_picture
from early_fusion_seg.visualize.confusion import CELL, EM, FULL, NO_TRUTH

WIDE = ["W" * 30, "M" * 30, "Q" * 30]  # wider than the title, so that the matrix ends at the right margin


def corner_colors(picture, k):
    """Colors of the cells (k, k), each near its corner, where no number is."""
    left, top = picture.shape[1] - EM - k * CELL, picture.shape[0] - EM - k * CELL
    return picture[top + 3 :: CELL, left + 3 :: CELL][:k, :k]


def test_rows_are_shares_of_the_truth_and_dark_as_their_root():
    confusion = np.array([[300, 100, 0], [0, 7, 0], [0, 0, 0]])
    picture = confusion_picture(confusion, WIDE)
    assert picture.dtype == np.uint8
    colors = corner_colors(picture, 3)
    half = np.rint((np.array(PAPER) + FULL) / 2)
    np.testing.assert_allclose(colors[0, 1], half, atol=1)  # a share of 1/4
    assert [tuple(c) for c in colors[1].tolist()] == [PAPER, FULL, PAPER]
    assert {tuple(c) for c in colors[2].tolist()} == {NO_TRUTH}


def test_numbers_are_per_cent_of_the_row_and_names_stand_outside():
    counts = np.array([[1, 3, 0], [0, 4, 0], [0, 0, 5]])
    picture = confusion_picture(counts, WIDE)
    np.testing.assert_array_equal(picture, confusion_picture(counts * 1000, WIDE))
    renamed = confusion_picture(counts, [WIDE[1], WIDE[0], WIDE[2]])
    rows, columns = np.nonzero((picture != renamed).any(2))
    left, top = picture.shape[1] - EM - 3 * CELL, picture.shape[0] - EM - 3 * CELL
    assert len(rows)
    assert ((rows < top) | (columns < left)).all()
    cells = picture[top:, left:][: 3 * CELL, : 3 * CELL].reshape(3, CELL, 3, CELL, 3).swapaxes(1, 2)[:, :, 2:-2, 2:-2]
    written = [[len(np.unique(cell)) > 5 for cell in row] for row in cells]
    np.testing.assert_array_equal(written, counts > 0)


@pytest.mark.parametrize("k", [1, 11, 40, 41, 66, 171, 255])
def test_any_number_of_classes_makes_a_picture_of_limited_size(k):
    picture = confusion_picture(np.eye(k, dtype=np.int64), ["a name that goes on and on " * 5] * k)
    assert picture.shape[2] == 3
    assert max(picture.shape) <= 1800


def test_many_classes_have_no_names():
    many = np.eye(100, dtype=np.int64)
    np.testing.assert_array_equal(confusion_picture(many, ["a"] * 100), confusion_picture(many, ["long name"] * 100))
