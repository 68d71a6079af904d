"""An endless stream of training pages: drawn ones, and browser-rendered ones from a cache, with small changes."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from examples.browser_pages import TRAINING_LAYOUTS, read_sheets, render_pages
from examples.screens import TRAINING_FONTS, Box, Screen, Widget, draw_screen
from examples.words import PAGE_SIZE, WORDS

LARGEST_SHIFT = 10


def browser_cache() -> Path:
    """Where rendered training pages are kept: `$MIXFORMER_SCREENS`, or the user's cache folder."""
    folder = os.environ.get("MIXFORMER_SCREENS")
    return Path(folder) if folder else Path.home() / ".cache" / "mixformer" / "screens"


def browser_training_pages(count: int) -> list[Screen]:
    """Return about `count` browser-rendered training pages, rendering them on first use (needs Chromium)."""
    folder = browser_cache()
    screens = read_sheets(folder, "training") if folder.exists() else []
    if len(screens) < 0.9 * count:
        render_pages(1, count, TRAINING_LAYOUTS, list(TRAINING_FONTS), WORDS, folder, "training", 4, True)
        screens = read_sheets(folder, "training")
    return screens[:count]


def changed_screen(screen: Screen, rng: random.Random) -> Screen:
    """Shift a page by a few pixels, sometimes inverted or with its colour channels swapped.

    Widgets that leave the page are no longer asked about.
    """
    right, down = (rng.randint(-LARGEST_SHIFT, LARGEST_SHIFT) for _ in range(2))
    margin = LARGEST_SHIFT
    padded = np.pad(screen.picture, ((margin, margin), (margin, margin), (0, 0)), mode="edge")
    picture = padded[margin - down :, margin - right :][:PAGE_SIZE, :PAGE_SIZE]
    if rng.random() < 0.3:
        picture = 255 - picture
    if rng.random() < 0.5:
        picture = picture[..., rng.sample(range(3), 3)]

    def moved(box: Box) -> Box:
        return box[0] + right, box[1] + down, box[2] + right, box[3] + down

    widgets = tuple(Widget(widget.kind, widget.word, moved(widget.box)) for widget in screen.widgets)
    return Screen(
        np.ascontiguousarray(picture),
        tuple(w for w in widgets if min(w.box) >= 0 and max(w.box) <= PAGE_SIZE),
        tuple((letter, moved(box)) for letter, box in screen.letters),
    )


def training_screens(
    seed: int, browser_pages: int = 6000, browser_fraction: float = 0.5, new_fraction: float = 0.4,
    pool_size: int = 4000,
) -> Iterator[Screen]:
    """Yield training pages without end.

    Args:
        seed: of the drawing.
        browser_pages: number of browser-rendered pages to draw from; 0 does without a browser.
        browser_fraction: share of them in the stream.
        new_fraction: share of the drawn pages that are drawn anew; the others are changed ones of the recent past.
        pool_size: how many drawn pages are kept for that.
    """
    rng = random.Random(seed)
    rendered = browser_training_pages(browser_pages) if browser_pages and browser_fraction else []
    pool: list[Screen] = []
    while True:
        if rendered and rng.random() < browser_fraction:
            screen = changed_screen(rng.choice(rendered), rng)
        elif len(pool) < 200 or rng.random() < new_fraction:
            screen = draw_screen(rng)
            if len(pool) < pool_size:
                pool.append(screen)
            else:
                pool[rng.randrange(pool_size)] = screen
        else:
            screen = changed_screen(rng.choice(pool), rng)
        if len(screen.widgets) >= 2:
            yield screen
