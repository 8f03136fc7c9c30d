import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from early_fusion_seg.errors import MissingFileError, UserError
from early_fusion_seg.io.image_files import LIMIT_VARIABLE, PILLOW_LIMIT
from early_fusion_seg.io.images import image_size, read_image, read_mask, to_rgb_array, write_indexed_png

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (11, 14, 3), np.uint8)
GRAY = RNG.integers(0, 256, (11, 14), np.uint8)
# a smooth image, which JPEG changes little
SMOOTH = np.stack([np.add.outer(np.arange(24) * 4, np.arange(40) * 3)] * 3, -1).astype(np.uint8)


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "bmp"])
def test_lossless_formats_are_read_exactly(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(RGB).save(path, **({"lossless": True} if suffix == "webp" else {}))
    image = read_image(path)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, RGB)
    image[0, 0] = 0  # the array is writable


def test_jpeg_is_read_within_its_compression_error(tmp_path: Path) -> None:
    Image.fromarray(SMOOTH).save(tmp_path / "a.jpg", quality=95)
    assert np.abs(read_image(tmp_path / "a.jpg").astype(int) - SMOOTH).max() <= 8


def test_gray_modes_are_converted_to_rgb(tmp_path: Path) -> None:
    gray = np.repeat(GRAY[..., None], 3, -1)
    alpha = np.full_like(GRAY, 7)
    deep = GRAY.astype(np.uint16) * 256 + 99
    stored = {
        "l.png": Image.fromarray(GRAY),
        "la.png": Image.fromarray(np.dstack([GRAY, alpha])),
        "i16.png": Image.fromarray(deep),
        "i16.tif": Image.fromarray(deep),
    }
    for name, image in stored.items():
        image.save(tmp_path / name)
        np.testing.assert_array_equal(read_image(tmp_path / name), gray, err_msg=name)
    Image.fromarray(GRAY > 127).save(tmp_path / "1.png")
    np.testing.assert_array_equal(read_image(tmp_path / "1.png"), np.where(gray > 127, 255, 0))


def test_16_bit_color_is_converted_to_8_bit(tmp_path: Path) -> None:
    scanlines = b"".join(b"\0" + (row.astype(np.uint16) * 256 + 99).astype(">u2").tobytes() for row in RGB)
    write_png(tmp_path / "a.png", RGB.shape[1], RGB.shape[0], bits=16, kind=2, scanlines=scanlines)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), RGB)


def test_transparency_is_dropped(tmp_path: Path) -> None:
    rgba = np.dstack([RGB, GRAY])
    for name in ("a.png", "a.tif"):
        Image.fromarray(rgba).save(tmp_path / name)
        np.testing.assert_array_equal(read_image(tmp_path / name), RGB, err_msg=name)


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(16))])
def test_palette_images_are_converted_to_rgb(tmp_path: Path, transparency: int | bytes | None) -> None:
    indices, colors = GRAY % 16, RNG.integers(0, 256, (16, 3), np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(colors.tobytes())
    image.save(tmp_path / "a.png", **({} if transparency is None else {"transparency": transparency}))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), colors[indices])


def test_cmyk_is_converted_to_rgb(tmp_path: Path) -> None:
    cmyk = RNG.integers(0, 256, (11, 14, 4), np.uint8)
    Image.fromarray(cmyk, mode="CMYK").save(tmp_path / "a.tif")
    expected = (255.0 - cmyk[..., :3]) * (255.0 - cmyk[..., 3:]) / 255
    assert np.abs(read_image(tmp_path / "a.tif") - expected).max() <= 1


