"""Queues of prompts: some rows generate side by side, and one that has its answer makes place for the next prompt."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mixformer.cache import KVCache
from mixformer.generate import LogitsProcessor, as_tuple, checked_prompt, sampling_processors
from mixformer.model import BaseModel
from mixformer.slot_cache import SlotCache, index_tensor

Answer = tuple[int, torch.Tensor]
_NO_MORE = object()


def generate_queue(
    model: BaseModel,
    prompts: Iterable[Mapping[str, Any]],
    *,
    num_slots: int = 8,
    max_new_tokens: int | Iterable[int] = 256,
    stop_tokens: int | Sequence[int] = (),
    sample: dict[str, float] | None = None,
    processors: Sequence[LogitsProcessor] = (),
    seed: int | None = None,
) -> Iterator[Answer]:
    """Continue many prompts, some at a time; when one has its answer, the next prompt takes its place.

    An answer is what `generate` gives for its prompt alone, up to the rounding of logits.

    Args:
        model: a language model.
        prompts: batches of one row, as of the processor; moved to the model's device. One is asked for only when a
            slot is free, so a generator may read pictures as they are needed. A prompt may go on from a KVCache of
            one row, under the name `cache`: it is read and not changed, so many prompts may go on from one, such as
            questions about the same picture.
        num_slots: prompts at a time.
        max_new_tokens: at most so many for every prompt, or one number for each.
        stop_tokens: ids that end an answer.
        sample: as of `stream`. Every prompt draws from a generator of its own, seeded with
            `prompt_seed(seed, index)`, whatever runs beside it.
        processors: as of `stream`; each row is given to them by itself.
        seed: of the draws; None takes one from torch's own generator.

    Yields:
        (index of the prompt, [new] its tokens with the stop token), in the order in which answers end.
        `dict(generate_queue(...))` holds them all.

    Raises:
        TypeError: one batch in place of many prompts.
        ValueError: options that make no sense. Also a prompt that does not work, named by its index: it is raised
            after the answers under way have been given, and no further prompt is asked for.
    """
    if isinstance(prompts, Mapping):
        raise TypeError("prompts is one batch. Give many prompts of one row each: [processor(...), processor(...)].")
    slots = Slots(model, num_slots, stop_tokens=stop_tokens, sample=sample, processors=processors, seed=seed)
    limits = itertools.repeat(max_new_tokens) if isinstance(max_new_tokens, int) else iter(max_new_tokens)
    return _answers(slots, iter(prompts), limits)


def _answers(slots: Slots, prompts: Iterator[Any], limits: Iterator[int]) -> Iterator[Answer]:
    failure: Exception | None = None
    numbers, more = itertools.count(), True
    while more or slots.num_busy:
        try:
            while more and slots.num_free:
                prompt: Any = next(prompts, _NO_MORE)
                if prompt is _NO_MORE:
                    more = False
                else:
                    number = next(numbers)
                    slots.add(number, prompt, _limit(limits, number))
            slots.admit()
        except Exception as error:
            failure, more = failure or error, False
        else:
            yield from slots.step()
    if failure is not None:
        raise failure


def _limit(limits: Iterator[int], index: int) -> int:
    limit = next(limits, None)
    if limit is None:
        raise ValueError(f"max_new_tokens ends after {index} numbers, before the prompts do. Give each prompt one.")
    return limit


def prompt_seed(seed: int, index: int) -> int:
    """Seed of one prompt's generator. Neighbouring seeds and indices have nothing in common."""
    return int(np.random.SeedSequence([seed % 2**64, index % 2**64]).generate_state(1, np.uint64)[0])


