"""Read images and masks as the files mean them, and write masks that any viewer shows in color."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile

from early_fusion_seg.errors import MissingFileError, UserError

Picture = np.ndarray | Image.Image | Path | str
"""One image: a path, a PIL image, or an array (h, w, 3) or (h, w), uint8 in 0..255 or floats in 0..1."""

# What Pillow raises on damaged files, by format and place of the damage.
DAMAGE = (OSError, SyntaxError, ValueError, IndexError, TypeError, KeyError, OverflowError, struct.error, zlib.error)
DEEP_GRAY = ("I;16", "I;16B", "I;16L", "I;16N")
SMALLEST_REDUCED = 64  # pixels
REDUCED = {  # OpenCV's flags; its REDUCED_COLOR ones would give BGR, and exclude IMREAD_COLOR_RGB
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
PNG_EXIF = (b"eXIf", b"Raw profile type exif")
WHOLE = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}  # how a file of each format ends
GRAY_STEP = {"L;2": 85, "L;4": 17}  # Pillow stretches gray levels of 2 and 4 bits to 0..255

Prepared = TypeVar("Prepared")


class Openable(Protocol):
    """A file that is not on disk by itself, such as a member of a zip file; as text it is its name."""

    def open(self, mode: str, /) -> BinaryIO:
        """Open it; `mode` is "rb"."""


def read_image(path: str | Path | Openable, reduction: int = 1) -> NDArray[np.uint8]:
    """Read an image as it is meant to be seen.

    The orientation tag is applied; gray, palette, CMYK and other modes become RGB, 16 bits become 8, transparency is
    dropped, and of several frames the first is taken.

    Args:
        path: A file of any format that Pillow reads.
        reduction: 2, 4 or 8: decode a JPEG at a fraction of its size, which takes a fraction of the time. Other formats
            and images below 64 pixels keep their size.

    Returns:
        RGB pixels, uint8 of shape (h, w, 3); reduced, of shape (ceil(h / reduction), ceil(w / reduction), 3).

    Raises:
        MissingFileError: There is no such file.
        UserError: It is not an image, is damaged, or has 32-bit levels, which have no agreed range.
    """
    content = _read(path)
    pixels = _decode_fast(content, reduction)
    return np.array(_decode(path, content, _as_seen, reduction)[0]) if pixels is None else pixels


def open_file(path: str | Path | Openable) -> BinaryIO:
    """Open a file for reading bytes.

    Raises:
        MissingFileError: There is no such file.
        UserError: It cannot be opened.
    """
    path = Path(path) if isinstance(path, str) else path
    if isinstance(path, Path) and not path.is_file():
        raise MissingFileError(f"there is no file {path}")
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error})") from None


def image_size(path: str | Path | Openable) -> tuple[int, int]:
    """Return width and height of an image as stored, from its header.

    Raises:
        UserError: It is missing or no image.
    """
    try:
        with open_file(path) as file, Image.open(file) as image:
            return image.size
    except UnidentifiedImageError:
        raise UserError(f"{path} is not an image that can be read") from None


def size_text(pixels: NDArray[Any]) -> str:
    """Return the size of an image or mask (h, w, ...) for a message, width first: "640x480"."""
    return f"{pixels.shape[1]}x{pixels.shape[0]}"


def to_rgb_array(image: Image.Image | NDArray[Any]) -> NDArray[Any]:
    """Turn an image in memory into RGB pixels, as `read_image` does with files.

    Args:
        image: A PIL image, turned as its EXIF tag says, or an array (h, w, 3) or (h, w), uint8 or floats in 0..1.

    Returns:
        (h, w, 3), uint8 or the array's floats.

    Raises:
        UserError: Another shape or mode.
    """
    if isinstance(image, Image.Image):
        try:
            return np.array(_as_seen(image))
        except ValueError as error:
            raise UserError(f"the image cannot be used ({error})") from None
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    if image.ndim != 3 or image.shape[2] != 3:
        raise UserError(f"the array has the shape {image.shape}; expected (h, w, 3) RGB or (h, w) gray")
    return image


def read_mask(path: str | Path | Openable) -> NDArray[Any]:
    """Read the numbers stored in a mask file, without any conversion.

    Args:
        path: A single-channel file, as a rule a PNG: gray (1 to 16 bits) or indexed (its colors do not matter).

    Returns:
        The numbers, integers of shape (h, w); they may be read-only.

    Raises:
        MissingFileError: There is no such file.
        UserError: It is not an image, is damaged, or has colors where numbers were expected.
    """
    (mode, values), raw_mode = _decode(path, _read(path), lambda image: (image.mode, np.asarray(image)))
    if mode not in ("1", "L", "P", "I", *DEEP_GRAY):
        raise UserError(
            f"{path} has the mode {mode}; a mask must be gray or indexed, each pixel the number of its class. "
            "A mask in colors must be converted first."
        )
    if mode == "1":
        return values.astype(np.uint8)
    return values // GRAY_STEP[raw_mode] if raw_mode in GRAY_STEP else values


def write_indexed_png(path: str | Path, labels: NDArray[np.uint8], palette: Any) -> None:
    """Write labels as an indexed PNG: the numbers are kept, and viewers show the palette's colors.

    Args:
        path: The file; its folder is made where needed.
        labels: Class numbers, uint8 of shape (h, w).
        palette: RGB colors (0..255) of classes 0, 1, ...; others, such as 255, are black.

    Raises:
        UserError: The labels are not uint8 of shape (h, w).
    """
    if labels.dtype != np.uint8 or labels.ndim != 2:
        raise UserError(f"labels are {labels.dtype} of shape {labels.shape}; expected uint8 of shape (h, w)")
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(palette)] = palette
    image = Image.fromarray(labels)
    image.putpalette(colors.tobytes())
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format="PNG")


def _as_seen(image: Image.Image) -> Image.Image:
    """Turn an image upright and into RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise ValueError("gray levels of 32 bits have no agreed range; save it with 8 or 16")
    if image.mode in DEEP_GRAY:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # straight to RGB, Pillow warns about some transparent palettes
    return image.convert("RGB")


