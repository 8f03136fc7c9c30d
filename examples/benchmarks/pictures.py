"""Bar charts of ratios and points in a plane, drawn with Pillow."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from early_fusion_seg.visualize import INK, PAPER

BAR, LINE = (66, 112, 178), (170, 170, 176)
EM, ROW, LENGTH = 16, 30, 420
"""Height of letters, distance of two bars, length of the longest one, in pixels."""


def ratio_bars(rows: list[tuple[str, float]], title: str, path: Path) -> None:
    """Draw one bar for each ratio, with a line at 1.

    Args:
        rows: Name and ratio, not negative, from top to bottom.
        title: What the ratios are, and which way is good.
        path: The PNG; its folder is made where needed.
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
        place = one if one - 4 * EM < end <= one else end  # not across the line
        draw.text((place + EM // 2, middle), f"{ratio:.3g}", INK, font, anchor="lm")
    draw.line((one, top, one, bottom), LINE, 2)
    draw.text((one, bottom + EM), "1", INK, font, anchor="mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    paper.quantize(32).save(path, optimize=True)  # few colors make a small file


def points(named: list[tuple[str, float, float]], axes: tuple[str, str], path: Path) -> None:
    """Draw named points in a plane; the names stand right of their points, moved down where they would meet.

    Args:
        named: Name, x from 0 up, and y.
        axes: What x and y are.
        path: The PNG; its folder is made where needed.
    """
    font = ImageFont.load_default(EM)
    side, left, top = LENGTH, 5 * EM, 3 * EM
    right = max(x for _, x, _ in named)
    low, high = min(y for *_, y in named), max(y for *_, y in named)
    paper = Image.new("RGB", (left + side + 24 * EM, top + side + 4 * EM), PAPER)
    draw = ImageDraw.Draw(paper)
    draw.text((EM, 2 * EM), axes[1], INK, font, anchor="ls")
    draw.text((left + side, top + side + 3 * EM), axes[0], INK, font, anchor="rs")
    draw.line((left, top, left, top + side, left + side, top + side), LINE, 2)
    for part in (0, 0.5, 1):
        x, y = left + round(part * side), top + round((1 - part) * side)
        draw.text((x, top + side + EM), f"{part * right:.0f}", INK, font, anchor="mm")
        draw.text((left - EM // 2, y), f"{low + part * (high - low):.1f}", INK, font, anchor="rm")
    written: list[tuple[int, int]] = []  # left end and height of the names
    for name, x, y in sorted(named, key=lambda point: -point[2]):
        center = left + round(x / right * side), top + round((high - y) / ((high - low) or 1) * side)
        line = center[1]
        while any(abs(line - other) < EM and abs(center[0] - start) < side for start, other in written):
            line += 1
        written.append((center[0], line))
        draw.ellipse((center[0] - 5, center[1] - 5, center[0] + 5, center[1] + 5), BAR)
        draw.line((*center, center[0] + EM, line), LINE)
        draw.text((center[0] + EM, line), name, INK, font, anchor="lm")
    path.parent.mkdir(parents=True, exist_ok=True)
    paper.quantize(32).save(path, optimize=True)
