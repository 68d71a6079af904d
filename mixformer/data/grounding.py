"""Boxes in answers: ``[[x0,y0,x1,y1]]`` in thousandths of the picture, read, written, measured and drawn.

CogVLM and CogAgent answer grounding questions with integers 000 to 999 relative to width and height, origin
at the top left, several boxes of one phrase separated by semicolons (arXiv:2311.03079, section 2.2;
arXiv:2312.08914, section 2.3).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

from PIL import Image, ImageDraw, ImageFont

from mixformer.images import ImageSource, load_image

_GROUP = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
_BOX = re.compile(r"([0-9]{1,3}),([0-9]{1,3}),([0-9]{1,3}),([0-9]{1,3})")
_POINT = re.compile(r"([0-9]{1,3}),([0-9]{1,3})")
# Told apart by people with any common colour vision, readable under white text (after Wong, Nature Methods 8,
# 441).
_COLOURS = ((213, 0, 90), (0, 98, 178), (0, 120, 80), (176, 72, 0), (120, 60, 160), (90, 90, 0))


def _check_thousandths(values: Sequence[int], what: str) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 999:
            raise ValueError(f"{what} needs whole thousandths from 0 to 999, got {tuple(values)}")


@dataclass(frozen=True)
class Box:
    """A rectangle in thousandths of a picture's width and height, origin at the top left.

    ``str(box)`` is the form that models write: ``[[012,034,560,789]]``.

    Raises:
        ValueError: values outside 0..999, or a right or lower edge before the left or upper one.
    """

    x0: int
    y0: int
    x1: int
    y1: int

    def __post_init__(self) -> None:
        _check_thousandths(astuple(self), "a box")
        if self.x1 < self.x0 or self.y1 < self.y0:
            raise ValueError(f"a box runs from its upper left to its lower right corner, got {astuple(self)}")

    @classmethod
    def from_pixels(cls, x0: float, y0: float, x1: float, y1: float, width: float, height: float) -> Box:
        """Make a box of pixel coordinates in a picture of width x height, rounded and kept inside it."""
        return cls(_thousandth(x0, width), _thousandth(y0, height), _thousandth(x1, width), _thousandth(y1, height))

    def pixels(self, width: float, height: float) -> tuple[float, float, float, float]:
        """Pixel coordinates x0, y0, x1, y1 in a picture of width x height, not rounded."""
        return (
            self.x0 * width / 1000,
            self.y0 * height / 1000,
            self.x1 * width / 1000,
            self.y1 * height / 1000,
        )

    def __str__(self) -> str:
        return format_boxes([self])


@dataclass(frozen=True)
class Point:
    """A place in thousandths of a picture's width and height, origin at the top left.

    Raises:
        ValueError: values outside 0..999.
    """

    x: int
    y: int

    def __post_init__(self) -> None:
        _check_thousandths(astuple(self), "a point")

    @classmethod
    def from_pixels(cls, x: float, y: float, width: float, height: float) -> Point:
        """Make a point of pixel coordinates in a picture of width x height, rounded and kept inside it."""
        return cls(_thousandth(x, width), _thousandth(y, height))

    def pixels(self, width: float, height: float) -> tuple[float, float]:
        """Pixel coordinates x, y in a picture of width x height, not rounded."""
        return self.x * width / 1000, self.y * height / 1000

    def __str__(self) -> str:
        return f"[[{self.x:03d},{self.y:03d}]]"


def _thousandth(value: float, size: float) -> int:
    if size <= 0:
        raise ValueError(f"a picture's width and height must be positive, got {size}")
    return min(max(round(value * 1000 / size), 0), 999)


def _pieces(text: str, pattern: re.Pattern[str]) -> Iterable[tuple[int, ...]]:
    for group in _GROUP.findall(text):
        for piece in group.split(";"):
            if match := pattern.fullmatch(piece.strip()):
                yield tuple(int(number) for number in match.groups())


def parse_boxes(text: str) -> list[Box]:
    """Find the boxes in an answer.

    Args:
        text: an answer, with any number of ``[[x0,y0,x1,y1;...]]`` groups.

    Returns:
        The boxes in the order of the text. Pieces that are no box (other characters, another count of
        numbers, more than three digits, corners in the wrong order) are left out.
    """
    return [Box(*piece) for piece in _pieces(text, _BOX) if piece[0] <= piece[2] and piece[1] <= piece[3]]


def parse_points(text: str) -> list[Point]:
    """Find the points ``[[x,y]]`` in an answer, in the order of the text; other pieces are left out."""
    return [Point(*piece) for piece in _pieces(text, _POINT)]


def format_boxes(boxes: Iterable[Box]) -> str:
    """Write boxes as models do: ``[[012,034,560,789;000,000,999,999]]``; an empty string for no boxes."""
    pieces = [",".join(f"{value:03d}" for value in astuple(box)) for box in boxes]
    return f"[[{';'.join(pieces)}]]" if pieces else ""


def intersection_over_union(first: Box | Sequence[float], second: Box | Sequence[float]) -> float:
    """Shared area of two boxes over the area they cover together.

    Args:
        first: a box, or its x0, y0, x1, y1 in any unit.
        second: the other one, in the same unit.

    Returns:
        0 (apart, or both without area) to 1 (equal).
    """
    a: tuple[float, ...] = astuple(first) if isinstance(first, Box) else tuple(first)
    b: tuple[float, ...] = astuple(second) if isinstance(second, Box) else tuple(second)
    if len(a) != 4 or len(b) != 4:
        raise ValueError(f"a box has four values x0, y0, x1, y1, got {len(a)} and {len(b)}")
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    total = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return float(shared / total) if total > 0 else 0.0


def draw_boxes(image: ImageSource, boxes: Sequence[Box], labels: Sequence[str] | None = None) -> Image.Image:
    """Draw boxes on a copy of a picture.

    Each frame is a coloured line between a white and a black one, so that it shows on light and on dark
    screens; it lies around the box where the picture leaves room. Labels are white on the frame's colour,
    above the box, below it where there is no room above, inside it where there is none below; they are
    shortened rather than cut by the border.

    Args:
        image: anything `load_image` takes; never changed.
        boxes: what to draw.
        labels: a text for each box.

    Returns:
        An RGB image of the same size.

    Raises:
        ValueError: labels that differ in number from the boxes; a picture that cannot be read.
    """
    if labels is not None and len(labels) != len(boxes):
        raise ValueError(f"{len(labels)} label(s) for {len(boxes)} box(es): give one label per box, or none")
    picture = load_image(image).copy()
    draw = ImageDraw.Draw(picture)
    line = max(2, round(min(picture.size) / 200))
    frames = [_frame(box, picture.size, line) for box in boxes]
    for number, frame in enumerate(frames):
        lines = (((0, 0, 0), 0, 1), (_colour(number), 1, line), ((255, 255, 255), 1 + line, 1))
        for colour, inset, width in lines:
            x0, y0, x1, y1 = frame[0] + inset, frame[1] + inset, frame[2] - inset, frame[3] - inset
            if x1 > x0 and y1 > y0:
                draw.rectangle((x0, y0, x1, y1), outline=colour, width=width)
    for number, label in enumerate(labels or ()):  # after all frames, so that no frame crosses a label
        _draw_label(draw, label, frames[number], picture.size, _colour(number))
    return picture


def _colour(number: int) -> tuple[int, int, int]:
    return _COLOURS[number % len(_COLOURS)]


def _frame(box: Box, size: tuple[int, int], line: int) -> tuple[int, int, int, int]:
    """Outer corners of the frame around a box: outside it by its thickness, but inside the picture."""
    width, height = size
    x0, y0, x1, y1 = box.pixels(width, height)
    outset = line + 2
    right, lower = min(round(x1) + outset, width - 1), min(round(y1) + outset, height - 1)
    return max(min(round(x0) - outset, right), 0), max(min(round(y0) - outset, lower), 0), right, lower


def _draw_label(
    draw: ImageDraw.ImageDraw,
    label: str,
    frame: tuple[int, int, int, int],
    size: tuple[int, int],
    colour: tuple[int, int, int],
) -> None:
    width, height = size
    font = ImageFont.load_default(size=min(max(12, min(size) / 40), max(height / 3, 4)))
    margin = 2
    text = " ".join(label.split())
    while text and draw.textlength(text, font=font) + 2 * margin > width:
        text = text[:-2] + "…" if len(text) > 2 else ""
    if not text:
        return
    ascent, descent = font.getmetrics() if isinstance(font, ImageFont.FreeTypeFont) else (10, 2)
    text_width = int(draw.textlength(text, font=font)) + 1 + 2 * margin
    text_height = ascent + descent + margin
    x = min(max(frame[0], 0), width - text_width)
    places = (frame[1] - text_height, frame[3] + 1, frame[1])
    y = next((place for place in places if 0 <= place <= height - text_height), 0)
    draw.rectangle((x, y, x + text_width - 1, y + text_height - 1), fill=colour)
    draw.text((x + margin, y + margin // 2), text, fill=(255, 255, 255), font=font)


def snap_coordinates(text: str, grid: int) -> str:
    """Round every box and point in a text to a picture of `grid` x `grid` pixels.

    Args:
        text: any text; what stands in ``[[...]]`` and is no number stays.
        grid: pixels per side, at most 1000.

    Returns:
        The text with each number replaced by the nearest thousandth that stands for a pixel's edge.
    """

    def nearest(number: re.Match[str]) -> str:
        pixel = min(round(int(number.group()) * grid / 1000), grid - 1)
        return f"{round(pixel * 1000 / grid):03d}"

    return _GROUP.sub(lambda group: re.sub(r"[0-9]{1,3}", nearest, group.group()), text)