def _read(path: str | Path | Openable) -> bytes:
    """Read a file whole."""
    with open_file(path) as file:
        return file.read()


def _decode_fast(content: bytes, reduction: int) -> NDArray[np.uint8] | None:
    """Decode a plain JPEG or PNG with OpenCV, to the same pixels and faster than Pillow.

    Returns:
        None for anything else: other formats and modes, images to be turned, and files that do not end as they should,
        which OpenCV would fill with gray.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            kind, size = image.format, image.size
            plain = image.mode in ("RGB", "L") and "transparency" not in image.info and kind in WHOLE
            plain = plain and (kind == "JPEG" or image.tile[0].args in ("RGB", "L"))  # no PNG of 2, 4 or 16 bits
            if kind == "JPEG":
                upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
            else:  # a PNG's would decode the whole image
                upright = not any(tag in content for tag in PNG_EXIF)
    except (*DAMAGE, UnidentifiedImageError, Image.DecompressionBombError):  # whoever reads it whole says what is wrong
        return None
    if not plain or not upright or not content.endswith(WHOLE[str(kind)]):
        return None
    flags = REDUCED[reduction if kind == "JPEG" and min(size) >= SMALLEST_REDUCED else 1]
    flags |= cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    return None if pixels is None else np.asarray(pixels, np.uint8)


def _decode(
    path: str | Path | Openable,
    content: bytes,
    prepare: Callable[[Image.Image], Prepared],
    reduction: int = 1,
) -> tuple[Prepared, str]:
    """Decode a file whole with Pillow, so that damage shows here.

    Returns:
        What `prepare` makes of it, and how a PNG stores its pixels ("L;4": gray of 4 bits), which Pillow then forgets.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            raw_mode = str(image.tile[0].args) if isinstance(image, PngImageFile) else ""
            if reduction > 1 and min(image.size) >= SMALLEST_REDUCED:
                image.draft(None, (image.width // reduction, image.height // reduction))
            image.load()
            return prepare(image), raw_mode
    except UnidentifiedImageError:
        raise UserError(f"{path} is not an image that can be read") from None
    except (*DAMAGE, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is damaged or cannot be read as an image ({error})") from None
