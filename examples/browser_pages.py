"""Pages rendered by headless Chromium, with boxes read from its document tree.

    python -m examples.browser_pages training FOLDER --pages 4096
    python -m examples.browser_pages held_out examples/cogagent-mini/heldout
    python -m examples.browser_pages screenshot examples/screenshot.png

One start of the browser renders a sheet of 64 pages. Training pages and held-out pages share the kinds of widget; their
layouts and seeds are disjoint, and so are the font and the words of two of the held-out parts.
"""

import argparse
import html
import json
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from examples.screens import HELD_OUT_FONT, TRAINING_FONTS, Screen, Widget
from examples.words import FILLER_WORDS, PAGE_SIZE, UNSEEN_WORDS, WORDS

SHEET_SIDE = 8
SHEET_PAGES = SHEET_SIDE**2
CHROMIUM_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip

BASE_STYLE = f"""
body {{ margin: 0; width: {PAGE_SIZE * SHEET_SIDE}px; }}
.page {{ position: absolute; width: {PAGE_SIZE}px; height: {PAGE_SIZE}px; overflow: hidden; box-sizing: border-box; }}
.page *, .page *::before {{ box-sizing: border-box; }}
.page a {{ display: inline-block; white-space: nowrap; }}
.page button, .page .field, .page .item, .page .tab {{ font: inherit; white-space: nowrap; overflow: hidden; }}
.page .field, .page .tab, .page .heading {{ display: inline-block; }}
.page .heading {{ line-height: 1.15; white-space: nowrap; margin: 0; }}
.page label {{ display: inline-flex; align-items: center; gap: 4px; white-space: nowrap; }}
.page label input {{ margin: 0; width: 1em; height: 1em; }}
.page .item {{ display: block; }}
"""

MEASURE_SCRIPT = f"""
const sheet = [];
for (const page of document.querySelectorAll('.page')) {{
  const origin = page.getBoundingClientRect();
  const relative = r => [r.left - origin.left, r.top - origin.top, r.right - origin.left, r.bottom - origin.top]
    .map(value => Math.round(value * 100) / 100);
  const widgets = [], kept = [];
  for (const element of page.querySelectorAll('[data-kind]')) {{
    const box = relative(element.getBoundingClientRect());
    const inside = box[0] >= 0 && box[1] >= 0 && box[2] <= {PAGE_SIZE} && box[3] <= {PAGE_SIZE};
    const parent = element.parentElement.getBoundingClientRect(), own = element.getBoundingClientRect();
    const cut = own.right > parent.right + 1 || element.scrollWidth > element.clientWidth + 1;
    const clash = kept.some(b => box[0] < b[2] && b[0] < box[2] && box[1] < b[3] && b[1] < box[3]);
    if (!inside || clash || cut) {{ element.style.visibility = 'hidden'; continue; }}
    kept.push(box);
    widgets.push([element.dataset.kind, element.dataset.word, box]);
  }}
  const letters = [], walker = document.createTreeWalker(page, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {{
    const node = walker.currentNode;
    if (getComputedStyle(node.parentElement).visibility === 'hidden') continue;
    for (let i = 0; i < node.length; i++) {{
      if (!/[A-Za-z]/.test(node.data[i])) continue;
      const range = document.createRange();
      range.setStart(node, i);
      range.setEnd(node, i + 1);
      letters.push([node.data[i], relative(range.getBoundingClientRect())]);
    }}
  }}
  sheet.push([widgets, letters]);
}}
document.getElementById('measured').textContent = JSON.stringify(sheet);
"""