ORIENTATIONS = {  # what a viewer does with the stored pixels
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: np.swapaxes(a, 0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(np.swapaxes(a, 0, 1), 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("tag", ORIENTATIONS)
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_orientation_tag_is_applied(tmp_path: Path, tag: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[274] = tag
    Image.fromarray(SMOOTH).save(tmp_path / f"a.{suffix}", exif=exif)
    image, shown = read_image(tmp_path / f"a.{suffix}"), ORIENTATIONS[tag](SMOOTH)
    assert image.shape == shown.shape
    assert np.abs(image.astype(int) - shown).max() <= 12


XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description {}</rdf:RDF></x:xmpmeta>'
METADATA = {  # how a PNG may store orientation 6
    "exif": lambda text: None,
    "xmp attribute": lambda text: text.add_itxt("XML:com.adobe.xmp", XMP.format('tiff:Orientation="6"/>')),
    "compressed xmp": lambda text: text.add_itxt("XML:com.adobe.xmp", XMP.format('tiff:Orientation="6"/>'), zip=True),
    "xmp element": lambda text: text.add_itxt(
        "XML:com.adobe.xmp", XMP.format("><tiff:Orientation>6</tiff:Orientation></rdf:Description>")
    ),
    "ImageMagick's profile": lambda text: text.add_text("Raw profile type exif", f"\nexif\n 26\n{exif(6).hex()}\n"),
}


def exif(orientation: int) -> bytes:
    data = Image.Exif()
    data[274] = orientation
    return data.tobytes()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "I;16"])
@pytest.mark.parametrize("metadata", METADATA)
def test_orientation_of_a_png_is_applied_wherever_it_is_stored(tmp_path: Path, metadata: str, mode: str) -> None:
    path, text = tmp_path / "a.png", PngInfo()
    METADATA[metadata](text)
    image = Image.fromarray(GRAY.astype(np.uint16) * 256) if mode == "I;16" else Image.fromarray(SMOOTH).convert(mode)
    image.save(path, pnginfo=text, **({"exif": exif(6)} if metadata == "exif" else {}))
    with Image.open(path) as opened:
        expected = ImageOps.exif_transpose(opened)
        assert expected.size == image.size[::-1]
    if mode != "I;16":
        np.testing.assert_array_equal(read_image(path), expected.convert("RGB"))
    assert read_image(path).shape[:2] == (expected.height, expected.width)
    assert image_size(path) == expected.size


@pytest.mark.parametrize("suffix", ["jpg", "webp", "tif", "png"])
@pytest.mark.parametrize("tag", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_image_size_is_that_of_the_image_as_read(tmp_path: Path, suffix: str, tag: int) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(SMOOTH).save(path, exif=exif(tag))
    height, width = read_image(path).shape[:2]
    assert image_size(path) == (width, height)
    assert (width < height) == (tag in (5, 6, 7, 8))


def test_xmp_orientation_counts_in_the_size_of_other_formats(tmp_path: Path) -> None:
    xmp = XMP.format('tiff:Orientation="8"/>').encode()
    for suffix, options in {"jpg": {"xmp": xmp}, "webp": {"xmp": xmp}, "tif": {"tiffinfo": {700: xmp}}}.items():
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(SMOOTH).save(path, **options)
        assert read_image(path).shape == (40, 24, 3), suffix
        assert image_size(path) == (24, 40), suffix


def test_first_frame_is_read(tmp_path: Path) -> None:
    frames = [Image.fromarray(SMOOTH), Image.fromarray(255 - SMOOTH)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), SMOOTH)


@pytest.mark.parametrize("reader", [read_image, read_mask])
def test_error_names_the_missing_file(tmp_path: Path, reader) -> None:
    with pytest.raises(MissingFileError, match=r"nowhere\.png"):
        reader(tmp_path / "nowhere.png")


@pytest.mark.parametrize("reader", [read_image, read_mask])
def test_text_with_an_image_suffix_is_refused(tmp_path: Path, reader) -> None:
    (tmp_path / "a.png").write_text("not an image")
    with pytest.raises(UserError, match=r"a\.png is not an image"):
        reader(tmp_path / "a.png")


@pytest.mark.filterwarnings("ignore:Truncated File Read")  # Pillow warns about a TIFF before it raises
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "gif"])
def test_truncated_file_is_refused_at_any_length(tmp_path: Path, suffix: str) -> None:
    noise = RNG.integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / f"whole.{suffix}")
    whole = (tmp_path / f"whole.{suffix}").read_bytes()
    for share in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9):
        (tmp_path / f"a.{suffix}").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(UserError, match=rf"a\.{suffix} is "):
            read_image(tmp_path / f"a.{suffix}")


