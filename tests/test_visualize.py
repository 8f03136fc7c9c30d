import numpy as np
import pytest
from PIL import Image, ImageFont

from early_fusion_seg.errors import UserError
from early_fusion_seg.visualize import (
    IGNORED,
    INK,
    PAPER,
    WRONG,
    colorize,
    confusion_picture,
    error_map,
    fit_tile,
    overlay,
    panel,
    sheet,
)
from early_fusion_seg.visualize.confusion import CELL, DARKEST, EM, NO_TRUTH

PALETTE = [[200, 10, 10], [10, 200, 10], [10, 10, 200]]
NAMES = ["road", "tree", "sky"]


def _scene(height=24, width=32, ignored=False):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    truth = np.zeros((height, width), np.uint8)
    truth[: height // 2] = 2
    if ignored:
        truth[:, :3] = 255
    return image, truth


def _has(picture, color):
    return bool((picture == np.array(color, np.uint8)).all(-1).any())


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.uint16])
def test_colorize_equals_pillows_palette(dtype):
    labels = np.random.default_rng(1).integers(0, 3, (7, 5)).astype(dtype)
    indexed = Image.fromarray(labels.astype(np.uint8), "P")
    indexed.putpalette(np.array(PALETTE, np.uint8).tobytes())
    assert np.array_equal(colorize(labels, PALETTE), np.asarray(indexed.convert("RGB")))


@pytest.mark.parametrize("ignore_index", [255, -1, 1])
def test_ignored_pixels_are_black_for_any_ignore_index(ignore_index):
    labels = np.array([[0, ignore_index, 2]])
    assert colorize(labels, PALETTE, ignore_index).tolist() == [[PALETTE[0], [0, 0, 0], PALETTE[2]]]


@pytest.mark.parametrize("label", [3, -1, 254])
def test_a_label_without_a_color_is_named_in_the_error(label):
    with pytest.raises(UserError, match=rf"holds {label}; the palette has colors for 0\.\.2, and 255 is ignored"):
        colorize(np.array([[0, label]]), PALETTE)


@pytest.mark.parametrize("labels", [np.zeros((2, 2)), np.zeros((2, 2, 1), int)])
def test_arrays_that_are_not_label_maps_are_refused(labels):
    with pytest.raises(UserError, match=r"expected integers of shape \(h, w\)"):
        colorize(labels, PALETTE)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_overlay_equals_pillows_blend(alpha):
    image, truth = _scene()
    blend = Image.blend(Image.fromarray(image), Image.fromarray(colorize(truth, PALETTE)), alpha)
    assert np.abs(overlay(image, truth, PALETTE, alpha).astype(int) - np.asarray(blend)).max() <= 1  # rounding


def test_overlay_changes_neither_ignored_pixels_nor_its_arguments():
    image, truth = _scene(ignored=True)
    before = image.copy()
    mixed = overlay(image, truth, PALETTE, 0.7)
    assert np.array_equal(mixed[:, :3], image[:, :3])
    assert not np.array_equal(mixed[:, 3:], image[:, 3:])
    assert np.array_equal(image, before)


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_an_alpha_out_of_range_is_refused(alpha):
    with pytest.raises(UserError, match="alpha is"):
        overlay(*_scene(), PALETTE, alpha)


def test_errors_are_red_only_where_the_prediction_is_wrong():
    image, truth = _scene(ignored=True)
    prediction = truth.copy()
    prediction[5, 10] = 1
    prediction[20, 12] = 1  # one wrong label below the true one, one above it
    prediction[6, 0] = 1  # without ground truth
    prediction[:, 2] = 2
    shown = error_map(image, truth, prediction)
    assert np.argwhere((shown == np.array(WRONG)).all(-1)).tolist() == [[5, 10], [20, 12]]
    assert (shown[:, :3] == np.array(IGNORED)).all()
    rest = np.delete(shown[:, 3:].reshape(-1, 3), [5 * 29 + 7, 20 * 29 + 9], axis=0)
    assert (rest.min(1) == rest.max(1)).all()  # gray
    assert rest.min() >= 110
    assert rest.max() <= 237


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (96, 128, (288, 384)),
        (320, 200, (320, 200)),
        (1, 1, (320, 320)),
        (1024, 2048, (342, 683)),
        (700, 640, (700, 640)),
    ],
)
def test_tiles_are_resized_by_whole_numbers(height, width, expected):
    tile = np.random.default_rng(2).integers(0, 256, (height, width, 3), dtype=np.uint8)
    fitted = fit_tile(tile)
    assert fitted.shape == (*expected, 3)
    nearest = Image.fromarray(tile).resize(expected[::-1], Image.Resampling.NEAREST)
    if expected[0] >= height:
        assert np.array_equal(fitted, np.asarray(nearest))
    else:
        assert np.array_equal(fitted, tile[::3, ::3])