class PageWriter:
    """Writes the HTML of one page in a random theme.

    Args:
        rng: decides everything.
        family: the font family of the page.
        words: the words to draw from, each used at most once.
    """

    def __init__(self, rng: random.Random, family: str, words: Sequence[str]) -> None:
        self.rng = rng
        self.words = rng.sample(list(words), min(24, len(words)))
        self.dark = rng.random() < 0.2
        self.family = family
        self.size = rng.choice((10, 11, 11, 11, 12, 12, 13))
        hue = rng.randrange(360)
        light = rng.uniform(8, 20) if self.dark else rng.choice((100, rng.uniform(90, 100)))
        self.background = f"hsl({hue} {rng.uniform(0, 40):.0f}% {light:.0f}%)"
        self.ink = f"hsl({hue} 20% {rng.uniform(80, 100) if self.dark else rng.uniform(0, 28):.0f}%)"
        self.grey = f"hsl({hue} 10% {rng.uniform(60, 75) if self.dark else rng.uniform(35, 50):.0f}%)"
        strong, lightness = rng.randrange(360), (62, 75) if self.dark else (28, 44)
        self.accent = f"hsl({strong} {rng.uniform(45, 100):.0f}% {rng.uniform(*lightness):.0f}%)"
        self.panel = f"hsl({hue} 20% {rng.uniform(17, 30) if self.dark else rng.uniform(82, 96):.0f}%)"
        self.border = f"hsl({hue} 12% {rng.uniform(38, 55) if self.dark else rng.uniform(45, 78):.0f}%)"
        self.radius = rng.choice((0, 2, 3, 4, 6))
        self.button_padding = f"{rng.randint(2, 6)}px {rng.randint(4, 12)}px"
        self.link_padding = rng.choice(("0", "2px 0", "2px 3px", "3px 4px"))
        self.filled = rng.random() < 0.5
        self.underline = rng.choice(("underline", "none"))
        self.weight = "bold" if rng.random() < 0.15 else "normal"
        self.line_height = rng.uniform(1.15, 1.5)

    def page(self, body: str, left: int, top: int) -> str:
        """Return the page's element around its body, placed on the sheet."""
        style = (
            f"left:{left}px;top:{top}px;background:{self.background};color:{self.ink};"
            f"line-height:{self.line_height:.2f};"
            f"font-family:'{self.family}';font-size:{self.size}px;font-weight:{self.weight}"
        )
        return f'<div class="page" style="{style}">{body}</div>'

    def widget(self, kind: str, style: str = "", on_bar: bool = False) -> str:
        """Return one widget with the next word."""
        if not self.words:
            return ""
        rng, word = self.rng, html.escape(self.words.pop())
        mark = f'data-kind="{kind}" data-word="{word}"'
        ink = self.background if on_bar else self.accent
        if kind == "button":
            back, front = (self.accent, self.background) if self.filled else (self.panel, self.ink)
            look = f"background:{back};color:{front};border:1px solid {self.border};border-radius:{self.radius}px"
            return f'<button {mark} style="{look};padding:{self.button_padding};{style}">{word}</button>'
        if kind == "link":
            look = f"color:{ink};text-decoration:{self.underline};padding:{self.link_padding}"
            return f'<a {mark} href="#" style="{look};{style}">{word}</a>'
        if kind == "field":
            back = self.panel if self.dark else "white"
            look = f"background:{back};color:{rng.choice((self.grey, self.ink))};border:1px solid {self.border}"
            size = f"padding:{rng.randint(2, 5)}px {rng.randint(3, 7)}px;width:{rng.randint(62, 118)}px"
            look += f";border-radius:{self.radius}px;{size};{style}"
            return f'<div class="field" {mark} style="{look}">{word}</div>'
        if kind == "check":
            shape = rng.choice(("checkbox", "radio"))
            state = " checked" if rng.random() < 0.4 else ""
            return f'<label {mark} style="padding:1px 0;{style}"><input type="{shape}"{state}>{word}</label>'
        if kind == "tab":
            padding = f"{rng.randint(2, 5)}px {rng.randint(3, 8)}px"
            look = f"color:{ink};border-bottom:2px solid {self.accent};padding:{padding}"
            return f'<div class="tab" {mark} style="{look};{style}">{word}</div>'
        if kind == "heading":
            look = f"font-size:{rng.randint(17, 26)}px;font-weight:{rng.choice(('bold', 'bold', 'normal'))}"
            return f'<div class="heading" {mark} style="{look};{style}">{word}</div>'
        back = self.panel if rng.random() < 0.6 else "transparent"
        padding = f"{rng.randint(2, 6)}px {rng.randint(4, 8)}px"
        look = f"background:{back};border-bottom:1px solid {self.border};padding:{padding}"
        return f'<div class="item" {mark} style="{look};{style}">{word}</div>'

    def running_text(self, count: int) -> str:
        """Return words that no question asks about."""
        return " ".join(self.rng.choice(FILLER_WORDS) for _ in range(count))

    def some(self, kinds: Sequence[str], low: int, high: int, style: str = "", on_bar: bool = False) -> str:
        """Return between `low` and `high` widgets of the given kinds."""
        return "".join(
            self.widget(self.rng.choice(kinds), style, on_bar) for _ in range(self.rng.randint(low, high))
        )


