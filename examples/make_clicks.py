"""Make a small data set of pages and where to click on them: `python -m examples.make_clicks FOLDER`.

The pages are of those that Chromium rendered to judge cogagent-mini by (`examples/cogagent-mini/heldout`); those of
training, validation and test differ. Files of one JSON object a line:

    clicks.jsonl       a new kind of question, `Click Search`, answered by a point: the middle of the widget
    known.jsonl        what cogagent-mini was trained on, `Where is Search` and `Read [[250,013,558,121]]`
    validation.jsonl   clicks
    test-clicks.jsonl  clicks to judge by; the lines have the widget's box instead of an answer
    test-known.jsonl   what it was trained on, to judge by
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from examples.browser_pages import read_sheets
from examples.screens import Question, Screen, Widget, read_question, where_question
from examples.words import PAGE_SIZE, coordinate
from mixformer.data.grounding import Box

SHEETS = Path(__file__).parent / "cogagent-mini" / "heldout"
PAGES = {"train": 104, "validation": 16, "test": 48}
"""Pages of each part."""
QUESTIONS = {"train": 6, "validation": 1, "test": 1}
"""Widgets of each page that are asked about, at most."""

Line = dict[str, Any]


def click_question(widget: Widget) -> Question:
    """Ask for the point to click."""
    left, top, right, bottom = widget.box
    point = f"[[{coordinate((left + right) / 2)},{coordinate((top + bottom) / 2)}]]"
    return Question("click", f"Click {widget.word}", point, widget)


def to_learn(question: Question, page: str) -> Line:
    """The line of a question and its answer."""
    messages = [{"role": "user", "content": question.text}, {"role": "assistant", "content": question.answer}]
    return {"messages": messages, "images": [page]}


def to_judge(question: Question, page: str) -> Line:
    """The line of a question that is judged by its widget's box, or by its answer if it asks for a word."""
    line = to_learn(question, page)
    if question.kind == "read":
        return line
    box = Box.from_pixels(*question.widget.box, PAGE_SIZE, PAGE_SIZE)
    objects = [{"label": question.widget.word, "box": [box.x0, box.y0, box.x1, box.y1]}]
    return {**line, "messages": line["messages"][:1], "objects": objects}


def lines_about(number: int, screen: Screen, part: str, rng: random.Random) -> dict[str, list[Line]]:
    """{file: lines} about a page of a part; its picture is `pages/NUMBER.png`."""
    page, make = f"pages/{number:04d}.png", to_judge if part == "test" else to_learn
    clicks, known = list[Line](), list[Line]()
    for widget in rng.sample(screen.widgets, min(QUESTIONS[part], len(screen.widgets))):
        clicks.append(make(click_question(widget), page))
        ask = (where_question, read_question)[(number + len(known)) % 2]
        known.append(make(ask(widget), page))
    if part == "validation":
        return {part: clicks}
    before = "" if part == "train" else f"{part}-"
    return {f"{before}clicks": clicks, f"{before}known": known}


def write_clicks(folder: str | Path) -> None:
    """Write the pages and the files."""
    folder = Path(folder)
    (folder / "pages").mkdir(parents=True, exist_ok=True)
    files, rng = dict[str, list[Line]](), random.Random(0)
    parts = [part for part, count in PAGES.items() for _ in range(count)]
    for number, (screen, part) in enumerate(zip(read_sheets(SHEETS, "page"), parts, strict=False)):
        Image.fromarray(screen.picture).save(folder / f"pages/{number:04d}.png")
        for name, lines in lines_about(number, screen, part, rng).items():
            files.setdefault(name, []).extend(lines)
    for name, lines in files.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        print(f"{path}: {len(lines)} questions about {len({line['images'][0] for line in lines})} pages")


if __name__ == "__main__":
    write_clicks(sys.argv[1])
