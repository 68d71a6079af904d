"""Page pictures drawn while training, and the questions asked about them.

A page is 224 x 224 pixels and shows widgets with one word each, every word at most once. Two kinds of question exist:
`Where is WORD`, answered by the widget's box, and `Read BOX`, answered by the word in it.
"""

import colorsys
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from examples.words import FILLER_WORDS, PAGE_SIZE, WORDS, box_text

TRAINING_FONTS: dict[str, tuple[str, str]] = {
    "DejaVu Sans": ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf"),
    "Liberation Sans": ("LiberationSans-Regular.ttf", "LiberationSans-Bold.ttf"),
    "Noto Sans": ("NotoSans-Regular.ttf", "NotoSans-Bold.ttf"),
    "DejaVu Serif": ("DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf"),
    "Liberation Serif": ("LiberationSerif-Regular.ttf", "LiberationSerif-Bold.ttf"),
    "Liberation Mono": ("LiberationMono-Regular.ttf", "LiberationMono-Bold.ttf"),
}
"""Font families of the training pages: the files of the regular and the bold face."""

HELD_OUT_FONT = "Noto Serif"
"""A family that no training page uses."""

FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "/Library/Fonts", "C:/Windows/Fonts")

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Widget:
    """One thing to ask about.

    Attributes:
        kind: `button`, `link`, `field`, `item`, `check`, `tab` or `heading`.
        word: the word it shows.
        box: left, top, right and bottom edge in pixels.
    """

    kind: str
    word: str
    box: Box


@dataclass(frozen=True)
class Screen:
    """A page with its widgets and the place of each letter.

    Attributes:
        picture: [224, 224, 3] bytes.
        widgets: what is on it.
        letters: every letter shown and its box in pixels, running text included.
    """

    picture: np.ndarray
    widgets: tuple[Widget, ...]
    letters: tuple[tuple[str, Box], ...]


@dataclass(frozen=True)
class Question:
    """A question about a screen, its answer, and the widget that it is about."""

    kind: str
    text: str
    answer: str
    widget: Widget


def where_question(widget: Widget) -> Question:
    """Ask for the box of a word; the word comes last."""
    return Question("where", f"Where is {widget.word}", box_text(widget.box), widget)


def read_question(widget: Widget) -> Question:
    """Ask for the word in a box; the box comes last."""
    return Question("read", f"Read {box_text(widget.box)}", widget.word, widget)


@lru_cache(maxsize=1)
def _font_files() -> dict[str, Path]:
    return {path.name: path for folder in FONT_FOLDERS for path in Path(folder).rglob("*.[to]tf")}


@lru_cache(maxsize=512)
def load_font(family: str, bold: bool, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return a face of one of the training families; Pillow's own font where the machine lacks it."""
    path = _font_files().get(TRAINING_FONTS[family][bold])
    return ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)


def _shade(rng: random.Random, light: tuple[float, float], saturation: tuple[float, float]) -> tuple[int, int, int]:
    red, green, blue = colorsys.hls_to_rgb(rng.random(), rng.uniform(*light), rng.uniform(*saturation))
    return round(255 * red), round(255 * green), round(255 * blue)


