"""Questions about screens, several packed into one row, and the loss of their answers."""

import random
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch

from examples.dense_reading import soft_positions
from examples.screen_source import training_screens
from examples.screens import Screen, read_question, where_question
from examples.words import COORDINATES, PAGE_SIZE, WORDS
from mixformer import BaseMixin, Context, wrap
from mixformer.images import preprocess_image
from mixformer.masks import Documents, Mask, Prefix
from mixformer.mixins import ImageMixin
from mixformer.tokenizer import Tokenizer
from mixformer.train import Task

BOS, EOS, PAD = 1, 2, 0
NO_LABEL = -100


def coordinate_ids(tokenizer: Tokenizer) -> torch.Tensor:
    """[4, 224] token of each pixel position as left, top, right and bottom edge of a box."""
    return torch.tensor([tokenizer.encode(f"[[{text},{text},{text},{text}]]") for text in COORDINATES]).T


def word_ids(tokenizer: Tokenizer) -> list[int]:
    """Token of each interface word, in order."""
    return [tokenizer.encode(word)[0] for word in WORDS]


class PackedQuestionsMixin(BaseMixin):
    """Let the questions of a row see the picture and themselves, not one another.

    `question_ids` [b, s]: 0 on what all questions share at the row's start, then 1, 2, ... on each question.
    """

    inputs = ("question_ids",)

    @wrap
    def attention_mask_forward(self, mask: Mask, ctx: Context, old_impl: Callable[[Mask], Mask]) -> Mask:
        question_ids = ctx.inputs.get("question_ids")
        if question_ids is None:
            return old_impl(mask)
        return old_impl(mask) & (Documents(question_ids) | Prefix((question_ids == 0).sum(1)))


class CoordinateLoss:
    """Cross entropy of answers in which a coordinate that is one pixel off is nearly right.

    The target of a coordinate token is a Gaussian of one pixel over the tokens of the same edge; other tokens have
    one-hot targets.

    Args:
        coordinates: [4, 224] as of `coordinate_ids`.
        vocab_size: v.
    """

    def __init__(self, coordinates: torch.Tensor, vocab_size: int) -> None:
        self.coordinates = coordinates
        self.pixels = torch.full((vocab_size,), -1)
        self.edges = torch.full((vocab_size,), -1)
        self.pixels[coordinates] = torch.arange(PAGE_SIZE).expand_as(coordinates)
        self.edges[coordinates] = torch.arange(len(coordinates))[:, None].expand_as(coordinates)
        self.targets = soft_positions(torch.arange(PAGE_SIZE).float())

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Mean losses of [n, v] logits under [n] labels, apart for coordinates and for the rest."""
        chances = logits.float().log_softmax(-1)
        pixels = self.pixels[labels]
        place = pixels >= 0
        losses = {}
        if bool(place.any()):
            ids = self.coordinates[self.edges[labels[place]]]
            losses["coordinates"] = -(self.targets[pixels[place]] * chances[place].gather(1, ids)).sum(-1).mean()
        if not bool(place.all()):
            losses["text"] = -chances[~place].gather(1, labels[~place, None]).mean()
        return losses


class ScreenQuestionsTask(Task):
    """Answer `Where is WORD` and `Read BOX` about pages.

    Args:
        batch_size: pages per batch.
        questions: questions per page.
        where_fraction: share of `Where` questions.
        seed: of pages and questions.
        browser_pages, browser_fraction: see `training_screens`.
    """

    def __init__(
        self, batch_size: int = 16, questions: int = 12, where_fraction: float = 0.6, seed: int = 2,
        browser_pages: int = 6000, browser_fraction: float = 0.5,
    ) -> None:
        self.batch_size, self.questions, self.where_fraction, self.seed = batch_size, questions, where_fraction, seed
        self.browser_pages, self.browser_fraction = browser_pages, browser_fraction

    def prepare(self, model: Any, processor: Any) -> None:
        self.tokenizer: Tokenizer = processor.tokenizer
        model.add_mixin("packed_questions", PackedQuestionsMixin())
        nested = dict(model.nested_models())
        pictures = next(mixin for mixin in model.mixins.values() if isinstance(mixin, ImageMixin))
        self.image_size = pictures.tower_config.image_size
        self.num_features = pictures.num_features
        self.cross_size = nested["cross.tower"].config.image_size if "cross.tower" in nested else None
        self.answer_loss = CoordinateLoss(coordinate_ids(self.tokenizer), model.config.vocab_size)

    def finish(self, model: Any) -> None:
        model.del_mixin("packed_questions")

    def batches(self) -> Iterator[dict[str, Any]]:
        rng = random.Random(self.seed + 1)
        screens = training_screens(self.seed, self.browser_pages, self.browser_fraction)
        while True:
            yield self.batch(list(islice(screens, self.batch_size)), rng)

    def batch(self, screens: list[Screen], rng: random.Random) -> dict[str, Any]:
        """Pack questions about each page into one row behind its picture.

        Returns:
            input_ids, token_type_ids, position_ids, question_ids and labels [b, s]; images and cross_images.
        """
        shared = 3 + self.num_features
        rows = []
        for screen in screens:
            ids, positions, questions = [PAD] * shared, [0, 1, *[2] * self.num_features, 3], [0] * shared
            ids[0] = BOS
            labels = [NO_LABEL] * shared
            for number in range(self.questions):
                make = where_question if rng.random() < self.where_fraction else read_question
                question = make(rng.choice(screen.widgets))
                prompt, answer = self.tokenizer.encode(question.text), [*self.tokenizer.encode(question.answer), EOS]
                ids += [*prompt, *answer]
                labels += [*[NO_LABEL] * (len(prompt) - 1), *answer, NO_LABEL]
                positions += range(4, 4 + len(prompt) + len(answer))
                questions += [number + 1] * (len(prompt) + len(answer))
            rows.append((ids, labels, positions, questions))
        width = max(len(row[0]) for row in rows)
        fills = (PAD, NO_LABEL, 0, -1)
        ids, labels, positions, questions = (
            torch.tensor([row[part] + [fill] * (width - len(row[part])) for row in rows])
            for part, fill in enumerate(fills)
        )
        types = torch.zeros_like(ids)
        types[:, 1:shared] = 1
        batch = {
            "input_ids": ids, "token_type_ids": types, "position_ids": positions, "question_ids": questions,
            "labels": labels,
            "images": torch.stack([preprocess_image(screen.picture, self.image_size) for screen in screens]),
        }  # fmt: skip
        if self.cross_size is not None:
            pictures = [preprocess_image(screen.picture, self.cross_size) for screen in screens]
            batch["cross_images"] = torch.stack(pictures)
        return batch

    def loss(self, model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits, labels = model(**inputs), batch["labels"]
        learnt = labels != NO_LABEL
        return self.answer_loss(logits[learnt], labels[learnt])
