from pathlib import Path

import pytest

from early_fusion_seg.data.image_paths import images_to_predict
from early_fusion_seg.errors import MissingFileError, UserError
from early_fusion_seg.io.images import OUTPUT_MARK


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("a.jpg", "b.png", "b.json", ".c.jpg", "deep/er/a.jpg", "deep/d.JPG", "out/masks/e.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "photos/out/masks" / OUTPUT_MARK).touch()
    monkeypatch.chdir(tmp_path)
    return Path("photos")


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("photos", ["a.jpg", "b.png", "deep/d.JPG", "deep/er/a.jpg"]),
        ("photos/a.jpg", ["a.jpg"]),
        ("photos/*.jpg", ["a.jpg"]),
        ("photos/?.*", ["a.jpg", "b.png"]),
        ("*/[ab].jpg", ["a.jpg"]),
        ("photos/**/*.jpg", ["a.jpg", "deep/er/a.jpg"]),
        ("**/*.png", ["b.png"]),  # not what predict wrote
        ("photos/out/masks/*.png", ["e.png"]),  # unless it is asked for
        ("photos/deep/**/a*", ["a.jpg"]),
    ],
)
def test_a_folder_a_file_and_a_pattern_give_images(place: str, expected: list[str], photos: Path) -> None:
    found = images_to_predict(Path(place))
    assert list(found) == expected
    for key, path in found.items():
        assert path.is_file()
        assert path.as_posix().endswith(key)


def test_a_text_file_gives_the_images_that_it_lists(photos: Path) -> None:
    listed = ["deep/er/../er/a.jpg", "", "  b.png ", str((photos / "a.jpg").resolve()), "b.png", "gone.png"]
    (photos / "list.TXT").write_bytes("\r\n".join(["\ufeffdeep/d.JPG", *listed]).encode())
    found = images_to_predict(photos / "list.TXT")
    assert list(found) == ["a.jpg", "b.png", "deep/d.JPG", "deep/er/a.jpg", "gone.png"]  # gone: reading it is an error
    assert found["deep/er/a.jpg"].samefile(photos / "deep/er/a.jpg")
    (photos / "list.TXT").write_text("deep/er/a.jpg\ndeep/d.JPG\n")
    assert list(images_to_predict(photos / "list.TXT")) == ["d.JPG", "er/a.jpg"]


def test_a_file_whose_name_looks_like_a_pattern_is_itself(photos: Path) -> None:
    (photos / "[a].jpg").touch()
    assert list(images_to_predict(photos / "[a].jpg")) == ["[a].jpg"]


@pytest.mark.parametrize(
    ("place", "error", "message"),
    [
        ("https://a.b/c.jpg", UserError, r"https://a\.b/c\.jpg is a web address; download"),
        ("rtsp://camera/1", UserError, "rtsp://camera/1 is a web address"),
        (
            "clips/a.MP4",
            UserError,
            r"a\.MP4 is a video; extract its frames, such as with `ffmpeg -i a\.MP4 frames/%06d",
        ),
        (
            "photos/*.bmp",
            MissingFileError,
            r"there are no images at photos/\*\.bmp; expected a folder of images, an im",
        ),
        ("nowhere", MissingFileError, "there are no images at nowhere"),
        ("empty.txt", UserError, r"empty\.txt is empty; expected one path of an image per line"),
    ],
)
def test_other_places_are_refused(place: str, error: type[UserError], message: str, photos: Path) -> None:
    Path("empty.txt").write_text("\n \n")
    with pytest.raises(error, match=message):
        images_to_predict(Path(place))
