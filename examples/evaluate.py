"""Judge a model on the held-out pages: grounding, reading, and what guessing a widget would reach."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from examples.browser_pages import read_sheets
from examples.screens import Box, Question, Screen, read_question, where_question
from examples.words import PAGE_SIZE
from mixformer import generate
from mixformer.data.grounding import intersection_over_union, parse_boxes
from mixformer.train import Evaluation

PARTS = {
    "page": "layouts never trained on",
    "font": "a font never trained on",
    "words": "words never trained on",
}
MIN_OVERLAP = 0.5


@dataclass
class ScreenEvaluation(Evaluation):
    """Ask for the place of every widget's word, and for the word at every widget's place.

    Attributes:
        folder: with the sheets of held-out pages.
        parts: which of `page`, `font` and `words`.
        max_pages: pages of each part; None for all.
        batch_size: questions at a time.
        progress: show a progress bar.
    """

    folder: str = "examples/cogagent-mini/heldout"
    parts: Sequence[str] = ("page", "font", "words")
    max_pages: int | None = None
    batch_size: int = 48
    progress: bool = True

    def __call__(self, model: Any, processor: Any) -> dict[str, dict[str, float]]:
        """Return for each part, in percent: `grounding` (IoU above 0.5), `centre` (the centre of the answer lies in
        the widget), `reading` (exact word), the same of a `random_widget`, and how many pages and questions.

        Args:
            model: a model that the processor makes batches for.
            processor: as of `load_processor`.

        Raises:
            ValueError: the folder holds no pages.
        """
        return {part: self.judge_part(model, processor, part) for part in self.parts}

    def judge_part(self, model: Any, processor: Any, part: str) -> dict[str, float]:
        """Scores of one part; see `__call__`."""
        screens = read_sheets(self.folder, part)[: self.max_pages]
        if not screens:
            raise ValueError(f"{self.folder} holds no sheets '{part}-*.png'. Make them with examples.browser_pages.")
        asked = [(screen, question) for screen in screens for question in all_questions(screen)]
        answers = self._answers(model, processor, asked, part)
        scores: dict[str, list[float]] = {"grounding": [], "centre": [], "reading": [], "random_widget": []}
        for (screen, question), answer in zip(asked, answers, strict=True):
            if question.kind == "read":
                scores["reading"].append(answer.strip() == question.answer)
                continue
            box = answered_box(answer)
            scores["grounding"].append(box is not None and overlaps(box, question.widget.box))
            scores["centre"].append(box is not None and holds_centre(question.widget.box, box))
            guesses = [overlaps(widget.box, question.widget.box) for widget in screen.widgets]
            scores["random_widget"].append(sum(guesses) / len(guesses))
        means = {name: round(100 * sum(values) / len(values), 1) for name, values in scores.items()}
        return {**means, "pages": len(screens), "questions": len(asked)}

    def _answers(
        self, model: Any, processor: Any, asked: Sequence[tuple[Screen, Question]], part: str
    ) -> Iterator[str]:
        model.eval()
        starts = range(0, len(asked), self.batch_size)
        for start in tqdm(starts, desc=part, disable=not self.progress):
            some = asked[start : start + self.batch_size]
            batch = processor([question.text for _, question in some], [screen.picture for screen, _ in some])
            batch = {name: value for name, value in batch.items() if name in self._inputs(model)}
            with torch.no_grad():
                tokens = generate(model, batch, max_new_tokens=12, stop_tokens=processor.config.stop_ids)
            yield from (processor.decode(row) for row in tokens)

    @staticmethod
    def _inputs(model: Any) -> set[str]:
        return {"input_ids", "attention_mask", *model.declared}


def all_questions(screen: Screen) -> list[Question]:
    """Both questions about every widget, the `where` questions first."""
    return [make(widget) for make in (where_question, read_question) for widget in screen.widgets]


def answered_box(answer: str) -> Box | None:
    """The first box of an answer in pixels, or None."""
    boxes = parse_boxes(answer)
    return boxes[0].pixels(PAGE_SIZE, PAGE_SIZE) if boxes else None


def overlaps(first: Box, second: Box) -> bool:
    """Whether two boxes have an intersection over union above 0.5."""
    return intersection_over_union(first, second) > MIN_OVERLAP


def holds_centre(outer: Box, inner: Box) -> bool:
    """Whether the centre of `inner` lies in `outer`."""
    x, y = (inner[0] + inner[2]) / 2, (inner[1] + inner[3]) / 2
    return outer[0] <= x <= outer[2] and outer[1] <= y <= outer[3]
