"""Judge a model on the held-out pages: grounding, reading, and what guessing a widget would reach."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from examples.browser_pages import read_sheets
from examples.screens import Box, Question, Screen, read_question, where_question
from examples.words import PAGE_SIZE
from mixformer import generate
from mixformer.data.grounding import intersection_over_union, parse_boxes
from mixformer.evaluation.answering import inputs_of
from mixformer.evaluation.run import checkpoint_hash, memory_hash
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
        checkpoint: folder of the weights, whose hash goes into the results; None hashes the weights in memory.
        progress: show a progress bar.
    """

    folder: str = "examples/cogagent-mini/heldout"
    parts: Sequence[str] = ("page", "font", "words")
    max_pages: int | None = None
    checkpoint: str | None = None
    progress: bool = True

    def __call__(self, model: Any, processor: Any) -> dict[str, Any]:
        """Return for each part, in percent: `grounding` (IoU above 0.5), `centre` (the centre of the answer lies in
        the widget), `reading` (exact word), the same of a `random_widget`, and how many pages and questions; also
        `checkpoint`, as of `mixformer.evaluation.run.checkpoint_hash`.

        Args:
            model: a model that the processor makes batches for.
            processor: as of `load_processor`.

        Raises:
            ValueError: the folder holds no pages.
        """
        scores = {part: self.judge_part(model, processor, part) for part in self.parts}
        return {**scores, "checkpoint": checkpoint_hash(self.checkpoint) if self.checkpoint else memory_hash(model)}

    def judge_part(self, model: Any, processor: Any, part: str) -> dict[str, float]:
        """Scores of one part; see `__call__`."""
        screens = read_sheets(self.folder, part)[: self.max_pages]
        if not screens:
            raise ValueError(f"{self.folder} holds no sheets '{part}-*.png'. Make them with examples.browser_pages.")
        asked = [(screen, question) for screen in screens for question in all_questions(screen)]
        answers = self._answers(model, processor, screens, part)
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

    def _answers(self, model: Any, processor: Any, screens: Sequence[Screen], part: str) -> Iterator[str]:
        """Answers to all questions of all screens, those about one screen at a time: its picture is run once."""
        model.eval()
        for screen in tqdm(screens, desc=part, disable=not self.progress):
            texts = [question.text for question in all_questions(screen)]
            batch = inputs_of(model, processor(texts, [screen.picture] * len(texts)))
            stop_tokens = processor.config.stop_ids
            for row in generate(model, batch, max_new_tokens=12, stop_tokens=stop_tokens, share_prefix=True):
                yield processor.decode(row)


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
