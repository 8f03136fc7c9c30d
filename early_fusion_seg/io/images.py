"""Read images and masks, and write masks that image viewers show in color."""

import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from early_fusion_seg.errors import UserError
from early_fusion_seg.io.image_files import Openable, is_image, open_file, open_image, orientation_of, raw_mode_of
from early_fusion_seg.io.png import row_bands, write_png

Picture = np.ndarray | Image.Image | Path | str
"""One image: a path, a PIL image, or an array (h, w, 3) or (h, w), uint8 in 0..255 or floats in 0..1."""

OUTPUT_MARK = ".early_fusion_seg"
"""Name of the empty file that marks a folder of images written by this package; `predict` does not read them again."""

NEARLY_BLACK = 16  # of 256 levels; what 12 bits in 16 become
MULTI_CHANNEL_MODES = ("LA", "RGB", "RGBA")
LOSSY_FORMATS = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF", "GIF")  # some may be lossless; GIF renumbers its colors
LOSSLESS_WEBP = b"VP8L"  # name of the first chunk of the file
LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp", "tiff_sgilog", "tiff_sgilog24")  # Pillow's names of compressions
GRAY_16_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N")
LARGE_FILE = 2**26  # bytes
MIN_REDUCED_SIDE = 64  # pixels; smaller images are not reduced
REDUCTION_FLAGS = {  # OpenCV's REDUCED_COLOR flags would give BGR, and cannot be combined with IMREAD_COLOR_RGB
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
FIRST_ROTATED = 5  # the EXIF orientations 5 to 8 exchange width and height
END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}  # last bytes of a complete file
GRAY_STEP = {"L;2": 85, "L;4": 17}  # Pillow scales gray levels of 2 and 4 bits to 0..255