def test_flipped_bytes_give_an_image_or_a_user_error(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    refused = 0
    for position in range(8, len(whole)):
        broken = bytearray(whole)
        broken[position] ^= 0x5A
        (tmp_path / "a.png").write_bytes(broken)
        try:
            read_image(tmp_path / "a.png")
        except UserError:
            refused += 1
    assert refused > 100


def test_gray_levels_of_32_bits_are_refused(tmp_path: Path) -> None:
    for dtype in (np.int32, np.float32):
        Image.fromarray(GRAY.astype(dtype)).save(tmp_path / "a.tif")
        with pytest.raises(UserError, match=r"a\.tif .*gray levels of 32 bits"):
            read_image(tmp_path / "a.tif")


def test_images_in_memory_are_converted_like_files(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(SMOOTH).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(to_rgb_array(image), read_image(tmp_path / "a.png"))
    np.testing.assert_array_equal(to_rgb_array(RGB), RGB)
    np.testing.assert_array_equal(to_rgb_array(GRAY / 255.0), np.dstack([GRAY / 255.0] * 3))


def test_images_in_memory_of_other_shapes_and_modes_are_refused() -> None:
    with pytest.raises(UserError, match=r"shape \(11, 14, 4\)"):
        to_rgb_array(np.dstack([RGB, GRAY]))
    with pytest.raises(UserError, match="32 bits"):
        to_rgb_array(Image.fromarray(GRAY.astype(np.float32)))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, bool])
def test_mask_numbers_are_kept(tmp_path: Path, dtype: type) -> None:
    numbers = RNG.integers(0, 2 if dtype is bool else min(np.iinfo(dtype).max, 70000), (9, 7)).astype(dtype)
    name = "a.tif" if dtype is np.int32 else "a.png"
    Image.fromarray(numbers).save(tmp_path / name)
    mask = read_mask(tmp_path / name)
    assert np.issubdtype(mask.dtype, np.integer)
    np.testing.assert_array_equal(mask, numbers)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("kind", [0, 3])
@pytest.mark.parametrize("upright", [False, True])  # with an EXIF orientation of 1
def test_mask_numbers_of_few_bits_are_kept(tmp_path: Path, bits: int, kind: int, upright: bool) -> None:
    numbers = RNG.integers(0, 2**bits, (5, 8), np.uint8)
    shifts = np.arange(8 - bits, -1, -bits)
    packed = (numbers.reshape(5, -1, 8 // bits) << shifts.astype(np.uint8)).sum(-1).astype(np.uint8)
    scanlines = b"".join(b"\0" + row.tobytes() for row in packed)
    metadata = exif(1) if upright else None
    write_png(tmp_path / "a.png", 8, 5, bits=bits, kind=kind, scanlines=scanlines, metadata=metadata)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), numbers)