def test_a_panel_has_four_tiles():
    image, truth = _scene(330, 400)
    prediction = np.roll(truth, 9, 0)
    shown = panel(image, truth, prediction, PALETTE, NAMES)
    em = 400 // 22
    tiles = [image, colorize(truth, PALETTE), colorize(prediction, PALETTE), error_map(image, truth, prediction)]
    for i, tile in enumerate(tiles):
        y, x = 2 * em + i // 2 * (330 + 2 * em), em + i % 2 * (400 + em)
        assert np.array_equal(shown[y : y + 330, x : x + 400], tile), i


def test_portrait_images_are_laid_out_in_a_row():
    image, truth = _scene(400, 330)
    shown = panel(image, truth, truth, PALETTE, NAMES)
    assert shown.shape[1] == 4 * 330 + 5 * (400 // 22)


def test_the_legend_has_only_the_classes_that_occur(monkeypatch):
    image, truth = _scene(330, 400)
    assert _legend_swatches(panel(image, truth, truth, PALETTE, NAMES)) == [PALETTE[0], PALETTE[2]]
    prediction = truth.copy()
    prediction[0, 0] = 1
    assert _legend_swatches(panel(image, truth, prediction, PALETTE, NAMES)) == [*PALETTE, list(WRONG)]
    prediction[0, 0] = 255
    with_void = [PALETTE[0], PALETTE[2], list(IGNORED), list(WRONG)]
    assert _legend_swatches(panel(image, truth, prediction, PALETTE, NAMES)) == with_void
    truth[0, 0] = 255
    without_truth = [PALETTE[0], PALETTE[2], list(IGNORED)]
    assert _legend_swatches(panel(image, truth, prediction, PALETTE, NAMES)) == without_truth


def test_ignored_pixels_of_a_sheet_are_black_and_in_the_legend():
    image, truth = _scene(330, 400)
    truth[:50] = 255
    shown = sheet([image, image], [truth, truth], ["a", "b"], PALETTE, NAMES)
    assert _legend_swatches(shown) == [PALETTE[0], PALETTE[2], list(IGNORED)]
    assert (shown == IGNORED).all(-1).sum() >= 2 * 50 * 400
    assert sheet([image], [None], ["a"], PALETTE, NAMES).shape[1] < shown.shape[1]


def _legend_swatches(shown):
    """Read the legend of a (330, 400) panel from its pixels: the center color of each square with a frame."""
    em = 400 // 22
    legend = shown[2 * (330 + 2 * em) + em :]
    ink = (legend == np.array(INK)).all(-1)
    found = []
    for y in range(legend.shape[0] - em + 1):
        for x in range(legend.shape[1] - em + 1):
            square = ink[y : y + em, x : x + em]
            if square[0].all() and square[-1].all() and square[:, 0].all() and square[:, -1].all():
                found.append(legend[y + em // 2, x + em // 2].tolist())
    return found


def test_titles_are_drawn_and_give_the_percentage_of_errors(monkeypatch):
    written = []
    image, truth = _scene(330, 400)
    prediction = truth.copy()
    prediction[:33] = 1
    truth[165:] = 255  # a fifth of the remaining rows is wrong
    text = "PIL.ImageDraw.ImageDraw.text"
    monkeypatch.setattr(text, lambda self, xy, text, *args, **kwargs: written.append(text))
    without_text = panel(image, truth, prediction, PALETTE, NAMES)
    legend = ["road", "tree", "sky", "ignored", "wrong"]
    assert written == [*legend, "image", "truth", "prediction", "errors: 20.0 % of the pixels"]
    monkeypatch.undo()
    with_text = panel(image, truth, prediction, PALETTE, NAMES)
    changed = (with_text != without_text).any(-1)
    em = 400 // 22
    assert changed[: 2 * em, em : em + 400].any()
    assert not changed[2 * em : 2 * em + 330].any()  # no text on the tiles


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (500, 3), (96, 128), (1080, 1920)])
def test_panels_of_any_image_size_have_a_readable_size(size):
    shown = panel(*_scene(*size), _scene(*size)[1], PALETTE, ["a name that is longer than most others are", *NAMES[1:]])
    assert max(shown.shape[:2]) < 3000
    assert max(shown.shape[:2]) >= 320
    assert _has(shown, PAPER)
    names = ImageFont.load_default(max(14, max(shown.shape[:2]) // 100)).getlength("a name that is longer")
    assert shown.shape[1] > names


def test_a_panel_of_ignored_pixels_only_has_no_errors():
    image, truth = _scene()
    truth[:] = 255
    shown = panel(image, truth, np.zeros_like(truth), PALETTE, NAMES)
    assert not _has(shown, WRONG)


@pytest.mark.parametrize(
    ("image", "truth", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), int), "image is float32"),
        (np.zeros((3, 4, 4), np.uint8), np.zeros((4, 4), int), r"expected uint8 of shape \(h, w, 3\)"),
        (np.zeros((0, 4, 3), np.uint8), np.zeros((0, 4), int), "image is"),
        (np.zeros((4, 4), np.uint8), np.zeros((4, 4), int), "image is"),
        (np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5), int), r"truth has the shape \(4, 5\), the image \(4, 4\)"),
    ],
)
def test_wrong_shapes_are_refused(image, truth, message):
    with pytest.raises(UserError, match=message):
        panel(image, truth, np.zeros((4, 4), int), PALETTE, NAMES)


