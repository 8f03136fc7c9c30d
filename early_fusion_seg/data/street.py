"""Procedural street scenes with CamVid's 11 classes.

A pinhole camera one unit above a flat street looks along it. `s` pixel rows below the horizon one unit is `s` pixels
wide, so a thing that stands there is drawn `s` times its size, and every surface is a function of its place in the
world: scenes have no native size. They are painted far to near at twice the size, then averaged.

Classes share their colours in great part, and light, tint and noise differ from scene to scene, so that a class shows
in texture, shape and surroundings. The same seed gives the same bytes on any machine: random numbers are PCG64's raw
words, whose stream NumPy promises to keep, and arithmetic is +, -, *, /, floor and comparisons, which IEEE 754 fixes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from early_fusion_seg.data import street_parts as parts
from early_fusion_seg.data.street_parts import Floats, Where, band, grain, stripes

SKY, BUILDING, POLE, ROAD, PAVEMENT, TREE, SIGN, FENCE, CAR, PEDESTRIAN, BICYCLIST = range(11)

_PAINTS: dict[int, tuple[tuple[int, int, int], ...]] = {
    SKY: ((110, 120, 140), (150, 125, 115), (190, 205, 225), (195, 195, 200), (225, 205, 180), (140, 150, 165)),
    BUILDING: ((110, 120, 90), (180, 180, 190), (150, 95, 75), (175, 160, 135), (140, 140, 145), (190, 175, 150), (115, 100, 90)),
    POLE: ((90, 95, 95), (150, 150, 150), (70, 85, 75)),
    ROAD: ((150, 140, 125), (95, 95, 100), (125, 120, 115), (75, 75, 80)),
    PAVEMENT: ((150, 145, 140), (165, 145, 125), (120, 120, 125)),
    TREE: ((95, 110, 75), (120, 120, 80), (145, 115, 80), (85, 95, 85), (135, 130, 115)),
    SIGN: ((160, 75, 65), (70, 90, 140), (180, 160, 95), (190, 190, 185), (90, 110, 90)),
    FENCE: ((115, 90, 65), (190, 190, 185), (65, 80, 70), (120, 120, 125)),
    CAR: ((160, 60, 55), (55, 70, 110), (185, 185, 190), (60, 60, 65), (80, 110, 90), (170, 150, 110)),
    PEDESTRIAN: ((150, 80, 70), (70, 85, 120), (185, 180, 170), (70, 70, 75), (90, 110, 80), (180, 150, 120)),
}
_PAINTS[BICYCLIST] = _PAINTS[PEDESTRIAN]


class _Draw:
    """Random numbers from PCG64's raw 64-bit words."""

    def __init__(self, seed: int) -> None:
        self._words = np.random.PCG64(seed)

    def below(self, n: int) -> int:
        return int(self._words.random_raw()) % n

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * (self.below(1 << 24) / (1 << 24))

    def noise(self, *shape: int) -> Floats:
        size = int(np.prod(shape))
        octets = self._words.random_raw((size + 7) // 8).astype("<u8").view(np.uint8)[:size]
        return octets.reshape(shape).astype(np.float32) / np.float32(256)

    def colour(self, label: int) -> Floats:
        paint = _PAINTS[label][self.below(len(_PAINTS[label]))]
        shade = np.float32(self.between(0.7, 1.3))
        return np.array(paint, np.float32) * shade + (self.noise(3) - np.float32(0.5)) * np.float32(30)


class _Street:
    """One scene being painted, far to near. Shapes: image (h, w, 3) float32 0..255, mask (h, w)."""

    def __init__(self, seed: int, height: int, width: int) -> None:
        self.draw = draw = _Draw(seed)
        self.height, self.width = height, width
        self.horizon = height * draw.between(0.32, 0.52)
        self.vanish = width * draw.between(0.25, 0.75)
        self.focal = height * 1.1
        self.road = draw.between(0.9, 1.6)  # half-width
        self.kerb = self.road + draw.between(0.7, 1.3)
        self.y = (np.arange(height, dtype=np.float32) + np.float32(0.5))[:, None]
        self.x = (np.arange(width, dtype=np.float32) + np.float32(0.5))[None, :]
        self.haze = draw.colour(SKY)
        self.fog = np.float32(draw.between(0.0, 0.03))
        self.image = np.empty((height, width, 3), np.float32)
        self.mask = np.empty((height, width), np.uint8)

    def put(self, rows: slice, cols: slice, where: Where, label: int, colour: Floats, depth: Any) -> None:
        """Paint the pixels `where` of a patch in `colour` (..., 3), hazy with depth."""
        mist = np.clip(self.fog * depth, 0, 0.8)
        mist = mist[..., None] if np.ndim(mist) else mist
        np.copyto(self.image[rows, cols], colour + (self.haze - colour) * mist, where=where[..., None])
        self.mask[rows, cols][where] = label

    def sky(self) -> None:
        d = self.draw
        top, low = d.colour(SKY), self.haze
        t = np.clip(self.y / np.float32(self.horizon), 0, 1)[..., None]
        cells = d.noise(8, 8)
        gy, gx = self.y[:, 0] * np.float32(10 / self.height), self.x[0] * np.float32(5 / self.width)
        iy, ix = np.floor(gy).astype(int), np.floor(gx).astype(int)
        fy, fx = (gy - iy)[:, None], gx - ix
        fy, fx = fy * fy * (3 - 2 * fy), fx * fx * (3 - 2 * fx)
        rows = cells[iy % 8] * (1 - fy) + cells[(iy + 1) % 8] * fy
        cloud = rows[:, ix % 8] * (1 - fx) + rows[:, (ix + 1) % 8] * fx
        self.image[:] = (top * (1 - t) + low * t) * (np.float32(0.85) + np.float32(0.3) * cloud[..., None])
        self.mask[:] = SKY

    def ground(self) -> None:
        d = self.draw
        rows, cols = slice(int(self.horizon) + 1, None), slice(None)
        s = self.y[rows] - np.float32(self.horizon)
        side = (self.x - np.float32(self.vanish)) / s
        z = np.broadcast_to(np.float32(self.focal) / s, side.shape)
        salt = d.below(1 << 31)
        shade = np.float32(0.8) + np.float32(0.4) * grain(side * 20, z * 20, salt)
        line = ((np.abs(side) < 0.05) & stripes(z * np.float32(0.4))) | band(np.abs(side), self.road - 0.14, self.road - 0.08)
        colour = np.where(line[..., None], d.colour(SKY), d.colour(ROAD) * shade[..., None])
        self.put(rows, cols, np.ones_like(line), ROAD, colour, z)
        tile_u, tile_v = side * np.float32(2.5), z * np.float32(2.5)
        shade = np.float32(0.85) + np.float32(0.3) * grain(tile_u, tile_v, salt + 1)
        shade = np.where(stripes(tile_u, 0.15) | stripes(tile_v, 0.15), np.float32(0.5), shade)
        shade = np.where(np.abs(side) < self.road + 0.1, np.float32(1.4), shade)
        self.put(rows, cols, np.abs(side) > self.road, PAVEMENT, d.colour(PAVEMENT) * shade[..., None], z)

    def far_end(self) -> float:
        """Close the street with a block of houses; return its depth."""
        d = self.draw
        s = self.height * d.between(0.05, 0.09)
        tall = d.between(1.0, 3.0)
        rows = slice(max(int(self.horizon - tall * s), 0), int(self.horizon + s))
        self.front(rows, slice(None), s)
        return self.focal / s

    def front(self, rows: slice, cols: slice, s: float) -> None:
        d = self.draw
        u, v = np.broadcast_arrays((self.x[:, cols]) / np.float32(s), self.y[rows] / np.float32(s))
        pane = band(u - np.floor(u), 0.25, 0.75) & band(v - np.floor(v), 0.25, 0.75)
        colour = np.where(pane[..., None], d.colour(BUILDING) * np.float32(0.5), d.colour(BUILDING))
        self.put(rows, cols, np.ones_like(pane), BUILDING, colour, self.focal / s)

    def wall(self, side: int, lateral: float, far: float, top: Callable[..., Any]) -> None:
        """Paint a wall along the street: `top(z, rise)` gives where it is, and its colour."""
        reach = self.focal / far * lateral
        cols = slice(int(self.vanish + reach), None) if side > 0 else slice(0, max(int(self.vanish - reach), 0))
        s = np.abs(self.x[:, cols] - np.float32(self.vanish)) / np.float32(lateral)
        if s.size == 0:
            return
        rise = (np.float32(self.horizon) + s - self.y) / s
        z = np.broadcast_to(np.float32(self.focal) / s, rise.shape)
        where, colour, label = top(z, rise)
        self.put(slice(None), cols, where & (rise > 0), label, colour, z)

    def houses(self, side: int, far: float) -> None:
        d = self.draw
        n = 16
        length = np.float32(d.between(3.0, 6.0))
        shift = np.float32(d.between(0, 1))
        tall = np.float32(1.8) + 3 * d.noise(n)
        tall[d.noise(n) < 0.15] = 0
        walls = np.stack([d.colour(BUILDING) for _ in range(n)])
        panes = np.stack([d.colour(SKY) * np.float32(d.between(0.2, 0.6)) for _ in range(n)])
        step = np.float32(0.8) + np.float32(0.5) * d.noise(n)
        salt = d.below(1 << 31)

        def top(z: Floats, rise: Floats) -> Any:
            k = np.clip(np.floor(z / length + shift).astype(int), 0, n - 1)
            a, b = z / step[k], rise / (np.float32(1.1) * step[k])
            a, b = a - np.floor(a), b - np.floor(b)
            pane = band(a, 0.25, 0.75) & band(b, 0.3, 0.8)
            bar = (np.abs(a - 0.5) < 0.05) | (np.abs(b - 0.55) < 0.05)
            course = np.where(stripes(rise * 5, 0.3), np.float32(0.75), np.float32(1.05))
            brick = course * (np.float32(0.95) + np.float32(0.1) * grain(z * 3, rise * 5, salt))
            colour = np.where((pane & ~bar)[..., None], panes[k], walls[k] * brick[..., None])
            return rise < tall[k], colour, BUILDING

        self.wall(side, self.kerb, far, top)

    def fence(self, side: int, far: float) -> None:
        d = self.draw
        near = d.between(1.8, 5)
        end = near + d.between(4, 10)
        tall = d.between(0.7, 1.0)
        bars, gap = d.colour(FENCE), d.colour(FENCE) * np.float32(0.35)
        step = d.between(2.5, 4)

        def top(z: Floats, rise: Floats) -> Any:
            rail = np.abs(rise / tall - 0.94) < 0.06
            lattice = stripes((z + rise) * step, 0.35) | stripes((z - rise) * step, 0.35)
            colour = np.where((lattice | rail)[..., None], bars, gap)
            return (rise < tall) & band(z, near, end), colour, FENCE

        self.wall(side, self.kerb - 0.1, far, top)

    def thing(self, shape: Any, label: int, x: float, s: float, size: tuple[float, float], up: float = 0) -> None:
        w, h = size[0] * s, size[1] * s
        left, top = x - w / 2, self.horizon + s * (1 - up) - h
        rows = slice(max(int(top), 0), max(min(int(top + h) + 1, self.height), 0))
        cols = slice(max(int(left), 0), max(min(int(left + w) + 1, self.width), 0))
        u, v = (self.x[:, cols] - np.float32(left)) / np.float32(w), (self.y[rows] - np.float32(top)) / np.float32(h)
        u, v = np.broadcast_arrays(u, v)
        if u.size == 0:
            return
        part, shade = shape(u, v, self.draw.below(1 << 31))
        part = np.where((u < 0) | (u > 1) | (v < 0) | (v > 1), 0, part)
        colours = np.stack([self.draw.colour(label) for _ in range(6)])
        if label == SIGN:
            flip = self.draw.below(2)
            colours[1] *= np.float32(1.25 if flip else 0.6)
            colours[2] *= np.float32(0.5 if flip else 1.25)
            colours[3] *= np.float32(1.25 if flip else 0.5)
        if label == POLE:
            colours[1] *= np.float32(0.6)
            colours[2] *= np.float32(1.3)
        if label == CAR:
            colours[2] = colours[2] * np.float32(0.4) + 20
            colours[3] *= np.float32(0.3)
        self.put(rows, cols, part > 0, label, colours[part] * shade.astype(np.float32)[..., None], self.focal / s)

    def things(self) -> None:
        d = self.draw
        half = {CAR: 0.65, PEDESTRIAN: 0.25, BICYCLIST: 0.6, TREE: 0.8, POLE: 0.35}
        kinds = [TREE] * (1 + d.below(2)) + [CAR, BICYCLIST, PEDESTRIAN, POLE] + [(CAR, BICYCLIST, PEDESTRIAN, POLE)[d.below(4)] for _ in range(2)]
        kinds = sorted(kinds, key=lambda k: (k != TREE, d.below(100)))
        taken, todo = [], []
        for kind in kinds:
            for _ in range(8):
                s = d.between(0.21, 0.4) * self.height
                if kind == TREE: s *= .8
                side = 1 - 2 * d.below(2)
                long = kind == CAR and d.below(2)
                lateral = {CAR: d.between(0, self.road), PEDESTRIAN: d.between(self.road * 0.6, self.kerb + .2), BICYCLIST: d.between(0, self.road + .2), TREE: self.kerb, POLE: self.road + 0.15}[kind]
                w = half[kind] * s * (1.7 if long else 1)
                x = self.vanish + side * lateral * s
                if x < w * .7 or x > self.width - w * .7: continue
                if any((kind == TREE) == tree and min(x + w, b) - max(x - w, a) > 0.5 * min(w, (b - a) / 2) for a, b, tree in taken): continue
                taken.append((x - w, x + w, kind == TREE))
                todo.append((s, kind, x, long))
                break
        for s, kind, x, long in sorted(todo):
            if kind == CAR:
                if long:
                    self.thing(parts.car_side, CAR, x, s, (2.2, 0.95))
                else:
                    self.thing(parts.car_rear, CAR, x, s, (1.3, 1.1))
            elif kind == PEDESTRIAN:
                self.thing(parts.pedestrian, kind, x, s, (0.62, 1.45))
            elif kind == BICYCLIST:
                self.thing(parts.bicyclist, kind, x, s, (1.3, 1.4))
            elif kind == TREE:
                self.thing(parts.tree, kind, x, s, (2.6, 2.6))
            else:
                self.thing(parts.pole, POLE, x, s, (0.3, 2.0))
                self.thing(parts.sign, SIGN, x, s, (0.85, 0.85), up=1.2)


def scene(seed: int, height: int, width: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    street = _Street(seed, 2 * height, 2 * width)
    street.sky()
    street.ground()
    far = street.far_end()
    for side in (-1, 1):
        street.houses(side, far)
        street.fence(side, far)
    street.things()
    d = street.draw
    light = np.float32(d.between(0.6, 1.3)) * (np.float32(0.8) + np.float32(0.4) * d.noise(3))
    big = street.image
    image = (big[::2, ::2] + big[1::2, ::2] + big[::2, 1::2] + big[1::2, 1::2]) * (np.float32(0.25) * light)
    image = image + (d.noise(height, width, 3) - np.float32(0.5)) * np.float32(16)
    return np.clip(image, 0, 255).astype(np.uint8), street.mask[1::2, 1::2].copy()
