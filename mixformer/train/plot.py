"""Curves of a run's log as a picture, drawn with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mixformer.train.log import flat_numbers, parsed_record

Curve = list[tuple[float, float]]
Panels = dict[str, dict[str, Curve]]
COLOURS = ("#3366cc", "#dc3912", "#109618", "#ff9900", "#990099", "#0099c6", "#8b4513", "#555555")
MARGIN, WIDTH, HEIGHT, LEGEND, SCALE = 64, 820, 250, 190, 2
PANELS = (
    ("losses", "losses"), ("rate", "learning rate"), ("gradient_norm", "gradient norm"),
    ("tokens", "tokens per second"),
)
_SKIPPED = ("step", "seconds", "step_loss")


def read_curves(run: str | Path) -> tuple[Panels, list[int]]:
    """The numbers of a run by panel and name, against the step; and the step that each stage ends at.

    Args:
        run: a log, a folder of logs, or the output folder that `train:` names, whose logs lie in `{run}-logs`. The
            logs of several stages follow one another in the order in which they were begun.

    Raises:
        ValueError: no log there, or nothing in it.
    """
    panels: Panels = {key: {} for key, _ in PANELS}
    stages, first = list[int](), 0
    for path in _logs(Path(run)):
        last = 0
        for step, name, value in _numbers(path):
            panel = "tokens" if name.endswith("_per_second") else name if name in panels else "losses"
            last = max(last, step)
            if math.isfinite(value):
                shown = name.removesuffix("_per_second").replace("/", " ").replace("_", " ")
                panels[panel].setdefault(shown, []).append((first + step, value))
        first += last
        stages.append(first)
    panels = {key: curves for key, curves in panels.items() if curves}
    if not panels:
        raise ValueError(f"The logs of {run} have no numbers yet: the first line comes after log_every steps.")
    return panels, stages


def _logs(run: Path) -> list[Path]:
    if run.is_file():
        return [run]
    for folder in (run, run.with_name(f"{run.name}-logs")):
        found = list(folder.glob("*.jsonl")) if folder.is_dir() else []
        if found:
            return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name))
    raise ValueError(f"There is no log at {run}: name a .jsonl file, a folder of them, or what a run wrote.")


def _numbers(path: Path) -> Iterator[tuple[int, str, float]]:
    """(step, name, value); of a run that was begun anew in the same file, the later one counts."""
    records: list[dict[str, float]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = parsed_record(line)
        if record is not None:
            numbers = flat_numbers(record)
            while records and _follows(records[-1], numbers):
                records.pop()
            records.append(numbers)
    for record in records:
        yield from ((int(record["step"]), name, value) for name, value in record.items() if name not in _SKIPPED)


def _follows(record: dict[str, float], later: dict[str, float]) -> bool:
    """Whether a record is of a later step than one that was written after it, or says the same of one step."""
    same = record["step"] == later["step"] and bool((record.keys() & later.keys()) - set(_SKIPPED))
    return record["step"] > later["step"] or same


def plot(run: str | Path, output: str | Path | None = None) -> Path:
    """Draw the curves of a run: losses and validation, rate, norm of the gradient, tokens per second.

    Args:
        run: as of `read_curves`.
        output: PNG file; None for `curves.png` beside the logs.

    Returns:
        where the picture is.

    Raises:
        ValueError: as of `read_curves`.
    """
    panels, stages = read_curves(run)
    target = Path(output) if output is not None else _logs(Path(run))[0].with_name("curves.png")
    picture = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE * len(panels)), "white")
    draw = ImageDraw.Draw(picture)
    titles = dict(PANELS)
    for index, (key, curves) in enumerate(panels.items()):
        _draw_panel(draw, index * HEIGHT * SCALE, titles[key], curves, stages)
    target.parent.mkdir(parents=True, exist_ok=True)
    picture.resize((WIDTH, HEIGHT * len(panels)), Image.Resampling.LANCZOS).save(target)
    return target


def _draw_panel(
    draw: ImageDraw.ImageDraw, top: int, title: str, curves: dict[str, Curve], stages: list[int]
) -> None:
    font, small = ImageFont.load_default(13 * SCALE), ImageFont.load_default(11 * SCALE)
    left, right = MARGIN * SCALE, (WIDTH - LEGEND) * SCALE
    high, low = top + 30 * SCALE, top + (HEIGHT - 30) * SCALE
    xs = ticks(0, max(x for curve in curves.values() for x, _ in curve))
    values = [y for curve in curves.values() for _, y in curve]
    ys = ticks(min(0.0, *values), max(values))

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - xs[0]) / (xs[-1] - xs[0]) * (right - left), low - (y - ys[0]) / (ys[-1] - ys[0]) * (low - high)
        )

    draw.text((left, top + 8 * SCALE), title, "black", font)
    for y in ys:
        draw.line([place(xs[0], y), place(xs[-1], y)], "#dddddd", SCALE)
        draw.text((left - 6 * SCALE, place(0, y)[1]), _number(y), "#444444", small, anchor="rm")
    for x in xs:
        draw.line([place(x, ys[0]), (place(x, ys[0])[0], low + 4 * SCALE)], "#888888", SCALE)
        draw.text((place(x, 0)[0], low + 6 * SCALE), _number(x), "#444444", small, anchor="mt")
    draw.line([place(xs[0], ys[0]), place(xs[-1], ys[0])], "#888888", SCALE)
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        for begin, end in zip([-1, *stages], stages, strict=False):
            points = [place(x, y) for x, y in curve if begin < x <= end]
            if len(points) > 1:
                draw.line(points, colour, 2 * SCALE, joint="curve")
            for x, y in points if len(points) < 30 else ():
                draw.ellipse([x - 3 * SCALE, y - 3 * SCALE, x + 3 * SCALE, y + 3 * SCALE], colour)
        height = high + number * 17 * SCALE
        draw.line([(right + 12 * SCALE, height), (right + 28 * SCALE, height)], colour, 3 * SCALE)
        shown = f"{name} {_number(curve[-1][1])}"
        draw.text((right + 33 * SCALE, height), _fitting(draw, shown, small), "black", small, anchor="lm")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _fitting(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Cut a name in its middle so that it fits beside the panel."""
    kept = text
    while draw.textlength(kept, font) > (LEGEND - 38) * SCALE:
        text = text[: len(text) // 2 - 1] + text[len(text) // 2 :]
        kept = f"{text[: len(text) // 2]}…{text[len(text) // 2 :]}"
    return kept


def ticks(low: float, high: float, wanted: int = 5) -> Sequence[float]:
    """Round numbers from at most `low` to at least `high`, in steps of 1, 2 or 5 times a power of ten."""
    high = high if high > low else low + 1.0
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(start, max(end, start + 1) + 1)]