def read_image(path: str | Path | Openable, reduction: int = 1) -> NDArray[np.uint8]:
    """Read an image as RGB pixels, as an image viewer shows it.

    The EXIF orientation is applied. Gray, palette, CMYK and other modes are converted to RGB, 16 bits per channel to 8.
    Transparency is dropped. Of several frames the first is read.

    Args:
        path: A file of any format that Pillow reads.
        reduction: 2, 4 or 8 decodes a JPEG at 1/2, 1/4 or 1/8 of its size, in a fraction of the time. Other formats,
            and images with a side below 64 pixels, keep their size.

    Returns:
        RGB pixels, uint8 of shape (h, w, 3); reduced, of shape (ceil(h / reduction), ceil(w / reduction), 3).

    Raises:
        MissingFileError: The file does not exist.
        UserError: The file is not an image, is damaged, or has 32-bit gray levels, which have no standard range.
    """
    content = _read_bytes(path)
    with open_image(path, content) as image:
        pixels = _decode_with_opencv(image, content, reduction)
        if pixels is None:
            if reduction > 1 and min(image.size) >= MIN_REDUCED_SIDE:
                image.draft(None, (image.width // reduction, image.height // reduction))
            raw_mode = raw_mode_of(image)
            pixels = np.array(_to_upright_rgb(image))
            if _has_16_bits(raw_mode):
                _warn_if_nearly_black(path, pixels)
        return pixels


def image_size(path: str | Path | Openable) -> tuple[int, int]:
    """Return width and height of an image as `read_image` returns it, with the EXIF orientation applied.

    Only a rotated image of another format than JPEG is decoded.

    Raises:
        UserError: The file is missing, damaged or not an image.
    """
    content = _read_bytes(path)
    with open_image(path, content) as image:
        if orientation_of(image, content) < FIRST_ROTATED:
            return image.size
        if image.format == "JPEG":
            return image.height, image.width
        return ImageOps.exif_transpose(image).size  # the size of a TIFF may already be that of the upright image


def size_text(pixels: NDArray[Any]) -> str:
    """Format the size of an image or mask (h, w, ...) for a message, width first: "640x480"."""
    return f"{pixels.shape[1]}x{pixels.shape[0]}"


def to_rgb_array(image: Image.Image | NDArray[Any]) -> NDArray[Any]:
    """Convert an image in memory to RGB pixels, as `read_image` does with files.

    Args:
        image: A PIL image, whose EXIF orientation is applied, or an array (h, w, 3) or (h, w), uint8 or floats in 0..1.

    Returns:
        RGB pixels (h, w, 3): uint8, or floats if the array has floats.

    Raises:
        UserError: The image has another shape or mode.
    """
    if isinstance(image, Image.Image):
        try:
            return np.array(_to_upright_rgb(image))
        except ValueError as error:
            raise UserError(f"the image cannot be used ({error})") from None
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    if image.ndim != 3 or image.shape[2] != 3:
        raise UserError(f"the array has the shape {image.shape}; expected (h, w, 3) for RGB or (h, w) for gray")
    return image


def read_mask(path: str | Path | Openable) -> NDArray[Any]:
    """Read the numbers stored in a mask file, without any conversion.

    Args:
        path: An image in a lossless format, usually a PNG: gray (1 to 16 bits), or indexed, whose palette is ignored.
            Three equal channels of 8 bits count as one, and an alpha channel of one value is dropped.

    Returns:
        The numbers, integers of shape (h, w); the array may be read-only.

    Raises:
        MissingFileError: The file does not exist.
        UserError: The file is not an image, is damaged, is in colors, has a lossy compression or an orientation tag, or
            has channels that cannot be read as numbers.
    """
    values, _ = read_mask_pixels(path)
    if values.ndim == 2:
        return values
    if not has_equal_channels(values):
        raise UserError(
            f"{path} is in colors; expected one channel, in which each pixel is the number of its class: "
            "convert the colors to numbers"
        )
    return values[..., 0]


def read_mask_pixels(path: str | Path | Openable) -> tuple[NDArray[Any], NDArray[np.uint8] | None]:
    """Read what a mask file stores, as `read_mask` does, but also colors.

    Returns:
        The numbers (h, w), or RGB pixels (h, w, 3); and the palette of an indexed image, RGB of shape (colors, 3).
    """
    content = _read_bytes(path)
    with open_image(path, content) as image:
        raw_mode = raw_mode_of(image)
        _check_mask_file(path, image, content)
        image.load()  # raises for damaged files; np.asarray may hide it
        mode, values = image.mode, np.asarray(image)
        palette = np.array(image.getpalette(), np.uint8).reshape(-1, 3) if mode == "P" else None
    if mode in MULTI_CHANNEL_MODES:
        return _without_alpha(path, values, raw_mode), None
    if mode not in ("1", "L", "P", "I", *GRAY_16_BIT_MODES):
        raise UserError(
            f"{path} has the mode {mode}; expected a gray or indexed image, in which each pixel is the number of its "
            "class"
        )
    if mode == "1":
        return values.astype(np.uint8), None
    return values // GRAY_STEP[raw_mode] if raw_mode in GRAY_STEP else values, palette


def write_indexed_png(path: str | Path, labels: NDArray[np.uint8], palette: Any) -> None:
    """Write labels as an indexed PNG, which stores the numbers and is shown in the colors of a palette.

    Args:
        path: The file; its folder is created if needed.
        labels: Class numbers, uint8 of shape (h, w).
        palette: RGB colors (0..255) of the classes 0, 1, ...; other numbers, such as 255, are black.

    Raises:
        UserError: The labels are not uint8 of shape (h, w).
    """
    if labels.dtype != np.uint8 or labels.ndim != 2:
        raise UserError(f"labels are {labels.dtype} of shape {labels.shape}; expected uint8 of shape (h, w)")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_png(path, len(labels), (labels[rows] for rows in row_bands(*labels.shape)), palette)


def _to_upright_rgb(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation and convert to RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise ValueError("gray levels of 32 bits have no standard range; save the image with 8 or 16 bits")
    if image.mode in GRAY_16_BIT_MODES:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # Pillow warns if some transparent palettes are converted directly to RGB
    return image.convert("RGB")


def _read_bytes(path: str | Path | Openable) -> bytes:
    """Read a file; of a large one that is no image, such as a video beside photographs, only the start."""
    with open_file(path) as file:
        content = file.read(LARGE_FILE)
        if len(content) == LARGE_FILE and not is_image(path):
            raise UserError(f"{path} is not an image that can be read")
        return content + file.read()


def _check_mask_file(path: str | Path | Openable, image: Image.Image, content: bytes) -> None:
    """Refuse masks whose numbers or directions are not those that were drawn."""
    compression = str(image.info.get("compression"))
    lossy = image.format in LOSSY_FORMATS and content[12:16] != LOSSLESS_WEBP
    if lossy or compression in LOSSY_TIFF:
        kind = f"{image.format} file" + (f" with {compression} compression" if compression in LOSSY_TIFF else "")
        raise UserError(
            f"{path} is a {kind}, which may change the numbers of classes when it is saved. Save masks as PNG, from "
            "their source and not from this file."
        )
    if (orientation := orientation_of(image, content)) != 1:
        raise UserError(
            f"{path} has the orientation tag {orientation}, so it is shown in another direction than it is stored. "
            "Masks are read as stored: save it without the tag, in the direction in which the image is shown."
        )


def _without_alpha(path: str | Path | Openable, values: NDArray[Any], raw_mode: str) -> NDArray[Any]:
    """Return the gray levels (h, w) or RGB pixels (h, w, 3) of a mask with several channels (h, w, c)."""
    if _has_16_bits(raw_mode):
        raise UserError(f"{path} has {values.shape[2]} channels of 16 bits; expected one channel")
    if values.shape[2] != 3:
        values, alpha = values[..., :-1], values[..., -1]
        if alpha.min(initial=255) != alpha.max(initial=0):
            raise UserError(f"{path} has transparent pixels, whose class is unclear; save it without an alpha channel")
    return values[..., 0] if values.shape[2] == 1 else values


def has_equal_channels(pixels: NDArray[Any]) -> bool:
    """Return whether the three channels of pixels (h, w, 3) are equal."""
    return bool((pixels[..., :1] == pixels[..., 1:]).all())


def _warn_if_nearly_black(path: str | Path | Openable, pixels: NDArray[np.uint8]) -> None:
    """Warn of an image of 16 bits that uses their lower part only, such as 12 bits of a microscope; once per folder."""
    if pixels.max(initial=0) < NEARLY_BLACK:
        folder = str(path).replace("\\", "/").rpartition("/")[0] or "."
        warnings.warn(
            f"{folder} holds images of 16 bits with all levels below {256 * NEARLY_BLACK}, perhaps of 12 bits. They "
            "are read nearly black, as 16 bits become 8. Multiply the levels of all images by one factor, such as 16.",
            stacklevel=3,
        )


def _has_16_bits(raw_mode: str) -> bool:
    """Return whether each channel is stored with 16 bits; "BGR;16" has 16 in all."""
    return "16" in raw_mode and not raw_mode.startswith("BGR")


def _decode_with_opencv(image: Image.Image, content: bytes, reduction: int) -> NDArray[np.uint8] | None:
    """Decode a usual JPEG or PNG with OpenCV, which is faster than Pillow and gives the same pixels.

    Returns:
        RGB pixels (h, w, 3), or None for all other files: other formats and modes, images that must be rotated, and
        truncated files, whose missing pixels OpenCV would fill with gray.
    """
    kind, size = str(image.format), image.size
    if image.mode not in ("RGB", "L") or "transparency" in image.info or kind not in END_MARKERS:
        return None
    if kind == "PNG" and raw_mode_of(image) not in ("RGB", "L"):  # 2, 4 or 16 bits
        return None
    if not content.endswith(END_MARKERS[kind]) or orientation_of(image, content) != 1:
        return None
    flags = REDUCTION_FLAGS[reduction if kind == "JPEG" and min(size) >= MIN_REDUCED_SIDE else 1]
    flags |= cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error:  # its own limits: 2^20 pixels a side, 2^30 in all
        return None
    return None if pixels is None else np.asarray(pixels, np.uint8)
