"""Bar charts of ratios, drawn with Pillow."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from early_fusion_seg.visualize import INK, PAPER

BAR, LINE = (66, 112, 178), (170, 170, 176)
EM, ROW, LENGTH = 16, 30, 420
"""Font size, distance between bars, length of the longest bar, in pixels."""


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
