"""Procedural street scenes with CamVid's 11 classes: something to learn from where no data set is at hand.

A pinhole camera one unit above a flat street looks along it. A pixel row `s` pixels below the horizon shows the
ground where one unit is `s` pixels wide, so an object standing there is drawn `s` times its size: every object is a
function of (u, v), its own coordinates (0..1 right, 0..1 down), that answers with the part seen there, and every
surface a function of its place in the world. So scenes have no native size.

Colours are drawn from ranges that all classes share and shade, tint and noise differ from scene to scene, so a
class shows in texture, shape and context. The same seed gives the same bytes on any machine: random numbers are
PCG64's raw words, whose stream NumPy promises, and arithmetic is +, -, *, / and floor, which IEEE 754 fixes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

SKY, BUILDING, POLE, ROAD, PAVEMENT, TREE, SIGN, FENCE, CAR, PEDESTRIAN, BICYCLIST = range(11)

Floats = NDArray[np.float32]
Parts = NDArray[np.uint8]  # 0 where the object is not, else the number of its part
Shape = Callable[[Floats, Floats, int], tuple[Parts, Floats]]  # (u, v, salt) -> part, brightness


class _Draw:
    """Random numbers from PCG64's raw 64-bit words."""

    def __init__(self, seed: int) -> None:
        self._words = np.random.PCG64(seed)

    def below(self, n: int) -> int:
        return int(self._words.random_raw()) % n

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * (self.below(1 << 24) / (1 << 24))

    def salt(self) -> int:
        return self.below(1 << 31)

    def sign(self) -> int:
        return 1 - 2 * self.below(2)

    def noise(self, *shape: int) -> Floats:
        size = int(np.prod(shape))
        raw = self._words.random_raw((size + 7) // 8).astype("<u8").view(np.uint8)[:size]
        return raw.reshape(shape).astype(np.float32) / np.float32(256)

    def colour(self) -> Floats:
        """A muted colour: a grey with a leaning, out of one range for all classes. Shape (3,), 0..255."""
        grey, lean = self.between(70, 190), self.noise(3) - np.float32(0.5)
        return (grey * (1 + np.float32(0.5) * lean)).astype(np.float32)


def _floor(x: Floats) -> NDArray[np.int32]:
    return np.floor(x).astype(np.int32)


def _frac(x: Floats) -> Floats:
    return x - np.floor(x)


def _grain(a: Floats, b: Floats, salt: int) -> Floats:
    """Give every cell (floor a, floor b) of the plane its own random value in 0..1."""
    x = _floor(a).astype(np.uint32) * np.uint32(0x9E3779B1) ^ _floor(b).astype(np.uint32) * np.uint32(0x85EBCA77)
    x = x ^ np.uint32(salt)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
    x = (x ^ (x >> np.uint32(12))) * np.uint32(0x297A2D39)
    return (x >> np.uint32(16)).astype(np.float32) / np.float32(65536)


def _disc(u: Floats, v: Floats, cu: float, cv: float, ru: float, rv: float) -> NDArray[np.bool_]:
    a, b = (u - cu) / ru, (v - cv) / rv
    return a * a + b * b < 1


def _band(x: Floats, low: float, high: float) -> NDArray[np.bool_]:
    return (x >= low) & (x < high)


def _stroke(u: Floats, v: Floats, ends: tuple[float, float, float, float], thick: float) -> NDArray[np.bool_]:
    """Where a straight limb from (u0, v0) to (u1, v1) is, `thick` wide."""
    u0, v0, u1, v1 = ends
    du, dv = u1 - u0, v1 - v0
    t = np.clip(((u - u0) * du + (v - v0) * dv) / (du * du + dv * dv), 0, 1)
    a, b = u - u0 - t * du, v - v0 - t * dv
    return a * a + b * b < thick * thick / 4


def _pole(u: Floats, v: Floats, salt: int) -> tuple[Parts, Floats]:
    inside = (np.abs(u - 0.5) < 0.3) | (v > 0.9)
    return inside.astype(np.uint8), 1.3 - 1.6 * np.abs(u - 0.35)


def _sign(u: Floats, v: Floats, salt: int) -> tuple[Parts, Floats]:
    du, dv = np.abs(u - 0.5), np.abs(v - 0.5)
    kind = salt % 4
    if kind == 0:  # disc with a bar
        plate, inner = _disc(u, v, 0.5, 0.5, 0.5, 0.5), _disc(u, v, 0.5, 0.5, 0.36, 0.36)
        symbol = (dv < 0.1) & (du < 0.27)
    elif kind == 1:  # triangle with a mark
        plate, inner = du < v * 0.5, (du < v * 0.5 - 0.14) & (v < 0.9)
        symbol = (du < 0.07) & _band(v, 0.4, 0.8)
    elif kind == 2:  # board with chevrons
        plate, inner = (du < 0.5) & (dv < 0.4), (du < 0.42) & (dv < 0.32)
        symbol = _frac(u * 2 + 2 * dv) < 0.5
    else:  # three lamps
        plate, inner = du < 0.24, du < 0
        symbol = _disc(u, _frac(v * 3), 0.5, 0.5, 0.16, 0.36)
    part = plate.astype(np.uint8)
    part[inner] = 2
    part[symbol & plate & (inner | (kind == 3))] = 3
    return part, np.ones_like(u)


def _tree(u: Floats, v: Floats, salt: int) -> tuple[Parts, Floats]:
    part = (np.abs(u - 0.5) < 0.05 + 0.05 * v * v).astype(np.uint8)
    part[v < 0.3] = 0
    leaf = _grain(u * 22, v * 22, salt)
    shade = np.where(part == 1, 0.5 + 0.6 * _grain(u * 60, v * 4, salt), 0.45 + 1.1 * leaf)
    draw = _Draw(salt)
    for _ in range(5):
        cu, cv = draw.between(0.28, 0.72), draw.between(0.2, 0.48)
        r = draw.between(0.18, 0.27)
        a, b = (u - cu) / r, (v - cv) / (0.8 * r)
        part[a * a + b * b + 0.5 * leaf < 1.25] = 2
    shade = np.where(part == 2, 0.45 + 1.1 * leaf - 0.35 * (v - 0.3), shade)
    return part, shade


def _car_side(u: Floats, v: Floats, salt: int) -> tuple[Parts, Floats]:
    cabin = (v > 0.04) & (v < 0.5) & (np.abs(u - 0.52) < 0.22 + 0.28 * v)
    body = _band(v, 0.4, 0.86) & (np.abs(u - 0.5) < 0.5 - 0.1 * np.abs(v - 0.62))
    part = (cabin | body).astype(np.uint8)
    glass = (v > 0.1) & (v < 0.43) & (np.abs(u - 0.52) < 0.17 + 0.26 * v) & (np.abs(u - 0.5) > 0.02)
    part[glass] = 2
    for cu in (0.22, 0.78):
        part[_disc(u, v, cu, 0.82, 0.105, 0.3) & (v > 0.5)] = 3
        part[_disc(u, v, cu, 0.82, 0.055, 0.16) & (v > 0.5)] = 4
    part[_band(v, 0.48, 0.6) & ((np.abs(u - 0.02) < 0.03) | (np.abs(u - 0.98) < 0.03)) & body] = 4
    part[v > 0.99] = 0
    return part, 1.25 - 0.6 * v + 0.25 * _band(v, 0.5, 0.56)


def _car_rear(u: Floats, v: Floats, salt: int) -> tuple[Parts, Floats]:
    du = np.abs(u - 0.5)
    cabin = _band(v, 0.02, 0.5) & (du < 0.33 + 0.2 * v)
    body = _band(v, 0.4, 0.86) & (du < 0.49)
    part = (cabin | body).astype(np.uint8)
    part[_band(v, 0.1, 0.4) & (du < 0.27 + 0.2 * v)] = 2
    part[(v >= 0.84) & _band(du, 0.24, 0.45)] = 3
    part[_band(v, 0.5, 0.64) & _band(du, 0.32, 0.47)] = 4
    part[_band(v, 0.7, 0.8) & (du < 0.16)] = 5
    return part, 1.25 - 0.6 * v + 0.25 * _band(v, 0.42, 0.47)


def _pedestrian(u: Floats, v: Floats, salt: int) -> tuple[Parts, Floats]:
    stride = 0.12 + 0.2 * ((salt >> 3) % 8) / 8
    part = np.zeros(u.shape, np.uint8)
    for foot in (0.5 - stride, 0.5 + stride):
        part[_stroke(u, v, (0.5 + (foot - 0.5) * 0.3, 0.52, foot, 1.0), 0.26)] = 3
    part[_band(v, 0.17, 0.56) & (np.abs(u - 0.5) < 0.34 - 0.25 * np.abs(v - 0.3))] = 2
    part[_disc(u, v, 0.5, 0.095, 0.2, 0.09)] = 1
    part[_disc(u, v, 0.5, 0.06, 0.21, 0.06)] = 4
    return part, np.where(part == 2, 0.7 + 0.6 * (_frac(v * 14) < 0.5), 1.15 - 0.4 * np.abs(u - 0.35))


def _bicyclist(u: Floats, v: Floats, salt: int) -> tuple[Parts, Floats]:
    if salt % 2:
        u = 1 - u
    part, shade = np.zeros(u.shape, np.uint8), np.ones_like(u)
    for cu in (0.22, 0.78):
        a, b = (u - cu) / 0.215, (v - 0.78) / 0.215
        r = a * a + b * b
        part[r < 1] = 1
        spoke = (np.abs(a - b) < 0.16) | (np.abs(a + b) < 0.16)
        shade = np.where(r < 1, np.where((r > 0.6) | spoke, 0.25, 1.2), shade)
    for ends in ((0.22, 0.78, 0.4, 0.5), (0.4, 0.5, 0.7, 0.5), (0.7, 0.45, 0.78, 0.78), (0.48, 0.8, 0.7, 0.5)):
        part[_stroke(u, v, ends, 0.06)] = 2
    part[_stroke(u, v, (0.42, 0.45, 0.55, 0.62), 0.12) | _stroke(u, v, (0.55, 0.62, 0.48, 0.84), 0.1)] = 5
    torso = _stroke(u, v, (0.42, 0.45, 0.55, 0.2), 0.19)
    part[torso] = 3
    part[_stroke(u, v, (0.55, 0.22, 0.72, 0.44), 0.08)] = 3
    part[_disc(u, v, 0.6, 0.09, 0.085, 0.09)] = 4
    shade = np.where(torso, 0.75 + 0.5 * (_frac((u + v) * 9) < 0.5), shade)
    return part, shade


class _Street:
    """One scene being painted, far to near."""

    def __init__(self, seed: int, height: int, width: int) -> None:
        self.draw = _Draw(seed)
        d = self.draw
        self.height, self.width = height, width
        self.horizon = height * d.between(0.3, 0.55)
        self.vanish = width * d.between(0.25, 0.75)
        self.focal = height * 1.1
        self.road = d.between(0.9, 1.8)  # half-width
        self.kerb = self.road + d.between(0.6, 1.2)
        self.y = (np.arange(height, dtype=np.float32) + np.float32(0.5))[:, None]
        self.x = (np.arange(width, dtype=np.float32) + np.float32(0.5))[None, :]
        self.haze = d.colour() * np.float32(0.4) + np.float32(110)
        self.fog = d.between(0.0, 0.025)
        self.image = np.empty((height, width, 3), np.float32)
        self.mask = np.empty((height, width), np.uint8)

    def put(self, rows: slice, cols: slice, where: NDArray[np.bool_], label: int, colour: Floats, depth: Any) -> None:
        """Paint a patch's pixels `where` in `colour` (..., 3), hazy with depth."""
        mist = np.clip(np.float32(self.fog) * depth, 0, 0.8)
        if isinstance(mist, np.ndarray):
            mist = mist[..., None]
        patch = colour + (self.haze - colour) * mist
        self.image[rows, cols] = np.where(where[..., None], patch, self.image[rows, cols])
        self.mask[rows, cols][where] = label

    def sky(self) -> None:
        d = self.draw
        top, low = d.colour() * np.float32(1.1), self.haze
        t = np.clip(self.y / np.float32(self.horizon), 0, 1)[..., None]
        cells = d.noise(8, 8)
        gy, gx = np.broadcast_arrays(self.y * np.float32(10 / self.height), self.x * np.float32(5 / self.width))
        iy, ix = _floor(gy), _floor(gx)
        fy, fx = gy - iy, gx - ix
        fy, fx = fy * fy * (3 - 2 * fy), fx * fx * (3 - 2 * fx)
        at = lambda a, b: cells[(iy + a) % 8, (ix + b) % 8]  # noqa: E731
        cloud = (at(0, 0) * (1 - fx) + at(0, 1) * fx) * (1 - fy) + (at(1, 0) * (1 - fx) + at(1, 1) * fx) * fy
        self.image[:] = (top * (1 - t) + low * t) * (np.float32(0.8) + np.float32(0.4) * cloud[..., None])
        self.mask[:] = SKY

    def ground(self) -> None:
        d = self.draw
        top = int(self.horizon) + 1
        rows, cols = slice(top, None), slice(None)
        s = self.y[rows] - np.float32(self.horizon)
        z = np.float32(self.focal) / s
        side = (self.x - np.float32(self.vanish)) / s
        z = np.broadcast_to(z, side.shape)
        salt = d.salt()
        speck = _grain(side * 24, z * 24, salt)
        shade = np.float32(0.75) + np.float32(0.5) * speck
        line = (np.abs(side) < 0.05) & (_frac(z * np.float32(0.4)) < 0.5)
        edge = _band(np.abs(side), self.road - 0.14, self.road - 0.08)
        colour = d.colour() * shade[..., None]
        paint = d.colour() + np.float32(60)
        colour = np.where((line | edge)[..., None], paint, colour)
        self.put(rows, cols, np.ones_like(speck, bool), ROAD, colour, z)
        tile_u, tile_v = side * np.float32(3), z * np.float32(3)
        shade = np.float32(0.75) + np.float32(0.5) * _grain(tile_u, tile_v, salt + 1)
        joint = (_frac(tile_u) < 0.15) | (_frac(tile_v) < 0.15)
        shade = np.where(joint, np.float32(0.5), shade)
        shade = np.where(np.abs(side) < self.road + 0.1, np.float32(1.5), shade)
        self.put(rows, cols, np.abs(side) > self.road, PAVEMENT, d.colour() * shade[..., None], z)

    def wall(self, side: int, lateral: float, top: Callable[..., Any]) -> None:
        """Paint a wall along the street: `top(z, rise)` gives where it is, and its colour."""
        cols = slice(int(self.vanish) + 2, None) if side > 0 else slice(0, max(int(self.vanish) - 2, 0))
        s = np.abs(self.x[:, cols] - np.float32(self.vanish)) / np.float32(lateral)
        rise = (np.float32(self.horizon) + s - self.y) / s
        z = np.broadcast_to(np.float32(self.focal) / s, rise.shape)
        where, colour, label = top(z, rise)
        self.put(slice(None), cols, where & (rise > 0), label, colour, z)

    def houses(self, side: int) -> None:
        d = self.draw
        n = 16
        length = np.float32(d.between(3.0, 6.0))
        shift = np.float32(d.between(0, 1))
        tall = np.float32(1.8) + 4 * d.noise(n)
        tall[d.noise(n) < 0.25] = 0
        walls = np.stack([d.colour() for _ in range(n)])
        panes = np.stack([d.colour() * np.float32(0.6) for _ in range(n)])
        step = np.float32(0.8) + np.float32(0.5) * d.noise(n)
        salt = d.salt()

        def top(z: Floats, rise: Floats) -> Any:
            k = np.clip(_floor(z / length + shift), 0, n - 1)
            a, b = z / step[k], rise / (np.float32(1.1) * step[k])
            pane = _band(_frac(a), 0.25, 0.75) & _band(_frac(b), 0.3, 0.8)
            bar = (np.abs(_frac(a) - 0.5) < 0.04) | (np.abs(_frac(b) - 0.55) < 0.04)
            row = np.floor(rise * 8)
            brick = np.float32(0.8) + np.float32(0.4) * _grain(z * 4 + row * np.float32(0.5), row, salt)
            colour = np.where((pane & ~bar)[..., None], panes[k], walls[k] * brick[..., None])
            return rise < tall[k], colour, BUILDING

        self.wall(side, self.kerb, top)

    def fence(self, side: int) -> None:
        d = self.draw
        near = d.between(1.8, 6)
        far = near + d.between(4, 10)
        tall = d.between(0.6, 1.0)
        bars, gap = d.colour(), d.colour() * np.float32(0.35)
        step = d.between(3, 5)

        def top(z: Floats, rise: Floats) -> Any:
            slat = _frac(z * step) < 0.5
            rail = (np.abs(rise / tall - 0.25) < 0.08) | (np.abs(rise / tall - 0.8) < 0.08)
            colour = np.where((slat | rail)[..., None], bars, gap)
            return (rise < tall) & _band(z, near, far), colour, FENCE

        self.wall(side, self.kerb - 0.1, top)

    def thing(self, shape: Shape, label: int, x: float, s: float, size: tuple[float, float], up: float = 0) -> None:
        """Paint an object `size` (width, height) standing `up` above the ground at column x, where a unit is s pixels."""
        w, h = size[0] * s, size[1] * s
        left, top = x - w / 2, self.horizon + s * (1 - up) - h
        rows = slice(max(int(top), 0), max(min(int(top + h) + 1, self.height), 0))
        cols = slice(max(int(left), 0), max(min(int(left + w) + 1, self.width), 0))
        u, v = (self.x[:, cols] - np.float32(left)) / np.float32(w), (self.y[rows] - np.float32(top)) / np.float32(h)
        u, v = np.broadcast_arrays(u, v)
        if u.size == 0:
            return
        part, shade = shape(u, v, self.draw.salt())
        part = np.where((u < 0) | (u > 1) | (v < 0) | (v > 1), 0, part)
        colours = np.stack([self.draw.colour() for _ in range(6)])
        self.put(rows, cols, part > 0, label, colours[part] * shade.astype(np.float32)[..., None], self.focal / s)

    def things(self) -> None:
        d = self.draw
        kinds = [CAR] * (1 + d.below(3)) + [PEDESTRIAN] * (2 + d.below(2)) + [BICYCLIST] * (1 + d.below(2))
        kinds += [TREE] * (1 + d.below(3)) + [POLE] * (2 + d.below(2))
        todo = sorted((d.between(0.16, 0.42) * self.height, i, kind) for i, kind in enumerate(kinds))
        for s, _, kind in todo:
            side = d.sign()
            at = lambda lateral: self.vanish + side * lateral * s  # noqa: B023, E731
            if kind == CAR:
                lateral = d.between(0.3, self.road)
                if d.below(2):
                    self.thing(_car_side, CAR, at(lateral), s, (2.7, 0.95))
                else:
                    self.thing(_car_rear, CAR, at(lateral), s, (1.25, 1.0))
            elif kind == PEDESTRIAN:
                self.thing(_pedestrian, kind, at(d.between(self.road * 0.7, self.kerb)), s, (0.42, 1.25))
            elif kind == BICYCLIST:
                self.thing(_bicyclist, kind, at(d.between(0.2, self.road)), s, (1.2, 1.3))
            elif kind == TREE:
                self.thing(_tree, kind, at(self.kerb - 0.2), s, (2.6, 3.2))
            else:
                x = at(self.road + 0.15)
                self.thing(_pole, POLE, x, s, (0.22, 2.7))
                self.thing(_sign, SIGN, x, s, (0.75, 0.75), up=1.8)


def scene(seed: int, height: int, width: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    street = _Street(seed, 2 * height, 2 * width)
    street.sky()
    street.ground()
    for side in (-1, 1):
        street.houses(side)
        street.fence(side)
    street.things()
    d = street.draw
    light = np.float32(d.between(0.65, 1.3)) * (np.float32(0.9) + np.float32(0.2) * d.noise(3))
    big = street.image
    image = (big[::2, ::2] + big[1::2, ::2] + big[::2, 1::2] + big[1::2, 1::2]) * np.float32(0.25) * light
    image = image + (d.noise(height, width, 3) - np.float32(0.5)) * np.float32(24)
    return np.clip(image, 0, 255).astype(np.uint8), street.mask[1::2, 1::2].copy()
