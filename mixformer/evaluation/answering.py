"""Answers of a model to many questions, and how likely it finds given answers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from mixformer.data.processor import Images, Prompt
from mixformer.objectives import IGNORED_LABEL
from mixformer.slots import Slots


@dataclass(frozen=True)
class Question:
    """What a model is asked.

    Attributes:
        index: its number; draws depend on it and the seed, not on what else is asked.
        where: for messages.
        prompt: a question, or a conversation that ends with one.
        images: as of the processor.
        max_new_tokens: the answer ends after so many.
    """

    index: int
    where: str
    prompt: Prompt
    images: Images = None
    max_new_tokens: int = 256


@dataclass(frozen=True)
class Likelihood:
    """How likely a model finds the tokens of an answer, its end token last.

    Attributes:
        log_probabilities: [n] in nats, float64, on the CPU.
        is_greedy: [n] whether each token is the likeliest one.
    """

    log_probabilities: torch.Tensor
    is_greedy: torch.Tensor


def answers(
    model: Any, processor: Any, questions: Iterable[Question], batch_size: int = 8, template: str | None = None,
    sample: dict[str, float] | None = None, seed: int = 0,
) -> Iterator[tuple[int, str]]:
    """Answer questions, `batch_size` at a time.

    Args:
        model: a language model.
        processor: of its prompts.
        questions: one is asked for when there is room for it.
        batch_size: questions at a time.
        template: of the prompts; None for the processor's.
        sample: as of `mixformer.generate.stream`; None takes the likeliest tokens.
        seed: of the draws.

    Yields:
        (index of the question, answer), in the order in which answers end.

    Raises:
        ValueError: a question that the processor or the model refuses, named by its `where`.
    """
    slots = Slots(model, batch_size, stop_tokens=processor.config.stop_ids, sample=sample, seed=seed)
    waiting, more, places = iter(questions), True, dict[int, str]()
    while more or slots.num_busy:
        while more and slots.num_free:
            question = next(waiting, None)
            if question is None:
                more = False
                break
            places[question.index] = question.where
            try:
                batch = inputs_of(model, processor(question.prompt, question.images, template))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{question.where}: {str(error).removeprefix('prompt 0: ')}") from error
            slots.add(question.index, batch, question.max_new_tokens)
        try:
            ended = slots.step()
        except (ValueError, TypeError) as error:
            named = re.match(r"prompt (\d+): ", str(error))
            if named is None:
                raise
            raise ValueError(f"{places[int(named[1])]}: {str(error)[named.end() :]}") from error
        for index, tokens in ended:
            yield index, processor.decode(tokens).strip()


@torch.no_grad()
def likelihoods(model: Any, processor: Any, samples: Sequence[Any]) -> list[Likelihood]:
    """How likely the model finds the answers of training samples, run as one batch.

    Args:
        model: a language model.
        processor: of its prompts.
        samples: as of `Processor.training_batch`.

    Raises:
        ValueError: what the processor refuses.
    """
    batch = inputs_of(model, processor.training_batch(samples))
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch)[:, :-1]
    found = []
    for row, wanted in zip(logits, labels, strict=True):
        learnt = wanted != IGNORED_LABEL
        row, wanted = row[learnt].float(), wanted[learnt]
        losses = F.cross_entropy(row, wanted, reduction="none")
        found.append(Likelihood(-losses.double().cpu(), (row.argmax(-1) == wanted).cpu()))
    return found


def inputs_of(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the model reads of a processor's batch, on its device.

    Raises:
        ValueError: pictures for a model that reads none.
    """
    if "images" in batch and "images" not in model.declared:
        raise ValueError(f"{type(model).__name__} reads no pictures. Ask without, or take another model.")
    known = {"input_ids", "attention_mask", "labels", *model.declared}
    return {name: value.to(model.device) for name, value in batch.items() if name in known}