@pytest.mark.parametrize("bits", [2, 4])
def test_mask_numbers_of_few_bits_in_a_tiff_are_kept(tmp_path: Path, bits: int) -> None:
    numbers = RNG.integers(0, 2**bits, (5, 8), np.uint8)
    shifts = np.arange(8 - bits, -1, -bits).astype(np.uint8)
    packed = (numbers.reshape(5, -1, 8 // bits) << shifts).sum(-1).astype(np.uint8).tobytes()
    entries = {256: 8, 257: 5, 258: bits, 259: 1, 262: 1, 273: 122, 277: 1, 278: 5, 279: len(packed)}
    header = b"II*\0" + struct.pack("<IH", 8, len(entries))
    header += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items()) + bytes(4)
    (tmp_path / "a.tif").write_bytes(header + packed)
    assert len(header) == 122
    np.testing.assert_array_equal(read_mask(tmp_path / "a.tif"), numbers)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_mask_with_an_orientation_is_refused_unless_it_is_upright(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    for tag in range(10):
        Image.fromarray(GRAY).save(path, exif=exif(tag))
        if tag in range(2, 9):
            with pytest.raises(UserError, match=rf"a\.{suffix} has the orientation tag {tag}.*save it without the tag"):
                read_mask(path)
        else:
            np.testing.assert_array_equal(read_mask(path), GRAY)


def test_mask_with_an_orientation_in_xmp_is_refused(tmp_path: Path) -> None:
    text = PngInfo()
    text.add_itxt("XML:com.adobe.xmp", XMP.format('tiff:Orientation="3"/>'))
    Image.fromarray(GRAY).save(tmp_path / "a.png", pnginfo=text)
    with pytest.raises(UserError, match="orientation tag 3"):
        read_mask(tmp_path / "a.png")


LOSSY = [("JPEG", {}), ("WEBP", {}), ("JPEG2000", {}), ("GIF", {}), ("TIFF", {"compression": "jpeg"})]


@pytest.mark.parametrize(("kind", "options"), LOSSY)
def test_mask_in_a_lossy_format_is_refused_whatever_its_name(tmp_path: Path, kind: str, options: dict) -> None:
    Image.fromarray(GRAY % 2).save(tmp_path / "a.png", format=kind, **options)
    with pytest.raises(UserError, match=rf"a\.png is a {kind} file.*may change the numbers.*Save masks as PNG"):
        read_mask(tmp_path / "a.png")


def test_mask_in_lossless_webp_is_read(tmp_path: Path) -> None:
    Image.fromarray(np.dstack([GRAY] * 3)).save(tmp_path / "a.png", format="WEBP", lossless=True)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), GRAY)


@pytest.mark.parametrize("kind", ["TIFF", "BMP", "PPM", "TGA", "PCX"])
def test_mask_in_a_lossless_format_is_read(tmp_path: Path, kind: str) -> None:
    Image.fromarray(GRAY).save(tmp_path / "a.png", format=kind)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), GRAY)


@pytest.mark.parametrize("alpha", [None, 255, 0])
@pytest.mark.parametrize("channels", [1, 3])
def test_equal_channels_and_constant_alpha_of_a_mask_are_dropped(
    tmp_path: Path, channels: int, alpha: int | None
) -> None:
    layers = [GRAY] * channels + ([] if alpha is None else [np.full_like(GRAY, alpha)])
    for suffix in ("png", "tif"):
        Image.fromarray(np.dstack(layers).squeeze()).save(tmp_path / f"a.{suffix}")
        np.testing.assert_array_equal(read_mask(tmp_path / f"a.{suffix}"), GRAY)


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (RGB, "is in colors; expected one channel"),
        (np.dstack([RGB, np.full_like(GRAY, 255)]), "is in colors; expected one channel"),
        (np.dstack([GRAY, GRAY]), "has transparent pixels"),
        (np.dstack([GRAY, GRAY, GRAY, GRAY]), "has transparent pixels"),
        (GRAY.astype(np.float32), "has the mode F; expected a gray or indexed image"),
    ],
)
def test_mask_without_clear_numbers_is_refused(tmp_path: Path, pixels: np.ndarray, reason: str) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=rf"a\.tif {reason}"):
        read_mask(tmp_path / "a.tif")


def test_mask_with_channels_of_16_bits_is_refused(tmp_path: Path) -> None:  # Pillow would read their upper 8 bits
    for channels, kind in ((3, 2), (2, 4), (4, 6)):
        scanlines = (b"\0" + bytes([0, 1] * channels * 4)) * 3
        write_png(tmp_path / "a.png", 4, 3, bits=16, kind=kind, scanlines=scanlines)
        with pytest.raises(UserError, match=r"a\.png has \d channels of 16 bits"):
            read_mask(tmp_path / "a.png")


