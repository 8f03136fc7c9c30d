"""Charts drawn with Pillow: bars of ratios, and points."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from early_fusion_seg.visualize import INK, PAPER

BAR, LINE = (66, 112, 178), (170, 170, 176)
EM, ROW, LENGTH = 16, 30, 420
"""Font size, distance between bars, length of the longest bar, in pixels."""
WIDTH, HEIGHT, RADIUS = 640, 400, 5
"""Size of the area of a chart of points, and of a point, in pixels."""


def ratio_bars(rows: list[tuple[str, float]], title: str, path: Path) -> None:
    """Draw one bar for each ratio, with a line at 1.

    Args:
        rows: Name and ratio, not negative, from top to bottom.
        title: Title of the chart.
        path: The PNG; its folder is created if needed.
    """
    font = ImageFont.load_default(EM)
    left = 2 * EM + max(int(font.getlength(name)) for name, _ in rows)
    scale = LENGTH / max(1.0, *(ratio for _, ratio in rows))  # pixels of a ratio of 1
    width = max(left + LENGTH + 5 * EM, 2 * EM + int(font.getlength(title)))
    one = left + round(scale)
    top, bottom = 3 * EM, 3 * EM + len(rows) * ROW
    paper = Image.new("RGB", (width, bottom + 2 * EM), PAPER)
    draw = ImageDraw.Draw(paper)
    draw.text((EM, 2 * EM), title, INK, font, anchor="ls")
    for i, (name, ratio) in enumerate(rows):
        middle = top + i * ROW + ROW // 2
        end = left + round(ratio * scale)
        draw.text((left - EM // 2, middle), name, INK, font, anchor="rm")
        draw.rectangle((left, middle - ROW // 3, end, middle + ROW // 3), BAR)
        x = one if one - 4 * EM < end <= one else end  # the number does not cross the line
        draw.text((x + EM // 2, middle), f"{ratio:.3g}", INK, font, anchor="lm")
    draw.line((one, top, one, bottom), LINE, 2)
    draw.text((one, bottom + EM), "1", INK, font, anchor="mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    paper.quantize(32).save(path, optimize=True)  # few colors make a small file


def scatter(points: list[tuple[str, float, float]], x_title: str, y_title: str, path: Path) -> None:
    """Draw named points in axes that start at 0 (x) and at the multiple of 10 below the lowest point (y).

    Args:
        points: Name, x (positive) and y.
        x_title: Title of the x axis.
        y_title: Title of the y axis.
        path: The PNG; its folder is created if needed.
    """
    font = ImageFont.load_default(EM)
    left, top = 4 * EM, 3 * EM
    lowest = 10 * (min(y for *_, y in points) // 10)
    highest = 10 * (max(y for *_, y in points) // 10 + 1)
    longest = 1.05 * max(x for _, x, _ in points)
    unit = 10 ** len(str(int(longest / 2)))
    unit = next(u for u in (unit / 10, unit / 5, unit / 2, unit) if longest / u <= 6)  # at most 6 marks
    paper = Image.new("RGB", (left + WIDTH + 2 * EM, top + HEIGHT + 4 * EM), PAPER)
    draw = ImageDraw.Draw(paper)

    def at(x: float, y: float) -> tuple[float, float]:
        return left + WIDTH * x / longest, top + HEIGHT * (highest - y) / (highest - lowest)

    for i in range(int((highest - lowest) / 10) + 1):
        y = lowest + 10 * i
        draw.line((at(0, y), at(longest, y)), LINE)
        draw.text((left - EM // 2, at(0, y)[1]), f"{y:g}", INK, font, anchor="rm")
    for i in range(int(longest / unit) + 1):
        draw.text((at(unit * i, lowest)[0], top + HEIGHT + EM), f"{unit * i:g}", INK, font, anchor="mm")
    draw.text((EM, 2 * EM), y_title, INK, font, anchor="ls")
    draw.text((left + WIDTH, top + HEIGHT + 3 * EM), x_title, INK, font, anchor="rs")
    for name, *values in points:
        x, y = at(*values)
        draw.ellipse((x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS), BAR)
        before = x + EM + font.getlength(name) > left + WIDTH  # no space behind the point
        draw.text((x - EM if before else x + EM, y), name, INK, font, anchor="rm" if before else "lm")
    path.parent.mkdir(parents=True, exist_ok=True)
    paper.quantize(32).save(path, optimize=True)