SMALL_KINDS = ("button", "button", "button", "link", "link", "field", "check", "tab")


def _clutter(writer: PageWriter) -> str:
    """Return panels, rules and snippets of text at random places."""
    rng, parts = writer.rng, ""
    for _ in range(rng.choice((0, 0, 1, 2, 4))):
        place = f"left:{rng.randint(-5, 204)}px;top:{rng.randint(-5, 204)}px;width:{rng.randint(30, 210)}px"
        look = f"height:{rng.randint(15, 160)}px;border-radius:{writer.radius}px"
        back = rng.choice((writer.panel, writer.background, "transparent"))
        look += f";background:{back};border:1px solid {writer.border}"
        parts += f'<div style="position:absolute;{place};{look}"></div>'
    for _ in range(rng.choice((0, 0, 1, 3, 6))):
        place = f"left:{rng.randint(0, 200)}px;top:{rng.randint(0, 223)}px;width:{rng.randint(30, 220)}px"
        parts += f'<div style="position:absolute;{place};height:1px;background:{writer.border}"></div>'
    return parts


def _scatter(writer: PageWriter) -> str:
    rng = writer.rng
    kinds = (*SMALL_KINDS, "heading") if rng.random() < 0.3 else SMALL_KINDS
    return _clutter(writer) + "".join(
        writer.widget(
            rng.choice(kinds), f"position:absolute;left:{rng.uniform(0, 170):.0f}px;top:{rng.uniform(0, 205):.0f}px"
        )
        for _ in range(rng.randint(7, 18))
    )


def _flow(writer: PageWriter) -> str:
    rng = writer.rng
    kinds = rng.choice((("button",), ("link",), ("button", "link"), ("check", "link"), ("tab",), SMALL_KINDS))
    style = f"margin:{rng.uniform(1, 7):.0f}px {rng.uniform(2, 8):.0f}px"
    body = writer.some(kinds, 3, 8, style)
    if rng.random() < 0.4:
        body += f'<div style="color:{writer.grey};margin:4px">{writer.running_text(rng.randint(3, 16))}</div>'
    body += writer.some(kinds, 2, 8, style)
    return f'<div style="padding:{rng.randint(0, 24)}px {rng.randint(2, 24)}px">{body}</div>'


def _columns(writer: PageWriter) -> str:
    rng = writer.rng
    columns = ""
    for _ in range(rng.choice((1, 2, 2, 3))):
        kind = rng.choice(("item", "item", "button", "field", "link", "check", "heading"))
        wide = "width:100%;" if kind in ("button", "field") and rng.random() < 0.5 else ""
        style = f"margin-bottom:{rng.randint(0, 10)}px;{wide}"
        cells = "".join(f"<div>{writer.widget(kind, style)}</div>" for _ in range(rng.randint(2, 7)))
        columns += f'<div style="flex:1;min-width:0;padding-top:{rng.randint(0, 30)}px">{cells}</div>'
    return f'<div style="display:flex;gap:6px;padding:4px">{columns}</div>'