# --- confusion matrix

WIDE = ["W" * 30, "M" * 30, "Q" * 30]  # wider than the title, so the matrix ends at the right margin


def corner_colors(picture, k):
    """Return the color (k, k) of each cell near its corner, where no number is drawn."""
    left, top = picture.shape[1] - EM - k * CELL, picture.shape[0] - EM - k * CELL
    return picture[top + 3 :: CELL, left + 3 :: CELL][:k, :k]


def test_cell_darkness_is_the_root_of_the_fraction_of_the_row():
    confusion = np.array([[300, 100, 0], [0, 7, 0], [0, 0, 0]])
    picture = confusion_picture(confusion, WIDE)
    assert picture.dtype == np.uint8
    colors = corner_colors(picture, 3)
    half = np.rint((np.array(PAPER) + DARKEST) / 2)
    np.testing.assert_allclose(colors[0, 1], half, atol=1)  # a fraction of 1/4
    assert [tuple(c) for c in colors[1].tolist()] == [PAPER, DARKEST, PAPER]
    assert {tuple(c) for c in colors[2].tolist()} == {NO_TRUTH}


def test_cells_have_row_percentages_and_names_are_outside():
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
def test_a_confusion_picture_has_a_limited_size_for_any_number_of_classes(k):
    picture = confusion_picture(np.eye(k, dtype=np.int64), ["a very long class name " * 5] * k)
    assert picture.shape[2] == 3
    assert max(picture.shape) <= 1800


def test_a_confusion_picture_of_many_classes_has_no_names():
    many = np.eye(100, dtype=np.int64)
    np.testing.assert_array_equal(confusion_picture(many, ["a"] * 100), confusion_picture(many, ["long name"] * 100))


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.complex64, np.bool_])
def test_label_maps_that_are_no_integers_are_refused(kind):
    image, truth = _scene()
    for pair in ((truth.astype(kind), truth), (truth, truth.astype(kind))):
        for draw in (error_map, lambda *a: panel(*a, PALETTE, NAMES)):
            with pytest.raises(UserError, match=r"(truth|prediction) holds \w+; expected integers"):
                draw(image, *pair)