class Slots:
    """Rows that generate side by side, each at its own place in its own answer.

    `add` prompts at any time, and call `step` until it has returned their answers; `generate_queue` does both.

    Args:
        model: a language model.
        num_slots: rows at a time.
        stop_tokens: these and the others as of `generate_queue`.

    Raises:
        ValueError: fewer than one slot, or sampling options that make no sense.
    """

    def __init__(
        self, model: BaseModel, num_slots: int = 8, *, stop_tokens: int | Sequence[int] = (),
        sample: dict[str, float] | None = None, processors: Sequence[LogitsProcessor] = (), seed: int | None = None,
    ) -> None:
        if num_slots < 1:
            raise ValueError(f"num_slots is {num_slots}; it must be at least 1.")
        self.model, self.num_slots, self.draws = model, num_slots, sample is not None
        self.stop_tokens = frozenset(as_tuple(stop_tokens))
        # Rows differ in how many tokens they have, so what looks at tokens gets one row at a time.
        penalty = {name: value for name, value in (sample or {}).items() if name == "repetition_penalty"}
        others = {name: value for name, value in (sample or {}).items() if name not in penalty}
        self.row_processors = [*processors, *sampling_processors(penalty)]
        self.logits_processors = sampling_processors(others)
        self.seed = int(torch.randint(2**62, ())) if self.draws and seed is None else seed or 0
        self.cache = SlotCache(model)
        self.rows: list[_Row] = []
        self.waiting: list[_Row] = []
        self.ended: list[_Row] = []
        self.last = torch.zeros(0, dtype=torch.int64, device=model.device)

    @property
    def num_free(self) -> int:
        """Slots that no prompt has or waits for."""
        return max(0, self.num_slots - len(self.rows) - len(self.waiting))

    @property
    def num_busy(self) -> int:
        """Prompts whose answers have not been returned."""
        return len(self.rows) + len(self.waiting) + len(self.ended)

    def add(self, index: int, prompt: Mapping[str, Any], max_new_tokens: int = 256) -> None:
        """Let a prompt wait for a slot.

        Args:
            index: of the prompt, for its answer, its errors and its draws.
            prompt: a batch of one row.
            max_new_tokens: at most so many.

        Raises:
            TypeError: no batch.
            ValueError: more rows than one, no tokens, padding on the right, max_new_tokens below one.
        """
        if not isinstance(prompt, Mapping):
            kind = type(prompt).__name__
            raise TypeError(f"prompt {index} is a {kind}. Give a batch of one row, such as a processor makes.")
        try:
            batch = checked_prompt(prompt, max_new_tokens)
            earlier = batch.pop("cache", None)
            if earlier is not None and earlier.batch_size != 1:
                raise ValueError(f"Its cache has {earlier.batch_size} rows. A prompt goes on from a cache of one row.")
            self.waiting.append(_Row(index, max_new_tokens, _single_row(batch, self.model.device), earlier))
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from error

    @torch.no_grad()
    def admit(self) -> None:
        """Run as many waiting prompts as there are slots for, and choose their first tokens. `step` calls this.

        Raises:
            ValueError: a prompt that the model refuses, named by its index. It is taken out; a next call goes on.
            TypeError: the same.
        """
        count = self.num_slots - len(self.rows)
        taken, self.waiting = self.waiting[:count], self.waiting[count:]
        if not taken:
            return
        self.cache.make_place(len(taken), max(row.length for row in taken))
        groups = _similar(taken)
        while groups:
            group, *groups = groups
            try:
                self._start(group)
            except Exception as error:
                if len(group) > 1:
                    groups = [*([row] for row in group), *groups]
                    continue
                self.waiting = [*itertools.chain(*groups), *self.waiting]
                if type(error) in (ValueError, TypeError):
                    raise type(error)(f"prompt {group[0].index}: {error}") from error
                raise

    @torch.no_grad()
    def step(self) -> list[Answer]:
        """Take waiting prompts in, then generate a token in every row.

        Returns:
            (index, [new] tokens) of the answers that ended.

        Raises:
            ValueError: as of `admit`.
            TypeError: as of `admit`.
        """
        self.admit()
        if self.rows:
            self.cache.make_room()
            logits = self.model(self.last[:, None], cache=self.cache, last_only=True)[:, -1]
            self._append(self.rows, self._choose(logits, self.rows))
        ended, self.ended = sorted(self.ended, key=lambda row: row.index), []
        return [(row.index, index_tensor(row.tokens, self.last)) for row in ended]

    def _start(self, group: list[_Row]) -> None:
        lengths = [row.length for row in group]
        part = self.cache.new_rows(self.model, len(group), max(lengths), group[0].earlier)
        logits = self.model(**_together([row.prompt for row in group]), cache=part, last_only=True)[:, -1]
        for row in group if self.draws else ():
            row.generator = torch.Generator(logits.device).manual_seed(prompt_seed(self.seed, row.index))
        chosen = self._choose(logits, group)
        self.cache.join(part, lengths, group[0].num_earlier)
        self.rows += group
        for row in group:
            row.prompt, row.earlier = {}, None
        self._append(group, torch.cat([self.last, chosen]))

    def _choose(self, logits: torch.Tensor, rows: list[_Row]) -> torch.Tensor:
        """[b, v] -> [b] the next tokens."""
        logits = logits.float()
        if self.row_processors:
            logits = torch.cat([self._processed(logits[i : i + 1], row) for i, row in enumerate(rows)])
        none = self.last.new_zeros(len(rows), 0)
        for process in self.logits_processors:
            logits = process(none, logits)
        if not self.draws:
            return logits.argmax(-1)
        weights = logits.softmax(-1)
        draws = [torch.multinomial(weights[i], 1, generator=row.generator) for i, row in enumerate(rows)]
        return torch.cat(draws)

    def _processed(self, logits: torch.Tensor, row: _Row) -> torch.Tensor:
        for process in self.row_processors:
            logits = process(index_tensor(row.tokens, self.last)[None], logits)
        return logits

    def _append(self, rows: list[_Row], last: torch.Tensor) -> None:
        """Give rows, the last ones or all, their tokens, and take out those that end with them.

        Args:
            rows: those that have a new token.
            last: [b] the last token of every row.
        """
        self.last, ended = last, set()
        for place, token in list(enumerate(last.tolist()))[-len(rows) :]:
            row = self.rows[place]
            row.tokens.append(token)
            if token in self.stop_tokens or len(row.tokens) == row.max_new_tokens:
                ended.add(place)
                self.ended.append(row)
        if not ended:
            return
        # The last rows move to the places of those that ended, so that the rows in use are the first ones.
        number = len(self.rows) - len(ended)
        movable = iter(place for place in range(number, len(self.rows)) if place not in ended)
        order = [next(movable) if place in ended else place for place in range(number)]
        self.cache.keep(order)
        self.rows = [self.rows[place] for place in order]
        self.last = self.last[index_tensor(order, self.last)]