def test_indexed_png_stores_labels_and_shows_colors(tmp_path: Path) -> None:
    labels = GRAY % 4
    labels[0, 0] = 255
    palette = [[128, 64, 0], [0, 255, 0], [1, 2, 3], [9, 9, 9]]
    write_indexed_png(tmp_path / "deep" / "a.png", labels, palette)
    np.testing.assert_array_equal(read_mask(tmp_path / "deep" / "a.png"), labels)
    expected = np.array([*palette, *[[0, 0, 0]] * 252], np.uint8)[labels]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "deep" / "a.png").convert("RGB")), expected)


@pytest.mark.parametrize("labels", [GRAY.astype(np.int64), RGB])
def test_indexed_png_refuses_other_arrays(tmp_path: Path, labels: np.ndarray) -> None:
    with pytest.raises(UserError, match="expected uint8 of shape"):
        write_indexed_png(tmp_path / "a.png", labels, [[0, 0, 0]])


def write_png(
    path: Path, width: int, height: int, bits: int, kind: int, scanlines: bytes, metadata: bytes | None = None
) -> None:
    """Write a PNG of a kind that Pillow can read but not write; kind 0 is gray, 2 is RGB, 3 is indexed."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    palette = chunk(b"PLTE", bytes(range(3 * 2**bits))) if kind == 3 else b""
    data = chunk(b"IDAT", zlib.compress(scanlines))
    extra = chunk(b"eXIf", metadata.removeprefix(b"Exif\0\0")) if metadata else b""
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + palette + data + extra + chunk(b"IEND", b""))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_opencv_and_pillow_agree_on_intact_and_damaged_files(tmp_path: Path, mode: str, suffix: str) -> None:
    rng = np.random.default_rng(0)
    smooth = np.add.outer(np.arange(40), np.arange(56)).astype(np.uint8) + rng.integers(0, 9, (40, 56), np.uint8)
    image = Image.fromarray(smooth if mode == "L" else np.stack([smooth, smooth // 2, 255 - smooth], -1))
    path = tmp_path / f"a.{suffix}"
    image.save(path)
    whole = path.read_bytes()
    np.testing.assert_array_equal(read_image(path), Image.open(path).convert("RGB"))
    refused = 0
    for place in rng.integers(0, len(whole), 150):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            with Image.open(path) as opened:
                expected = np.array(ImageOps.exif_transpose(opened).convert("RGB"))
        except (OSError, SyntaxError, ValueError, KeyError, struct.error, zlib.error):
            with pytest.raises(UserError):
                read_image(path)
            refused += 1
        else:
            np.testing.assert_array_equal(read_image(path), expected)
    assert refused > (5 if suffix == "jpg" else 60)


def test_rotated_jpeg_is_reduced(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    pixels = np.add.outer(np.arange(100), np.arange(140)).astype(np.uint8).repeat(3).reshape(100, 140, 3)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=98)
    small = read_image(tmp_path / "a.jpg", 2)
    assert small.shape == (70, 50, 3)
    whole = read_image(tmp_path / "a.jpg")
    assert np.abs(whole.reshape(70, 2, 50, 2, 3).mean((1, 3)) - small).mean() < 1.5


@pytest.fixture
def _pillow_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start with Pillow's own limit, and restore it."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", PILLOW_LIMIT)
    monkeypatch.delenv(LIMIT_VARIABLE, raising=False)


def test_pillow_limit_is_known() -> None:
    code = "from PIL import Image; print(Image.MAX_IMAGE_PIXELS)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == PILLOW_LIMIT


@pytest.mark.usefixtures("_pillow_limit")
def test_images_above_the_limit_of_pillow_are_read_without_a_warning(tmp_path: Path) -> None:
    rows = 12_000  # 96 and 192 megapixels: Pillow would warn of the first, and refuse the second
    for width in (8_000, 16_000):
        scanlines = (b"\0" + bytes(width // 8)) * rows
        write_png(tmp_path / "a.png", width, rows, bits=1, kind=0, scanlines=scanlines)
        assert read_mask(tmp_path / "a.png").shape == (rows, width)
    assert image_size(tmp_path / "a.png") == (16_000, rows)


@pytest.mark.usefixtures("_pillow_limit")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("reader", [read_image, read_mask, image_size])
@pytest.mark.parametrize("width", [30_000, 90_000])
def test_error_of_the_limit_says_how_to_raise_it(tmp_path: Path, reader, width: int) -> None:
    write_png(tmp_path / "a.png", width, 20_000, bits=8, kind=0, scanlines=b"")
    with pytest.raises(UserError, match=r"a\.png is larger than 500 megapixels.* EARLY_FUSION_SEG_MAX_PIXELS"):
        reader(tmp_path / "a.png")


@pytest.mark.usefixtures("_pillow_limit")
def test_the_limit_is_set_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(GRAY).save(tmp_path / "a.png")  # 154 pixels
    for text in ("153", "154"):
        monkeypatch.setenv(LIMIT_VARIABLE, text)
        if text == "153":
            with pytest.raises(UserError, match=r"larger than 0\.000153 megapixels"):
                read_image(tmp_path / "a.png")
        else:
            read_image(tmp_path / "a.png")
    monkeypatch.setenv(LIMIT_VARIABLE, "1e9")
    with pytest.raises(UserError, match="EARLY_FUSION_SEG_MAX_PIXELS is '1e9'; expected a number of pixels"):
        read_image(tmp_path / "a.png")


def test_only_the_start_of_a_large_file_that_is_no_image_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("early_fusion_seg.io.images.LARGE_FILE", 2**16)
    with (tmp_path / "film.mp4").open("wb") as file:
        file.truncate(10**12)  # more than the memory; takes no space on the disk
    with pytest.raises(UserError, match=r"film\.mp4 is not an image that can be read"):
        read_image(tmp_path / "film.mp4")
    pixels = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 2**16
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), pixels)


def test_an_image_wider_than_the_limit_of_opencv_is_read(tmp_path: Path) -> None:
    row = np.arange(2**20 + 1, dtype=np.uint8)[None]
    Image.fromarray(row).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png")[..., 0], row)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_an_image_of_12_bits_in_16_is_not_read_nearly_black_in_silence(tmp_path: Path, suffix: str) -> None:
    ramp = np.linspace(0, 4095, 96).astype(np.uint16)[None].repeat(5, 0)
    Image.fromarray(ramp).save(tmp_path / f"a.{suffix}")
    with pytest.warns(UserWarning, match=r"holds images of 16 bits with all levels below 4096.*Multiply"):
        read_image(tmp_path / f"a.{suffix}")
    Image.fromarray(ramp * 16).save(tmp_path / f"a.{suffix}")
    assert read_image(tmp_path / f"a.{suffix}").max() == 255


def test_16_bit_color_that_is_nearly_black_is_warned_of(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", 4, 3, bits=16, kind=2, scanlines=(b"\0" + bytes([15, 255] * 3 * 4)) * 3)
    with pytest.warns(UserWarning, match="16 bits"):
        read_image(tmp_path / "a.png")


def test_image_size_is_read_from_the_header(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    assert image_size(tmp_path / "a.png") == (14, 11)
    (tmp_path / "b.png").write_text("no image")
    with pytest.raises(UserError, match=r"b\.png is not an image"):
        image_size(tmp_path / "b.png")
    with pytest.raises(MissingFileError, match=r"there is no file .*c\.png"):
        image_size(str(tmp_path / "c.png"))


def test_error_names_the_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")

    def refuse(*_: object) -> None:
        raise PermissionError("not allowed")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"a\.png cannot be read \(not allowed\)"):
        read_image(tmp_path / "a.png")