@dataclass
class _Page:
    """A page being drawn: a theme, a pencil and what was drawn so far."""

    rng: random.Random
    image: Image.Image = field(init=False)
    widgets: list[Widget] = field(default_factory=list)
    letters: list[tuple[str, Box]] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = self.rng
        self.dark = rng.random() < 0.2
        light = (0.08, 0.2) if self.dark else (0.9, 1.0)
        self.background = (255, 255, 255) if not self.dark and rng.random() < 0.4 else _shade(rng, light, (0, 0.4))
        self.ink = _shade(rng, (0.8, 1.0) if self.dark else (0.0, 0.3), (0, 0.5))
        self.grey = _shade(rng, (0.6, 0.75) if self.dark else (0.35, 0.5), (0, 0.2))
        self.accent = _shade(rng, (0.6, 0.75) if self.dark else (0.3, 0.45), (0.4, 1.0))
        self.panel = _shade(rng, (0.15, 0.32) if self.dark else (0.8, 0.97), (0, 0.4))
        self.border = _shade(rng, (0.35, 0.55) if self.dark else (0.45, 0.8), (0, 0.3))
        self.family = rng.choice(list(TRAINING_FONTS))
        self.size = rng.choice((10, 10, 11, 11, 11, 12, 12, 13))
        self.radius = rng.choice((0, 0, 2, 3, 4, 6))
        self.bold = rng.random() < 0.15
        self.padding = (rng.randint(4, 12), rng.randint(3, 7))
        self.filled = rng.random() < 0.5
        self.underlined = rng.random() < 0.5
        self.image = Image.new("RGB", (PAGE_SIZE, PAGE_SIZE), self.background)
        self.pencil = ImageDraw.Draw(self.image)
        self.words = rng.sample(WORDS, 24)

    def text(self, text: str, x: float, y: float, height: float, color: tuple[int, int, int], bold: bool,
             size: int) -> None:  # fmt: skip
        """Write a text whose line is `height` high and note where its letters are."""
        font = load_font(self.family, bold, size)
        ascent, descent = font.getmetrics() if isinstance(font, ImageFont.FreeTypeFont) else (size, 2)
        top = round(y + (height - ascent - descent) / 2)
        self.pencil.text((x, top), text, font=font, fill=color)
        left = x
        for index, letter in enumerate(text):
            right = x + font.getlength(text[: index + 1])
            if letter != " ":
                self.letters.append((letter, (left, top, right, top + ascent + descent)))
            left = right

    def measure(self, kind: str, word: str) -> "_Plan":
        """Choose the size of a widget before it is placed."""
        rng = self.rng
        size = rng.randint(17, 26) if kind == "heading" else self.size
        bold = (kind == "heading" and rng.random() < 0.7) or self.bold
        font = load_font(self.family, bold, size)
        width = font.getlength(word)
        line = size * rng.uniform(1.15, 1.5)
        pad_x, pad_y = self.padding
        if kind == "link":
            pad_x, pad_y = rng.choice(((0, 0), (0, 2), (3, 2), (4, 3)))
        elif kind in ("heading", "check"):
            pad_x, pad_y = 0, 1
        elif kind == "field":
            pad_x = rng.randint(3, 7)
        mark = size if kind == "check" else 0
        extra = rng.uniform(10, 70) if kind == "field" else 0
        return _Plan(kind, word, width + 2 * pad_x + mark + (4 if mark else 0) + extra, line + 2 * pad_y, pad_x, mark,
                     size, bold)  # fmt: skip

    def place(self, plan: "_Plan", x: float, y: float, width: float | None = None, bar: bool = False) -> None:
        """Draw a widget with its top left corner at (x, y)."""
        rng, pencil = self.rng, self.pencil
        stretched = width is not None and plan.kind != "heading"
        width = width if stretched and width is not None else plan.width
        x, y, width, height = (float(round(value)) for value in (x, y, width, plan.height))
        box = (x, y, x + width, y + height)
        corner = (x, y, x + width - 1, y + height - 1)
        ink, fill = self.ink, None
        text_x = x + plan.pad_x
        if plan.kind == "button":
            fill = self.accent if self.filled else self.panel
            ink = self.background if self.filled else self.ink
            pencil.rounded_rectangle(corner, self.radius, fill=fill, outline=self.border)
            text_x = x + (width - plan.width) / 2 + plan.pad_x
        elif plan.kind == "field":
            fill = (255, 255, 255) if not self.dark else self.panel
            ink = self.grey if rng.random() < 0.6 else self.ink
            pencil.rounded_rectangle(corner, self.radius, fill=fill, outline=self.border)
        elif plan.kind == "item":
            ink = self.ink
            if rng.random() < 0.6:
                pencil.rectangle(corner, fill=self.panel)
            pencil.line((x, y + height - 1, x + width - 1, y + height - 1), fill=self.border)
        elif plan.kind == "tab":
            ink = self.accent
            pencil.rectangle((x, y + height - 2, x + width - 1, y + height - 1), fill=self.accent)
        elif plan.kind == "check":
            middle = y + height / 2
            mark = (x, round(middle - plan.mark / 2), x + plan.mark - 1, round(middle + plan.mark / 2) - 1)
            if rng.random() < 0.5:
                pencil.rounded_rectangle(mark, 2, outline=self.border, fill=(255, 255, 255))
            else:
                pencil.ellipse(mark, outline=self.border, fill=(255, 255, 255))
            text_x += plan.mark + 4
        elif plan.kind == "link":
            ink = self.accent
            if self.underlined:
                line_y = round(y + height / 2 + plan.size * 0.45)
                pencil.line((text_x, line_y, x + width - plan.pad_x, line_y), fill=ink)
        if bar and plan.kind != "button":
            ink = self.bar_ink
        self.text(plan.word, text_x, y, height, ink, plan.bold, plan.size)
        self.widgets.append(Widget(plan.kind, plan.word, box))

    @property
    def bar_ink(self) -> tuple[int, int, int]:
        """Text colour on the accent colour."""
        return self.background

    def clutter(self) -> None:
        """Draw panels and rules that mean nothing."""
        rng = self.rng
        for _ in range(rng.choice((0, 0, 1, 2, 4))):
            x, y = rng.randint(-5, PAGE_SIZE - 20), rng.randint(-5, PAGE_SIZE - 20)
            corner = (x, y, x + rng.randint(30, 210), y + rng.randint(15, 160))
            fill = rng.choice((self.panel, self.background, None))
            self.pencil.rounded_rectangle(corner, self.radius, fill=fill, outline=rng.choice((self.border, None)))
        for _ in range(rng.choice((0, 0, 1, 3, 6))):
            x, y, length = rng.randint(0, PAGE_SIZE), rng.randint(0, PAGE_SIZE), rng.randint(30, PAGE_SIZE)
            end = (x + length, y) if rng.random() < 0.8 else (x, y + length)
            self.pencil.line((x, y, *end), fill=self.border)

    def running_text(self, x: float, y: float, width: float, lines: int) -> None:
        """Write lines of words that no question asks about."""
        font = load_font(self.family, False, self.size)
        for index in range(lines):
            line = ""
            while font.getlength(line + " ....") < width:
                line += (" " if line else "") + self.rng.choice(FILLER_WORDS)
                if self.rng.random() < 0.1:
                    break
            while font.getlength(line) > width and " " in line:
                line = line.rsplit(" ", 1)[0]
            self.text(line, x, y + index * self.size * 1.3, self.size * 1.3, self.grey, False, self.size)