@dataclass
class _Row:
    """A prompt and its answer. `length` counts its tokens and those of the cache that it goes on from."""

    index: int
    max_new_tokens: int
    prompt: dict[str, Any]
    earlier: KVCache | None
    num_earlier: int = field(init=False)
    length: int = field(init=False)
    tokens: list[int] = field(default_factory=list)
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        self.num_earlier = 0 if self.earlier is None else int(self.earlier.lengths)
        self.length = self.num_earlier + self.prompt["input_ids"].shape[1]


def _single_row(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A prompt on the model's device, without the slots that hold no token."""
    ids = batch.get("input_ids")
    if ids is None or ids.dim() != 2 or len(ids) != 1 or not ids.numel():
        found = None if ids is None else tuple(ids.shape)
        raise ValueError(f"Each prompt is a batch of one row, with input_ids of shape [1, s]; got {found}.")
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape == ids.shape:
        real = mask[0].bool()
        batch = {name: value for name, value in batch.items() if name != "attention_mask"}
        if not bool(real.all()):
            batch = {name: value[:, real] if _per_token(value, ids) else value for name, value in batch.items()}
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def _per_token(value: Any, ids: torch.Tensor) -> bool:
    """Whether an input has an entry for every token; four axes are those of pictures."""
    return isinstance(value, torch.Tensor) and value.dim() in (2, 3) and value.shape[:2] == ids.shape


def _similar(rows: list[_Row]) -> list[list[_Row]]:
    """Rows that one forward can take: the same inputs, and so little padding that one costs less than several."""
    kinds: dict[Any, list[_Row]] = {}
    for row in rows:
        kind: list[Any] = [id(row.earlier)]
        ids = row.prompt["input_ids"]
        for name, value in sorted(row.prompt.items()):
            if not isinstance(value, torch.Tensor) or value.dim() == 0:
                kind = [id(row)]
                break
            tokens = _per_token(value, ids)
            kind.append((name, tokens, value.dtype, value.shape[2 if tokens else 1 :]))
        kinds.setdefault(tuple(kind), []).append(row)
    groups: list[list[_Row]] = []
    for members in kinds.values():
        members.sort(key=lambda row: -row.length)
        for number, row in enumerate(members):
            if number and groups[-1][0].length - row.length <= 32 + row.length // 8:
                groups[-1].append(row)
            else:
                groups.append([row])
    return groups


def _together(prompts: list[dict[str, Any]]) -> dict[str, Any]:
    """One batch of single rows, padded on the left."""
    if len(prompts) == 1:
        return prompts[0]
    every = [prompt["input_ids"] for prompt in prompts]
    length = max(ids.shape[1] for ids in every)
    batch = {}
    for name, value in prompts[0].items():
        parts = [prompt[name] for prompt in prompts]
        batch[name] = torch.cat([_padded(part, length) for part in parts] if _per_token(value, every[0]) else parts)
    if any(ids.shape[1] < length for ids in every):
        batch["attention_mask"] = torch.cat([_padded(torch.ones_like(ids), length) for ids in every])
    return batch


def _padded(value: torch.Tensor, length: int) -> torch.Tensor:
    padding = value.new_zeros(1, length - value.shape[1], *value.shape[2:])
    return torch.cat([padding, value], dim=1)