def _form(writer: PageWriter) -> str:
    rng = writer.rng
    width, gap = rng.randint(40, 80), rng.randint(3, 12)
    rows = "".join(
        f'<div style="display:flex;align-items:center;margin-bottom:{gap}px">'
        f'<span style="width:{width}px;color:{writer.grey}">'
        f"{writer.running_text(1)}</span>{writer.widget(rng.choice(('field', 'field', 'check')))}</div>"
        for _ in range(rng.randint(2, 6))
    )
    buttons = writer.some(("button", "button", "link"), 1, 3, "margin-right:6px")
    return f'<div style="padding:{rng.randint(3, 26)}px {rng.randint(3, 16)}px">{rows}<div>{buttons}</div></div>'


def _bar_and_flow(writer: PageWriter) -> str:
    rng = writer.rng
    links = writer.some(("link", "link", "button"), 2, 5, f"margin-right:{rng.randint(3, 10)}px", on_bar=True)
    look = f"background:{writer.accent};padding:{rng.randint(2, 8)}px;white-space:nowrap"
    return f'<div style="{look}">{links}</div>' + rng.choice((_flow, _columns, _form))(writer)


def _side(writer: PageWriter) -> str:
    rng = writer.rng
    menu = writer.some((rng.choice(("item", "link")),), 3, 8, f"display:block;margin-bottom:{rng.randint(0, 6)}px")
    look = f"width:{rng.randint(62, 90)}px;height:{PAGE_SIZE}px;background:{writer.panel}"
    look += f";padding:{rng.randint(2, 10)}px 2px"
    rest = f'<div style="flex:1;min-width:0">{_flow(writer)}</div>'
    return f'<div style="display:flex"><div style="{look}">{menu}</div>{rest}</div>'


def _dialog(writer: PageWriter) -> str:
    rng = writer.rng
    width = rng.randint(150, 205)
    title = writer.widget("heading", "margin-bottom:5px")
    text = f'<div style="color:{writer.grey};margin-bottom:7px">{writer.running_text(rng.randint(5, 14))}</div>'
    fields = writer.some(("field", "check"), 0, 2, "margin:0 8px 6px 0")
    buttons = writer.some(("button",), 2, 3, "margin-left:6px")
    links = writer.some(("link",), 1, 3, "margin-right:8px")
    look = (
        f"position:absolute;left:{(PAGE_SIZE - width) // 2}px;top:{rng.randint(20, 50)}px;width:{width}px;padding:10px;"
        f"background:{writer.background};border:1px solid {writer.border};border-radius:{writer.radius}px"
    )
    shade = f"position:absolute;inset:0;background:{writer.panel}"
    inside = f'{title}{text}<div>{fields}</div><div style="text-align:right">{buttons}</div><div>{links}</div>'
    return f'<div style="{shade}"></div><div style="{look}">{inside}</div>'


def _table(writer: PageWriter) -> str:
    rng = writer.rng
    cell = f"background:{writer.panel};padding:3px"
    head = "".join(f'<td style="{cell}">{writer.widget("link")}</td>' for _ in range(3))
    rows = "".join(
        f'<tr><td style="padding:{rng.randint(2, 4)}px;color:{writer.grey}">{writer.running_text(1)}</td>'
        f"<td>{writer.widget(rng.choice(('link', 'check')))}</td>"
        f"<td>{writer.widget(rng.choice(('button', 'link')))}</td></tr>"
        for _ in range(rng.randint(3, 6))
    )
    look = "border-collapse:collapse;width:100%;font:inherit;color:inherit"
    table = f'<table style="{look}"><tr>{head}</tr>{rows}</table>'
    return f'<div style="padding:{rng.randint(4, 14)}px"><div>{writer.widget("heading")}</div>{table}</div>'


