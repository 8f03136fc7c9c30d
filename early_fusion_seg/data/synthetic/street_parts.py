"""The objects of a synthetic street; each is a function of its own coordinates.

u runs from 0 (left) to 1 (right), v from 0 (top) to 1 (bottom). A function returns the number of the part at each
place, 0 outside the object, and its brightness. The caller chooses the colors of the parts. Random properties of an
object, such as the kind of sign or the stride of a pedestrian, come from `salt`, a number from 0 to 2^31 - 1.

Only +, -, *, /, floor and comparisons are used, which IEEE 754 defines exactly, so every machine draws the same.

Shapes: u, v, parts and brightness are all (h, w).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Number = float | np.floating[Any]
Bools = NDArray[np.bool_]
Parts = NDArray[np.uint8]
Shape = Callable[[Floats, Floats, int], tuple[Parts, Floats]]
Point = tuple[float, float]


def grain(a: Floats, b: Floats, salt: int) -> Floats:
    """Return a random value in 0..1 for each cell (floor a, floor b) of the plane."""
    x = np.floor(a).astype(np.int32).view(np.uint32) * np.uint32(0x9E3779B1)
    x = x ^ (np.floor(b).astype(np.int32).view(np.uint32) * np.uint32(0x85EBCA77)) ^ np.uint32(salt)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
    x = (x ^ (x >> np.uint32(12))) * np.uint32(0x297A2D39)
    return (x >> np.uint32(16)).astype(np.float32) / np.float32(65536)


def fraction(x: Floats) -> Floats:
    """Return the fractional part of x, 0..1."""
    rest: Floats = x - np.floor(x)
    return rest


def stripes(x: Floats, share: float = 0.5) -> Bools:
    """Return where the fractional part of x is below `share`."""
    return fraction(x) < share


def band(x: Floats, low: Number, high: Number) -> Bools:
    """Return where low <= x < high."""
    return (x >= low) & (x < high)


def disc(u: Floats, v: Floats, center: Point, radii: Point) -> Bools:
    """Return where (u, v) is inside an ellipse."""
    a, b = (u - center[0]) / radii[0], (v - center[1]) / radii[1]
    inside: Bools = a * a + b * b < 1
    return inside


def limb(u: Floats, v: Floats, start: Point, end: Point, thick: float) -> Bools:
    """Return where (u, v) is inside a straight stroke with round ends, `thick` wide."""
    du, dv = end[0] - start[0], end[1] - start[1]
    t = np.clip(((u - start[0]) * du + (v - start[1]) * dv) / (du * du + dv * dv), 0, 1)
    return disc(u - t * du, v - t * dv, start, (thick / 2, thick / 2))


def pole(u: Floats, v: Floats, salt: int) -> tuple[Parts, Floats]:
    """Draw a striped pole with a thicker foot and round shading."""
    light = stripes(v * 7)
    part = np.where((np.abs(u - 0.5) > 0.4) & (v < 0.9), 0, 1 + light).astype(np.uint8)
    return part, (0.6 + 0.7 * light) * (1.35 - 1.4 * np.abs(u - 0.35))


def sign(u: Floats, v: Floats, salt: int) -> tuple[Parts, Floats]:
    """Draw a disc with a bar, a triangle with a mark, a board with chevrons or three lamps; dark or light symbols."""
    du, dv = np.abs(u - 0.5), np.abs(v - 0.5)
    kind = salt % 4
    if kind == 0:
        plate, field = disc(u, v, (0.5, 0.5), (0.5, 0.5)), disc(u, v, (0.5, 0.5), (0.36, 0.36))
        symbol = field & (dv < 0.11) & (du < 0.27)
    elif kind == 1:
        plate, field = du < 0.54 * v, (du < 0.54 * v - 0.15) & (v < 0.88)
        symbol = field & (du < 0.07) & band(v, 0.42, 0.8)
    elif kind == 2:
        plate, field = np.ones_like(u, bool), (du < 0.42) & (dv < 0.42)
        symbol = field & stripes(u * 2 + 2 * dv)
    else:
        plate = field = du < 0.3
        symbol = disc(u, fraction(v * 3), (0.5, 0.5), (0.2, 0.38))
    part = plate.astype(np.uint8) + field + symbol
    shades = (1, 1.25, 0.5, 1.25) if salt & 4 else (1, 0.6, 1.25, 0.5)
    return part, np.array(shades, np.float32)[part]


def tree(u: Floats, v: Floats, salt: int) -> tuple[Parts, Floats]:
    """Draw a crown of leaves, a ragged union of discs, on a trunk of bark."""
    leaf = grain(u * 20, v * 24, salt)
    crown = np.zeros(u.shape, bool)
    for i in range(5):
        a, b = (u - 0.32 - 0.09 * i) / 0.25, (v - 0.2 - 0.06 * (salt >> 2 * i & 3)) / 0.21
        crown |= a * a + b * b + 0.5 * leaf < 1.25
    trunk = (np.abs(u - 0.5) < 0.05 + 0.05 * v * v) & (v > 0.3) & ~crown
    bark = 0.55 + 0.6 * grain(u * 60, v * 5, salt)
    return 2 * crown.astype(np.uint8) + trunk, np.where(crown, 0.5 + 1.2 * leaf - 0.4 * v, bark)


def car_side(u: Floats, v: Floats, salt: int) -> tuple[Parts, Floats]:
    """Draw a sedan from the side."""
    du = np.abs(u - 0.52)
    body = band(v, 0.4, 0.86) & (np.abs(u - 0.5) < 0.5 - 0.1 * np.abs(v - 0.62))
    part = (body | (band(v, 0.03, 0.5) & (du < 0.22 + 0.28 * v))).astype(np.uint8)
    part[band(v, 0.11, 0.43) & (du < 0.17 + 0.26 * v) & (np.abs(u - 0.5) > 0.02)] = 2
    part[body & band(v, 0.48, 0.6) & (np.abs(u - 0.5) > 0.45)] = 5
    for wheel in (0.22, 0.78):
        part[disc(u, v, (wheel, 0.8), (0.1, 0.2))] = 3
        part[disc(u, v, (wheel, 0.8), (0.055, 0.11))] = 4
    return part, _car_brightness(part, v)


def car_rear(u: Floats, v: Floats, salt: int) -> tuple[Parts, Floats]:
    """Draw a car from behind, with lamps and a license plate."""
    du = np.abs(u - 0.5)
    part = ((band(v, 0.4, 0.86) & (du < 0.49)) | (band(v, 0.02, 0.5) & (du < 0.33 + 0.3 * v))).astype(np.uint8)
    part[band(v, 0.1, 0.4) & (du < 0.26 + 0.28 * v)] = 2
    part[(v >= 0.84) & band(du, 0.24, 0.45)] = 3
    part[band(v, 0.7, 0.8) & (du < 0.16)] = 4
    part[band(v, 0.5, 0.64) & band(du, 0.32, 0.47)] = 5
    return part, _car_brightness(part, v)


def _car_brightness(part: Parts, v: Floats) -> Floats:
    """Return the brightness of a car: body (1), dark glass (2), black tires (3), bright metal (4), lamps (5)."""
    gloss = 1.25 - 0.6 * v + 0.3 * band(v, 0.44, 0.5)
    shine: Floats = np.array((1, 1, 0.45, 0.3, 1.4, 1.5), np.float32)[part] * gloss
    return shine


def pedestrian(u: Floats, v: Floats, salt: int) -> tuple[Parts, Floats]:
    """Draw a pedestrian in a checkered jersey."""
    stride = 0.1 + 0.03 * (salt % 8)
    legs = [limb(u, v, (0.5 + 0.3 * s, 0.5), (0.5 + s, 0.95), 0.26) for s in (-stride, stride)]
    part = 3 * (legs[0] | legs[1]).astype(np.uint8)
    part[band(v, 0.17, 0.56) & (np.abs(u - 0.5) < 0.4 - 0.3 * np.abs(v - 0.3))] = 2
    part[disc(u, v, (0.5, 0.095), (0.22, 0.095))] = 1
    part[disc(u, v, (0.5, 0.06), (0.22, 0.06))] = 4
    checker = stripes(v * 12) ^ stripes(u * 4)
    return part, np.where(part == 2, 0.5 + 0.8 * checker, 1.15 - 0.4 * np.abs(u - 0.35))


def bicyclist(u: Floats, v: Floats, salt: int) -> tuple[Parts, Floats]:
    """Draw a bicyclist in a striped jersey, bent forward, on two spoked wheels, facing left or right."""
    u = 1 - u if salt % 2 else u
    part, shade = np.zeros(u.shape, np.uint8), np.ones_like(u)
    for wheel in (0.22, 0.78):
        a, b = (u - wheel) / 0.22, (v - 0.78) / 0.22
        r = a * a + b * b
        part[r < 1] = 1
        black = (r > 0.55) | (np.abs(a - b) < 0.2) | (np.abs(a + b) < 0.2)  # tire and spokes
        shade = np.where(r < 1, 1.1 - 0.9 * black, shade)
    for tube in ((0.22, 0.78, 0.4, 0.5), (0.4, 0.52, 0.7, 0.52), (0.7, 0.45, 0.78, 0.78), (0.48, 0.8, 0.7, 0.5)):
        part[limb(u, v, tube[:2], tube[2:], 0.07)] = 2
    part[limb(u, v, (0.4, 0.46), (0.56, 0.62), 0.14) | limb(u, v, (0.56, 0.62), (0.48, 0.86), 0.11)] = 5
    jersey = limb(u, v, (0.4, 0.44), (0.55, 0.22), 0.22) | limb(u, v, (0.55, 0.24), (0.72, 0.44), 0.09)
    part[jersey] = 3
    part[disc(u, v, (0.6, 0.09), (0.09, 0.09))] = 4
    return part, np.where(jersey, 0.6 + 0.7 * stripes((u + v) * 9), shade)
