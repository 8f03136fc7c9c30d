"""Open image files with Pillow: the limit of pixels, what a file stores, and one error for all damage."""

import io
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from early_fusion_seg.errors import MissingFileError, UserError

# Errors that Pillow raises for damaged files; they depend on the format and on the place of the damage.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    IndexError,
    TypeError,
    KeyError,
    OverflowError,
    struct.error,
    zlib.error,
)
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif"}
PILLOW_LIMIT = 1024**3 // 4 // 3  # Pillow's default of MAX_IMAGE_PIXELS: it warns above, and refuses twice as much
MAX_PIXELS = 500_000_000
LIMIT_VARIABLE = "EARLY_FUSION_SEG_MAX_PIXELS"  # environment variable that replaces MAX_PIXELS
PNG_METADATA = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # chunks that may hold an orientation


class Openable(Protocol):
    """A file that is not on disk by itself, such as a member of a zip file; `str` returns its name."""

    def open(self, mode: str, /) -> BinaryIO:
        """Open the file; `mode` is "rb"."""


def open_file(path: str | Path | Openable) -> BinaryIO:
    """Open a file for reading bytes.

    Raises:
        MissingFileError: The file does not exist.
        UserError: The file cannot be opened.
    """
    path = Path(path) if isinstance(path, str) else path
    try:
        if isinstance(path, Path) and not path.is_file():
            raise _no_file_error(path)
        return path.open("rb")
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None


def _no_file_error(path: Path) -> UserError:
    """Return the error for a path that is no file."""
    if path.is_dir():
        try:
            os.scandir(path).close()
        except OSError as error:
            return UserError(f"the folder {path} cannot be read ({error.strerror or error})")
        return UserError(f"{path} is a folder; expected an image file")
    if path.is_symlink():
        return MissingFileError(f"{path} is a link to {path.readlink()}, which does not exist")
    return MissingFileError(f"there is no file {path}")


def without_image_suffix(name: str) -> str:
    """Return a path without the suffix, if this is one of images.

    Example:
        >>> without_image_suffix("a/b.JPG"), without_image_suffix("a.jpg/b.2")
        ('a/b', 'a.jpg/b.2')
    """
    stem, _, suffix = name.rpartition(".")
    return stem if f".{suffix.lower()}" in IMAGE_SUFFIXES and stem.rpartition("/")[2] else name


def is_image(path: str | Path | Openable) -> bool:
    """Return whether a file is an image by its content, whatever its name; it may be damaged.

    Raises:
        UserError: The file is missing or cannot be opened.
    """
    _pixel_limit()
    with open_file(path) as file:
        try:
            Image.open(file).close()
        except UnidentifiedImageError:
            return False
        except (*DECODE_ERRORS, Image.DecompressionBombError):
            return True
    return True


@contextmanager
def open_image(path: str | Path | Openable, content: bytes) -> Iterator[Image.Image]:
    """Open an image with Pillow; whatever Pillow raises inside of the block becomes a UserError.

    Args:
        path: Name of the file, for messages.
        content: Bytes of the file.
    """
    limit = _pixel_limit()
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.width * image.height > limit:
                raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
            yield image
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(f"{path} is not an image that can be read") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(
            f"{path} is larger than {limit / 1e6:g} megapixels, the limit against files that fill memory ({error}). "
            f"Set the environment variable {LIMIT_VARIABLE} to a number of pixels, or cut the image into tiles."
        ) from None
    except DECODE_ERRORS as error:
        raise UserError(f"{path} is damaged or cannot be read as an image ({error})") from None


def _pixel_limit() -> int:
    """Return the number of pixels above which no image is read, and raise Pillow's limit to it."""
    text = os.environ.get(LIMIT_VARIABLE, str(MAX_PIXELS))
    if not text.isdecimal():
        raise UserError(f"{LIMIT_VARIABLE} is '{text}'; expected a number of pixels, such as 1000000000")
    if Image.MAX_IMAGE_PIXELS == PILLOW_LIMIT:  # the user has not set another one
        Image.MAX_IMAGE_PIXELS = max(int(text), PILLOW_LIMIT)
    return int(text)


def orientation_of(image: Image.Image, content: bytes) -> int:
    """Return the orientation as Pillow's `exif_transpose` finds it, in EXIF or else in XMP: 1 (upright) to 8.

    Args:
        image: The opened image; a PNG with such metadata is decoded.
        content: Bytes of the file.
    """
    if image.format == "PNG" and not any(name in content for name in PNG_METADATA):
        return 1  # getexif() would decode the image, since the metadata may follow the pixels
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return int(orientation) if orientation in range(2, 9) else 1


def raw_mode_of(image: Image.Image) -> str:
    """Return how the pixels of an opened file are stored, such as "L;4" for gray of 4 bits; empty after decoding."""
    if not isinstance(image, ImageFile.ImageFile) or not image.tile:
        return ""
    args = image.tile[0].args
    return str(args[0] if isinstance(args, tuple) and args else args)