def _cards(writer: PageWriter) -> str:
    rng = writer.rng
    look = f"border:1px solid {writer.border};border-radius:{writer.radius}px;padding:6px;background:{writer.panel}"
    look += ";min-width:0"
    cards = "".join(
        f'<div style="{look}"><div>{writer.widget("link", "font-weight:bold")}</div><div style="color:{writer.grey};'
        f'margin:3px 0">{writer.running_text(rng.randint(1, 4))}</div>'
        f"{writer.widget(rng.choice(('button', 'button', 'link')))}</div>"
        for _ in range(rng.choice((4, 4, 6)))
    )
    grid = f"display:grid;grid-template-columns:1fr 1fr;gap:{rng.randint(4, 10)}px;padding:{rng.randint(4, 12)}px"
    return f'<div style="{grid}">{cards}</div>'


def _settings(writer: PageWriter) -> str:
    rng = writer.rng
    look = f"display:flex;justify-content:space-between;padding:5px 8px;border-bottom:1px solid {writer.border}"
    top = f'<div style="{look}">'
    top += writer.some(("link", "tab", "button"), 2, 3) + "</div>"
    rows = "".join(
        f'<div style="display:flex;justify-content:space-between;align-items:center;'
        f'padding:{rng.randint(2, 5)}px 10px">'
        f"{writer.widget(rng.choice(('check', 'link')))}{writer.widget(rng.choice(('button', 'field', 'link')))}</div>"
        for _ in range(rng.randint(3, 5))
    )
    foot = writer.some(("button", "link"), 1, 3, "margin:0 4px")
    return f'{top}{rows}<div style="position:absolute;bottom:6px;left:0;right:0;text-align:center">{foot}</div>'


def _mailbox(writer: PageWriter) -> str:
    rng = writer.rng
    tools = writer.some(("button",), 2, 4, "margin-right:4px")
    rows = "".join(
        f'<div style="display:flex;gap:8px;padding:{rng.randint(2, 5)}px 6px;border-bottom:1px solid {writer.border}">'
        f'{writer.widget("check")}<span style="color:{writer.grey};flex:1;overflow:hidden;white-space:nowrap">'
        f"{writer.running_text(rng.randint(1, 2))}</span>{writer.widget('link')}</div>"
        for _ in range(rng.randint(3, 6))
    )
    return f'<div style="padding:6px;white-space:nowrap">{tools}</div>{rows}'


TRAINING_LAYOUTS: tuple[Callable[[PageWriter], str], ...] = (
    _scatter, _scatter, _scatter, _flow, _flow, _columns, _columns, _form, _bar_and_flow, _side,
)  # fmt: skip
HELD_OUT_LAYOUTS: tuple[Callable[[PageWriter], str], ...] = (_dialog, _table, _cards, _settings, _mailbox)


def write_page(rng: random.Random, layouts: Sequence[Callable[[PageWriter], str]], families: Sequence[str],
               words: Sequence[str], left: int, top: int) -> str:  # fmt: skip
    """Return the HTML of a page of one of the layouts."""
    writer = PageWriter(rng, rng.choice(list(families)), words)
    return writer.page(rng.choice(list(layouts))(writer), left, top)


