"""InferenceSettings: the sizes at which images pass through the network, and how often."""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from early_fusion_seg.errors import UserError

Window = int | tuple[int, int] | Literal["auto"] | None
AUTO_WINDOW = 1024
"""Side in pixels of the windows that "auto" cuts."""
MAX_WHOLE_PIXELS = 2**22
"""Number of pixels up to which "auto" passes a whole image: 2048x2048, or 2896x1448."""


class InputSize(NamedTuple):
    """Size of the training images: the file's times `scale`, or that at which the shorter side has `short_side`."""

    scale: float = 1.0
    short_side: int | None = None

    def __str__(self) -> str:
        return f"scale {self.scale:g}" if self.short_side is None else f"short_side {self.short_side}"


@dataclass(frozen=True)
class InferenceSettings:
    """The sizes at which images pass through the network, and how often. Label maps always have the image's size.

    Args:
        scale: Resize factor for images before the network. Default: that of training (`--data.scale`), which the
            checkpoint holds.
        short_side: Length in pixels to which the shorter side of each image is resized instead. Default: that of
            training (`--data.short_side`).
        flip: Also pass the mirrored image, and average the class probabilities.
        scales: Factors on the input size, such as [0.75, 1.0, 1.25]: one pass each; the class probabilities are
            averaged.
        window: Height and width, or one number for a square, of the windows in which an image passes the network, in
            pixels after resizing; rounded up to a multiple of the coarsest stride. "auto" passes images of up to 4
            megapixels whole, larger ones in windows of 1024x1024. None: always whole.
        overlap: Pixels that neighboring windows share, rounded likewise. Their class probabilities are blended.

    Raises:
        UserError: A value is out of range.
    """

    scale: float | None = None
    short_side: int | None = None
    flip: bool = False
    scales: tuple[float, ...] = (1.0,)
    window: Window = "auto"
    overlap: int = 128

    def __post_init__(self) -> None:
        sides = () if self.window is None or self.window == "auto" else _pair(self.window)
        for name, values in {
            "scale": () if self.scale is None else (self.scale,),
            "short_side": () if self.short_side is None else (self.short_side,),
            "scales": self.scales or (0,),
            "window": sides,
        }.items():
            if any(not value > 0 for value in values):
                raise UserError(f"inference.{name} is {getattr(self, name)}; expected numbers above 0")
        if self.scale is not None and self.short_side is not None:
            raise UserError("inference.scale and inference.short_side exclude each other; give one of them")
        if self.overlap < 0 or (sides and self.overlap > min(sides) // 2):
            raise UserError(f"inference.overlap is {self.overlap}; expected 0 to half of inference.window")

    @property
    def has_input_size(self) -> bool:
        """Whether they have an input size of their own, in place of that of training."""
        return self.scale is not None or self.short_side is not None

    def at_size(self, trained: InputSize) -> "InferenceSettings":
        """Return the settings with the input size of training, unless they have one."""
        if self.has_input_size:
            return self
        if trained.short_side is not None:
            return replace(self, short_side=trained.short_side)
        return replace(self, scale=trained.scale)

    @property
    def plain(self) -> "InferenceSettings":
        """Return the settings without flip and further scales."""
        return replace(self, flip=False, scales=(1.0,))

    @property
    def passes(self) -> list[tuple[float, bool]]:
        """Return factor and flip of each pass."""
        return [(factor, flip) for factor in self.scales for flip in ((False, True) if self.flip else (False,))]

    def factor(self, size: tuple[int, int]) -> float:
        """Return the resize factor of an image of `size` (h, w)."""
        if self.short_side is not None:
            return self.short_side / min(size)
        return 1.0 if self.scale is None else self.scale

    def windows(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """Return height and width of the windows of an image of `size` (h, w); None: the image passes whole."""
        if self.window is None:
            return None
        if self.window == "auto":
            pixels = size[0] * size[1] * self.factor(size) ** 2
            return None if pixels <= MAX_WHOLE_PIXELS else (AUTO_WINDOW, AUTO_WINDOW)
        return _pair(self.window)


def _pair(window: int | tuple[int, int]) -> tuple[int, int]:
    return (window, window) if isinstance(window, int) else window