@dataclass(frozen=True)
class _Plan:
    kind: str
    word: str
    width: float
    height: float
    pad_x: float
    mark: int
    size: int
    bold: bool


SMALL_KINDS = ("button", "button", "button", "link", "link", "field", "check", "tab")


def _scatter(page: _Page) -> None:
    rng = page.rng
    taken: list[Box] = []
    page.clutter()
    for _ in range(rng.choice((0, 0, 2, 6))):
        x, y = rng.uniform(1, PAGE_SIZE - 60), rng.uniform(1, PAGE_SIZE - 16)
        box = (x - 2, y - 1, x + 58, y + page.size * 1.4)
        if not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
            page.running_text(x, y, 55, 1)
            taken.append(box)
    for _ in range(rng.randint(5, 16)):
        kinds = (*SMALL_KINDS, "heading") if rng.random() < 0.3 else SMALL_KINDS
        plan = page.measure(rng.choice(kinds), page.words[-1])
        for _ in range(8):
            x = rng.uniform(1, PAGE_SIZE - plan.width - 1)
            y = rng.uniform(1, PAGE_SIZE - plan.height - 1)
            box = (x - 3, y - 2, x + plan.width + 3, y + plan.height + 2)
            if x > 0 and not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
                page.place(plan, x, y)
                page.words.pop()
                taken.append(box)
                break


def _flow(page: _Page, top: float = 0, left: float = 0, right: float = PAGE_SIZE) -> None:
    rng = page.rng
    kinds = rng.choice((("button",), ("link",), ("button", "link"), ("tab",), ("check",), SMALL_KINDS))
    gap_x, gap_y = rng.uniform(3, 14), rng.uniform(2, 14)
    y = top + rng.uniform(2, 30)
    while len(page.widgets) < 16:
        x, tallest, first = left + rng.uniform(2, 24), 0.0, True
        for _ in range(rng.randint(1, 5)):
            if not page.words:
                return
            plan = page.measure(rng.choice(kinds), page.words[-1])
            if x + plan.width > right - 2 or y + plan.height > PAGE_SIZE - 2:
                break
            page.place(plan, x, y)
            page.words.pop()
            x, tallest, first = x + plan.width + gap_x, max(tallest, plan.height), False
        if first:
            return
        y += tallest + gap_y
        if rng.random() < 0.12:
            lines = rng.randint(1, 3)
            if y + lines * page.size * 1.3 < PAGE_SIZE:
                page.running_text(left + rng.uniform(3, 10), y, (right - left) * rng.uniform(0.5, 0.9), lines)
            y += lines * page.size * 1.3 + gap_y