def render_sheet(
    pages: Sequence[str], columns: int = SHEET_SIDE, rows: int = SHEET_SIDE, scale: int = 1
) -> tuple[Image.Image, list]:
    """Render pages with one start of Chromium.

    Args:
        pages: HTML of each page, already placed on the sheet.
        columns, rows: the size of the sheet in pages.
        scale: screen pixels per page pixel, as on displays of high density.

    Returns:
        the picture of the sheet, and for each page `[widgets, letters]`: `[kind, word, box]` and `[letter, box]`.

    Raises:
        ValueError: if Chromium is not installed or drew nothing.
    """
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        raise ValueError("no Chromium found: install it (Debian's package `chromium`) to render pages")
    document = (
        f'<!doctype html><html><head><meta charset="utf-8"><style>{BASE_STYLE}</style></head><body>{"".join(pages)}'
        f'<script type="application/json" id="measured"></script><script>{MEASURE_SCRIPT}</script></body></html>'
    )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        source, picture = Path(folder, "sheet.html"), Path(folder, "sheet.png")
        source.write_text(document, encoding="utf-8")
        command = [
            browser, *CHROMIUM_FLAGS, f"--user-data-dir={folder}/profile", f"--force-device-scale-factor={scale}",
            f"--window-size={columns * PAGE_SIZE},{rows * PAGE_SIZE}", f"--screenshot={picture}", "--dump-dom",
            source.as_uri(),
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        measured = re.search(r'id="measured">(.*?)</script>', result.stdout, re.DOTALL)
        if measured is None or not picture.exists():
            raise ValueError(f"{browser} rendered nothing; it said: {result.stderr[-400:]}")
        return Image.open(picture).convert("RGB"), json.loads(html.unescape(measured[1]))


def resized_pages(sheet: Image.Image, scale: int) -> Image.Image:
    """Resize each page of a sheet to 224 pixels, alone, as the processor resizes a screenshot."""
    small = Image.new("RGB", (sheet.width // scale, sheet.height // scale))
    for left in range(0, small.width, PAGE_SIZE):
        for top in range(0, small.height, PAGE_SIZE):
            corners = tuple(scale * edge for edge in (left, top, left + PAGE_SIZE, top + PAGE_SIZE))
            small.paste(sheet.crop(corners).resize((PAGE_SIZE, PAGE_SIZE), Image.Resampling.BICUBIC), (left, top))
    return small


def render_pages(seed: int, count: int, layouts: Sequence[Callable[[PageWriter], str]], families: Sequence[str],
                 words: Sequence[str], folder: Path, name: str, dense_every: int = 0,
                 with_letters: bool = False) -> None:  # fmt: skip
    """Render `count` pages into `folder` as sheets `{name}-{i}.png` with `{name}-{i}.json` beside them.

    Args:
        seed, layouts, families, words: of the pages.
        count: number of pages.
        folder, name: where they go.
        dense_every: render every so many sheets as a display of double density shows them, and resize them; 0 none.
        with_letters: note the place of each letter as well.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for index, start in enumerate(tqdm(range(0, count, SHEET_PAGES), desc="rendering pages")):
        number = min(SHEET_PAGES, count - start)
        rows = -(-number // SHEET_SIDE)
        rng = random.Random(f"{seed}/{name}/{index}")
        pages = [
            write_page(rng, layouts, families, words, place % SHEET_SIDE * PAGE_SIZE, place // SHEET_SIDE * PAGE_SIZE)
            for place in range(number)
        ]
        scale = 2 if dense_every and index % dense_every == dense_every - 1 else 1
        image, measured = render_sheet(pages, SHEET_SIDE, rows, scale)
        if scale > 1:
            image = resized_pages(image, scale)
        if not with_letters:
            measured = [[widgets, []] for widgets, _ in measured]
        image.quantize(256, dither=Image.Dither.NONE).save(folder / f"{name}-{index}.png", optimize=True)
        (folder / f"{name}-{index}.json").write_text(json.dumps(measured, separators=(",", ":")))


def read_sheets(folder: str | Path, name: str) -> list[Screen]:
    """Read back what `render_pages` wrote; pages that show fewer than three widgets are left out."""
    screens = []
    paths = sorted(Path(folder).glob(f"{name}-*.json"), key=lambda path: int(path.stem.rsplit("-", 1)[1]))
    for path in paths:
        sheet = np.asarray(Image.open(path.with_suffix(".png")).convert("RGB"))
        for place, (widgets, letters) in enumerate(json.loads(path.read_text())):
            top, left = place // SHEET_SIDE * PAGE_SIZE, place % SHEET_SIDE * PAGE_SIZE
            picture = np.ascontiguousarray(sheet[top : top + PAGE_SIZE, left : left + PAGE_SIZE])
            if len(widgets) >= 3:
                screens.append(
                    Screen(
                        picture,
                        tuple(Widget(kind, word, tuple(box)) for kind, word, box in widgets),
                        tuple((letter, tuple(box)) for letter, box in letters),
                    )
                )
    return screens


SCREENSHOT_PAGE = """
<div class="page" style="left:0;top:0;background:#ffffff;color:#202a36;font:11px 'Liberation Sans';line-height:1.3">
<style>
  .page .top { display: flex; justify-content: space-between; align-items: center; height: 30px; padding: 0 8px;
    background: #1d4e89; }
  .page .top a { color: #ffffff; text-decoration: none; padding: 2px 3px; }
  .page .field { width: 74px; padding: 3px 6px; border: 1px solid #9fb2c6; border-radius: 3px; background: #ffffff;
    color: #5b6672; }
  .page .menu { position: absolute; left: 0; top: 30px; bottom: 0; width: 66px; background: #eef2f6; padding: 8px 2px; }
  .page .menu .item { padding: 4px 6px; border-bottom: 1px solid #cfd8e2; }
  .page .mail { position: absolute; left: 74px; right: 8px; top: 38px; }
  .page .mail button { background: #ffffff; color: #202a36; border: 1px solid #8fa3b8; border-radius: 3px;
    padding: 3px 7px; margin-right: 4px; }
  .page .mail .send { background: #1d7a4f; color: #ffffff; border-color: #16613f; }
  .page .text { color: #66717c; margin: 6px 0; }
</style>
<div class="top"><a href="#" data-kind="link" data-word="Home">Home</a>
  <div class="field" data-kind="field" data-word="Search">Search</div>
  <a href="#" data-kind="link" data-word="Help">Help</a><a href="#" data-kind="link" data-word="Logout">Logout</a></div>
<div class="menu"><div class="item" data-kind="item" data-word="Inbox">Inbox</div>
  <div class="item" data-kind="item" data-word="Drafts">Drafts</div>
  <div class="item" data-kind="item" data-word="Sent">Sent</div>
  <div class="item" data-kind="item" data-word="Spam">Spam</div>
  <div class="item" data-kind="item" data-word="Trash">Trash</div></div>
<div class="mail"><div class="heading" data-kind="heading" data-word="Invoice"
    style="font-size:20px;font-weight:bold">Invoice</div>
  <div class="text">the paper from this morning and some other small light green garden</div>
  <label data-kind="check" data-word="Follow" style="padding:1px 0"><input type="checkbox" checked>Follow</label>
  <div style="margin-top:8px"><button data-kind="button" data-word="Reply">Reply</button><button data-kind="button"
    data-word="Forward">Forward</button></div>
  <div style="margin-top:8px"><button data-kind="button" data-word="Archive">Archive</button><button class="send"
    data-kind="button" data-word="Print">Print</button></div></div>
</div>
"""


def render_screenshot(path: Path) -> None:
    """Render the page of `examples/screenshot.png` at triple density; its widgets go to a JSON beside it."""
    image, [[widgets, _]] = render_sheet([SCREENSHOT_PAGE], 1, 1, scale=3)
    image.save(path, optimize=True)
    path.with_suffix(".json").write_text(json.dumps(widgets, indent=1) + "\n")


def main() -> None:
    """Render the pages named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("training", "held_out", "screenshot"))
    parser.add_argument("folder", type=Path, help="folder of the pages, or file of the screenshot")
    parser.add_argument("--pages", type=int, default=4096, help="number of training pages")
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    families = list(TRAINING_FONTS)
    if options.what == "screenshot":
        render_screenshot(options.folder)
        return
    if options.what == "training":
        seed = 1 if options.seed is None else options.seed
        render_pages(seed, options.pages, TRAINING_LAYOUTS, families, WORDS, options.folder, "training", 4, True)
        return
    seed = 8_000_001 if options.seed is None else options.seed
    render_pages(seed, 256, HELD_OUT_LAYOUTS, families, WORDS, options.folder, "page")
    render_pages(seed, 48, HELD_OUT_LAYOUTS, [HELD_OUT_FONT], WORDS, options.folder, "font")
    render_pages(seed, 48, HELD_OUT_LAYOUTS, families, UNSEEN_WORDS, options.folder, "words")


if __name__ == "__main__":
    main()
