"""Draw procedural street scenes with CamVid's 11 classes.

A pinhole camera, one unit above the ground, looks along a flat street. Where the ground is s pixel rows below the
horizon, one unit is s pixels wide, so an object that stands there is drawn s times its size. The color of a surface is
a function of world coordinates, so scenes can be drawn at any size. Objects are painted from far to near at twice the
size, then every 2x2 pixels are averaged.

The classes share most of their colors, and light, tint and noise vary from scene to scene. So a network must learn
texture, shape and context. A seed gives the same bytes on any machine: random numbers are the raw words of PCG64, whose
stream NumPy guarantees, and arithmetic uses only +, -, *, /, floor and comparisons, which IEEE 754 defines exactly.

Shapes: h, w are twice the height and width of the scene; images (h, w, 3) float32 0..255, masks (h, w).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from early_fusion_seg.data.synthetic import street_parts as parts
from early_fusion_seg.data.synthetic.street_parts import Bools, Floats, Number, band, fraction, grain, stripes
from early_fusion_seg.errors import UserError

Pixels = NDArray[np.uint8]
Surface = Callable[[Floats, Floats], tuple[Bools, Floats]]  # (depth, height) in the world -> covered, color (..., 3)

SKY, BUILDING, POLE, ROAD, PAVEMENT, TREE, SIGN, FENCE, CAR, PEDESTRIAN, BICYCLIST = range(11)

CLOTHES = ((150, 80, 70), (70, 85, 120), (185, 180, 170), (70, 70, 75), (90, 110, 80), (180, 150, 120))
PAINTS = {
    SKY: ((110, 120, 140), (150, 125, 115), (190, 205, 225), (195, 195, 200), (225, 205, 180), (140, 150, 165)),
    BUILDING: ((150, 95, 75), (175, 160, 135), (140, 140, 145), (110, 120, 90), (180, 180, 190), (115, 100, 90)),
    POLE: ((90, 95, 95), (150, 150, 150), (70, 85, 75)),
    ROAD: ((150, 140, 125), (95, 95, 100), (125, 120, 115), (75, 75, 80)),
    PAVEMENT: ((150, 145, 140), (165, 145, 125), (120, 120, 125)),
    TREE: ((95, 110, 75), (120, 120, 80), (145, 115, 80), (85, 95, 85), (135, 130, 115)),
    SIGN: ((160, 75, 65), (70, 90, 140), (180, 160, 95), (190, 190, 185), (90, 110, 90)),
    FENCE: ((115, 90, 65), (190, 190, 185), (65, 80, 70), (120, 120, 125)),
    CAR: ((160, 60, 55), (55, 70, 110), (185, 185, 190), (60, 60, 65), (80, 110, 90), (170, 150, 110)),
    PEDESTRIAN: CLOTHES,
    BICYCLIST: CLOTHES,
}


class Thing(NamedTuple):
    """A kind of object, `width` x `height` units large and `up` units above the ground."""

    label: int
    shape: parts.Shape
    width: float
    height: float
    up: float = 0.0


SEDAN, HATCHBACK = Thing(CAR, parts.car_side, 2.2, 0.95), Thing(CAR, parts.car_rear, 1.3, 1.1)
WALKER, RIDER = Thing(PEDESTRIAN, parts.pedestrian, 0.62, 1.45), Thing(BICYCLIST, parts.bicyclist, 1.3, 1.4)
PLANT, PLATE = Thing(TREE, parts.tree, 2.6, 2.6), Thing(SIGN, parts.sign, 0.85, 0.85, up=1.2)
MAST = Thing(POLE, parts.pole, 0.3, 2.0)


def scene(seed: int, height: int, width: int) -> tuple[Pixels, Pixels]:
    """Draw a scene.

    Args:
        seed: Seed of the scene, 0 or higher. A seed gives the same scene on any machine.
        height: Height in pixels.
        width: Width in pixels.

    Returns:
        RGB image (height, width, 3) and mask (height, width) of train ids 0..10, both uint8.

    Raises:
        UserError: The seed is negative, or the size is below 1.

    Example:
        >>> image, mask = scene(0, 48, 64)
        >>> image.shape, mask.shape
        ((48, 64, 3), (48, 64))
    """
    if seed < 0 or height < 1 or width < 1:
        raise UserError(
            f"the seed is {seed} and the size {height}x{width} pixels; expected a seed from 0 and a size from 1x1"
        )
    street = _Street(seed, 2 * height, 2 * width)
    street.paint()
    draw, large = street.draw, street.image
    light = draw.between(0.6, 1.3) * (np.float32(0.8) + np.float32(0.4) * draw.noise(3))
    image = (large[::2, ::2] + large[1::2, ::2] + large[::2, 1::2] + large[1::2, 1::2]) * (light / 4)
    image += (draw.noise(height, width, 3) - np.float32(0.5)) * 16
    return np.clip(image, 0, 255).astype(np.uint8), street.mask[1::2, 1::2].copy()


class _Draw:
    """Random numbers from PCG64's raw 64-bit words."""

    def __init__(self, seed: int) -> None:
        self._words = np.random.PCG64(seed)

    def below(self, n: int) -> int:
        return int(self._words.random_raw()) % n

    def between(self, low: Number, high: Number) -> np.float32:
        return np.float32(low + (high - low) * (self.below(1 << 24) / (1 << 24)))

    def noise(self, *shape: int) -> Floats:
        """Draw values in 0..1."""
        size = int(np.prod(shape))
        octets = self._octets((size + 7) // 8)[:size]
        return octets.reshape(shape).astype(np.float32) / 256

    def colors(self, label: int, n: int) -> Floats:
        """Draw n colors (n, 3) of a class: entries of PAINTS with random shade and tint."""
        octets = self._octets(n).reshape(n, 8)
        paints = np.array(PAINTS[label], np.float32)[octets[:, 0] % len(PAINTS[label])]
        shade, tint = octets[:, 1:2].astype(np.float32) / 256, octets[:, 2:5].astype(np.float32) / 256
        mixed: Floats = paints * (np.float32(0.7) + np.float32(0.6) * shade) + (tint - np.float32(0.5)) * 30
        return mixed

    def _octets(self, words: int) -> Pixels:
        return self._words.random_raw(words).astype("<u8").view(np.uint8)


class _Street:
    """The painter of one scene, from far to near."""

    def __init__(self, seed: int, height: int, width: int) -> None:
        self.draw = draw = _Draw(seed)
        self.height, self.width = height, width
        self.horizon = height * draw.between(0.32, 0.52)  # pixel row
        self.vanish = width * draw.between(0.25, 0.75)  # pixel column of the vanishing point
        self.focal = np.float32(height * 1.1)
        self.road = draw.between(0.9, 1.6)  # half the width of the road, in units, as all lengths below
        self.curb = self.road + draw.between(0.7, 1.3)  # distance of the houses from the middle of the road
        self.end = self.focal / (height * draw.between(0.05, 0.09))  # depth of the last house
        self.y = (np.arange(height, dtype=np.float32) + np.float32(0.5))[:, None]
        self.x = (np.arange(width, dtype=np.float32) + np.float32(0.5))[None, :]
        self.haze = draw.colors(SKY, 1)[0]
        self.fog = draw.between(0.0, 0.03)
        self.image = np.empty((height, width, 3), np.float32)
        self.mask = np.empty((height, width), np.uint8)

    def paint(self) -> None:
        self.sky()
        self.ground()
        self.house_at_the_end()
        for side in (-1, 1):
            self.houses(side)
            self.fence(side)
        self.things()

    def put(self, rows: slice, cols: slice, covered: Bools, label: int, color: Floats, depth: Floats) -> None:
        """Paint the covered pixels of a patch in `color`, with haze that increases with depth."""
        mist = np.minimum(self.fog * depth[covered], np.float32(0.8))[..., None]
        seen = color[covered]
        self.image[rows, cols][covered] = seen + (self.haze - seen) * mist
        self.mask[rows, cols][covered] = label

    def sky(self) -> None:
        (top,), cells = self.draw.colors(SKY, 1), self.draw.noise(8, 8)
        t = np.minimum(self.y / self.horizon, 1)[..., None]
        upper, lower, fy = _between_cells(self.y[:, 0] * np.float32(10 / self.height))
        left, right, fx = _between_cells(self.x[0] * np.float32(5 / self.width))
        rows = cells[upper] * (1 - fy[:, None]) + cells[lower] * fy[:, None]  # (h, 8)
        cloud = rows[:, left] * (1 - fx) + rows[:, right] * fx  # (h, w)
        self.image[:] = (top * (1 - t) + self.haze * t) * (np.float32(0.85) + np.float32(0.3) * cloud[..., None])
        self.mask[:] = SKY

    def ground(self) -> None:
        """Paint the road with its lines, and the pavements."""
        rows, cols, salt = slice(int(self.horizon) + 1, None), slice(None), self.draw.below(1 << 31)
        s = self.y[rows] - self.horizon
        side = np.abs(self.x - self.vanish) / s
        z = np.broadcast_to(self.focal / s, side.shape)
        line = ((side < 0.05) & stripes(z * np.float32(0.4))) | band(side, self.road - 0.14, self.road - 0.08)
        asphalt = np.float32(0.8) + np.float32(0.4) * grain((self.x - self.vanish) / s * 20, z * 20, salt)
        color = np.where(line[..., None], self.draw.colors(SKY, 1), self.draw.colors(ROAD, 1) * asphalt[..., None])
        self.put(rows, cols, side <= self.road, ROAD, color, z)
        a, b = side * np.float32(2.5), z * np.float32(2.5)
        slab = np.float32(0.85) + np.float32(0.3) * grain(a, b, salt + 1)
        slab[stripes(a, 0.15) | stripes(b, 0.15)] = 0.5
        slab[side < self.road + 0.1] = 1.4
        self.put(rows, cols, side > self.road, PAVEMENT, self.draw.colors(PAVEMENT, 1) * slab[..., None], z)

    def house_at_the_end(self) -> None:
        """Paint one long house across the end of the street."""
        s = self.focal / self.end
        rows = slice(max(int(self.horizon - self.draw.between(1, 3) * s), 0), int(self.horizon + s))
        pane = band(fraction(self.x / s), 0.25, 0.75) & band(fraction(self.y[rows] / s), 0.25, 0.75)
        wall, glass = self.draw.colors(BUILDING, 2)
        color = np.where(pane[..., None], glass / 2, wall)
        self.put(rows, slice(None), np.ones_like(pane), BUILDING, color, np.full(pane.shape, self.end))

    def wall(self, side: int, lateral: np.float32, tall: np.float32, label: int, surface: Surface) -> None:
        """Paint a surface along the street, `lateral` units to the left (side -1) or right (side 1) of its middle."""
        edge = int(self.vanish + side * lateral * self.focal / self.end)
        cols = slice(max(edge, 0), None) if side > 0 else slice(0, max(edge, 0))
        s = np.abs(self.x[:, cols] - self.vanish) / lateral
        near = s.max(initial=0)
        rows = slice(max(int(self.horizon - (tall - 1) * near), 0), int(self.horizon + near) + 1)
        rise = (self.horizon + s - self.y[rows]) / s
        z = np.broadcast_to(self.focal / s, rise.shape)
        covered, color = surface(z, rise)
        self.put(rows, cols, covered & (rise > 0), label, color, z)

    def houses(self, side: int) -> None:
        """Paint a row of brick houses with windows, and gaps between houses."""
        draw, n = self.draw, 16
        length, shift = draw.between(3, 6), draw.between(0, 1)
        tall = (np.float32(1.8) + 3 * draw.noise(n)) * (draw.noise(n) > 0.15)
        bricks, glass = draw.colors(BUILDING, n), draw.colors(SKY, n) * draw.between(0.2, 0.6)
        window = np.float32(0.8) + np.float32(0.5) * draw.noise(n)
        salt = draw.below(1 << 31)

        def surface(z: Floats, rise: Floats) -> tuple[Bools, Floats]:
            house = np.minimum(np.floor(z / length + shift).astype(int), n - 1)
            a, b = fraction(z / window[house]), fraction(rise / (np.float32(1.1) * window[house]))
            bar = (np.abs(a - 0.5) < 0.05) | (np.abs(b - 0.55) < 0.05)
            pane = band(a, 0.25, 0.75) & band(b, 0.3, 0.8) & ~bar
            course = np.where(stripes(rise * 5, 0.3), np.float32(0.72), np.float32(1))
            course += np.float32(0.1) * grain(z * 3, rise * 5, salt)
            return rise < tall[house], np.where(pane[..., None], glass[house], bricks[house] * course[..., None])

        self.wall(side, self.curb, tall.max(), BUILDING, surface)

    def fence(self, side: int) -> None:
        """Paint a lattice fence along a part of the pavement."""
        draw = self.draw
        near, length, tall, step = (draw.between(*pair) for pair in ((1.5, 4), (5, 10), (0.7, 1.0), (2.5, 4)))
        slats, gaps = draw.colors(FENCE, 2)

        def surface(z: Floats, rise: Floats) -> tuple[Bools, Floats]:
            lattice = stripes((z + rise) * step, 0.35) | stripes((z - rise) * step, 0.35) | (rise > 0.88 * tall)
            covered = (rise < tall) & band(z, near, near + length)
            return covered, np.where(lattice[..., None], slats, gaps * np.float32(0.35))

        self.wall(side, self.curb - np.float32(0.1), tall, FENCE, surface)

    def things(self) -> None:
        """Paint trees, cars, bicyclists, pedestrians and signs on poles, placed so that they hide each other little."""
        draw = self.draw
        car = (SEDAN, HATCHBACK)[draw.below(2)]
        wanted = [car, RIDER, WALKER, MAST] + [(car, RIDER, WALKER, MAST)[draw.below(4)] for _ in range(2)]
        wanted.sort(key=lambda _: draw.below(1 << 16))
        placed: list[tuple[float, float, Thing]] = []
        for group in ([PLANT] * (1 + draw.below(2)), wanted):  # trees are placed on their own, so others may hide them
            taken: list[tuple[float, float]] = []
            for thing in group:
                self.place(thing, taken, placed)
        for s, x, thing in sorted(placed, key=lambda place: place[:2]):
            self.stand(thing, x, s)
            if thing is MAST:
                self.stand(PLATE, x, s)

    def place(self, thing: Thing, taken: list[tuple[float, float]], placed: list[tuple[float, float, Thing]]) -> None:
        """Find a place (s, x) for a thing whose pixel columns are mostly free; skip the thing if there is none."""
        ranges: dict[int, tuple[Number, Number]] = {
            CAR: (0, self.road), BICYCLIST: (0, self.road + 0.2), PEDESTRIAN: (self.road * 0.6, self.curb + 0.2),
            POLE: (self.road + 0.15, self.road + 0.15), TREE: (self.curb, self.curb),
        }  # fmt: skip
        low, high = ranges[thing.label]
        half = 0.35 if thing is MAST else thing.width / 2
        for _ in range(8):
            s = float(self.draw.between(0.21, 0.4) * self.height) * (0.8 if thing is PLANT else 1)
            x = float(self.vanish + (1 - 2 * self.draw.below(2)) * self.draw.between(low, high) * s)
            a, b = x - half * s, x + half * s
            hidden = any(min(b, d) - max(a, c) > 0.25 * min(b - a, d - c) for c, d in taken)
            if not hidden and 0.7 * half * s < x < self.width - 0.7 * half * s:
                taken.append((a, b))
                placed.append((s, x, thing))
                return

    def stand(self, thing: Thing, x: float, s: float) -> None:
        """Paint a thing at the depth where one unit is s pixels, with its middle in pixel column x."""
        w, h = thing.width * s, thing.height * s
        left, top = x - w / 2, float(self.horizon) + s * (1 - thing.up) - h
        rows = slice(max(int(top), 0), max(int(top + h) + 1, 0))
        cols = slice(max(int(left), 0), max(int(left + w) + 1, 0))
        u = (self.x[:, cols] - np.float32(left)) / np.float32(w)
        v = (self.y[rows] - np.float32(top)) / np.float32(h)
        u, v = np.broadcast_arrays(u, v)
        part, shade = thing.shape(u, v, self.draw.below(1 << 31))
        covered = (part > 0) & band(u, 0, 1) & band(v, 0, 1)
        color = self.draw.colors(thing.label, 6)[part] * shade.astype(np.float32)[..., None]
        self.put(rows, cols, covered, thing.label, color, np.full(part.shape, self.focal / np.float32(s)))


def _between_cells(x: Floats) -> tuple[NDArray[np.intp], NDArray[np.intp], Floats]:
    """Return the cells (of eight) before and after each x, and the smoothed weight 0..1 of the second."""
    cell, f = np.floor(x).astype(int), fraction(x)
    eased: Floats = f * f * (3 - 2 * f)
    return cell % 8, (cell + 1) % 8, eased