def _columns(page: _Page, top: float = 0) -> None:
    rng = page.rng
    count = rng.choice((1, 2, 2, 3))
    edges = [4 + (PAGE_SIZE - 8) * index / count for index in range(count + 1)]
    for left, right in itertools.pairwise(edges):
        kinds = rng.choice((("item",), ("item",), ("button",), ("field",), ("link",), ("check",)))
        gap, y = rng.uniform(0, 12), top + rng.uniform(2, 40)
        full = rng.random() < 0.6 and kinds[0] in ("item", "button", "field")
        for _ in range(rng.randint(2, 7)):
            if not page.words or len(page.widgets) > 18:
                return
            plan = page.measure(rng.choice(kinds), page.words[-1])
            if y + plan.height > PAGE_SIZE - 2:
                break
            space = right - left - 6
            if plan.width <= space:
                page.place(plan, left, y, max(space, plan.width) if full else None)
                page.words.pop()
            y += plan.height + gap


def _form(page: _Page, top: float = 0) -> None:
    rng = page.rng
    label_width = rng.uniform(40, 80)
    left, y, gap = rng.uniform(4, 20), top + rng.uniform(3, 24), rng.uniform(3, 12)
    for _ in range(rng.randint(2, 6)):
        plan = page.measure(rng.choice(("field", "field", "check")), page.words.pop())
        if y + plan.height > PAGE_SIZE - 30 or left + label_width + plan.width > PAGE_SIZE:
            break
        if rng.random() < 0.8:
            page.text(rng.choice(FILLER_WORDS), left, y, plan.height, page.grey, page.bold, page.size)
        page.place(plan, left + label_width, y)
        y += plan.height + gap
    x = left + rng.choice((0.0, label_width))
    for _ in range(rng.randint(1, 3)):
        plan = page.measure(rng.choice(("button", "button", "link")), page.words.pop())
        if x + plan.width > PAGE_SIZE - 2 or y + plan.height > PAGE_SIZE - 2:
            return
        page.place(plan, x, y)
        x += plan.width + rng.uniform(4, 12)


def _bar(page: _Page) -> float:
    """Draw a bar of links across the top; return its height."""
    rng = page.rng
    height = float(rng.randint(18, 34))
    page.pencil.rectangle((0, 0, PAGE_SIZE, height - 1), fill=page.accent)
    x = rng.uniform(2, 10)
    for _ in range(rng.randint(2, 5)):
        plan = page.measure(rng.choice(("link", "link", "button")), page.words[-1])
        if x + plan.width > PAGE_SIZE - 2 or plan.height > height - 1:
            break
        page.place(plan, x, (height - plan.height) / 2, bar=True)
        page.words.pop()
        x += plan.width + rng.uniform(4, 14)
    return height


def _side(page: _Page, top: float = 0) -> None:
    """Draw a menu at the left and let the rest flow."""
    rng = page.rng
    width = rng.uniform(56, 92)
    page.pencil.rectangle((0, top, width, PAGE_SIZE), fill=page.panel)
    y, gap = top + rng.uniform(2, 12), rng.uniform(0, 6)
    for _ in range(rng.randint(3, 8)):
        plan = page.measure(rng.choice(("item", "link")), page.words[-1])
        if y + plan.height > PAGE_SIZE - 2:
            break
        if plan.width < width - 4:
            page.place(plan, 2, y, width - 4 if plan.kind == "item" else None)
            page.words.pop()
        y += plan.height + gap
    _flow(page, top, left=width + 4)


LAYOUTS: tuple[Callable[..., None], ...] = (_flow, _columns, _form, _side)


def draw_screen(rng: random.Random) -> Screen:
    """Draw a page of random widgets in a random layout.

    Args:
        rng: decides everything; equal states draw equal pages.
    """
    while True:
        page = _Page(rng)
        if rng.random() < 0.4:
            _scatter(page)
        else:
            if rng.random() < 0.3:
                page.clutter()
            top = _bar(page) if rng.random() < 0.35 else 0.0
            rng.choice(LAYOUTS)(page, top)
        if len(page.widgets) >= 3:
            return Screen(np.asarray(page.image), tuple(page.widgets), tuple(page.letters))
