"""Documents whose spans are moved to the end, so that they are generated with both sides known (arXiv:2201.07520)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mixformer.generate import as_tuple, generate
from mixformer.objectives import IGNORED_LABEL

Span = tuple[int, int]
"""Tokens [start, stop) of a document."""


@dataclass(frozen=True)
class CausalMaskTransform:
    """Replace spans by sentinels and append them behind the document, each after its sentinel (section 2).

    `a b c d e` with the span `b c` becomes `a <mask:0> d e <mask:0> b c`. The number of spans is a Poisson draw within
    bounds, and the spans are what drawing pairs of uniform ends again and again gives, until no two meet.

    Attributes:
        sentinel_ids: ids of <mask:0>, <mask:1>, ...; spans take them in the order of the document.
        end_id: id that ends each moved span, as in the released code; None for none, as in the paper.
        rate: mean of the Poisson draw.
        min_spans: at least so many spans.
        max_spans: at most so many.
    """

    sentinel_ids: tuple[int, ...]
    end_id: int | None = None
    rate: float = 1.0
    min_spans: int = 1
    max_spans: int = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "sentinel_ids", tuple(self.sentinel_ids))
        if self.rate < 0:
            raise ValueError(f"CausalMaskTransform.rate is {self.rate}; it must be 0 or above.")
        if not 0 <= self.min_spans <= self.max_spans:
            raise ValueError(
                f"CausalMaskTransform: min_spans {self.min_spans} and max_spans {self.max_spans} must be "
                f"0 <= min_spans <= max_spans."
            )
        if len(self._marks) < len(self.sentinel_ids) + (self.end_id is not None):
            raise ValueError(f"CausalMaskTransform: sentinel_ids {self.sentinel_ids} and end_id must all differ.")
        if len(self.sentinel_ids) < self.max_spans:
            raise ValueError(
                f"CausalMaskTransform: {len(self.sentinel_ids)} sentinel_ids cannot mark max_spans {self.max_spans}. "
                f"Give one for each span, or lower max_spans."
            )

    @property
    def _marks(self) -> set[int]:
        return {*self.sentinel_ids, *([] if self.end_id is None else [self.end_id])}

    def __call__(self, ids: Sequence[int], generator: np.random.Generator) -> list[int]:
        """The document with spans drawn and moved; it grows by 2 per span, by 3 with `end_id`.

        Raises:
            ValueError: it has sentinels in it, or is too short.
        """
        return self.rotate(ids, self.draw(len(ids), generator))

    def draw(self, length: int, generator: np.random.Generator) -> list[Span]:
        """Spans of a document, in order; no two touch. There are fewer than drawn where it has no room for them.

        Raises:
            ValueError: it has no room for `min_spans`.
        """
        room = (length + 1) // 2
        if room < self.min_spans:
            raise ValueError(
                f"A document of {length} tokens is too short for {self.min_spans} spans, which take "
                f"{2 * self.min_spans - 1} at least. Leave it out, or lower min_spans."
            )
        drawn = int(np.clip(generator.poisson(self.rate), self.min_spans, self.max_spans))
        ends = sorted(generator.choice(length + 1, 2 * min(drawn, room), replace=False).tolist())
        return list(zip(ends[::2], ends[1::2], strict=True))

    def rotate(self, ids: Sequence[int], spans: Sequence[Span]) -> list[int]:
        """The document with the given spans moved.

        Raises:
            ValueError: it has sentinels in it, or spans are empty, out of order, or more than there are sentinels.
        """
        found = sorted(self._marks & set(ids))
        if found:
            raise ValueError(
                f"The document has token {found[0]} at place {list(ids).index(found[0])}, which marks spans. Take ids "
                f"for sentinel_ids and end_id that no text has."
            )
        if len(spans) > len(self.sentinel_ids):
            raise ValueError(f"{len(spans)} spans need as many sentinel_ids; there are {len(self.sentinel_ids)}.")
        body, tail, last = [], [], 0
        for sentinel, (start, stop) in zip(self.sentinel_ids, spans, strict=False):
            if not last <= start < stop <= len(ids):
                raise ValueError(
                    f"The span from {start} to {stop} is empty, begins before {last}, or ends behind the document of "
                    f"{len(ids)} tokens. Give spans in order, without overlap."
                )
            body += [*ids[last:start], sentinel]
            tail += [sentinel, *ids[start:stop], *([] if self.end_id is None else [self.end_id])]
            last = stop
        return [*body, *ids[last:], *tail]

    def restore(self, ids: Sequence[int]) -> list[int]:
        """The document before its spans were moved, the inverse of `rotate`.

        Raises:
            ValueError: the sentinels are not those of a whole document: each once in its place and once behind it.
        """
        places = [place for place, token in enumerate(ids) if token in self.sentinel_ids]
        num_spans, used = len(places) // 2, [ids[place] for place in places]
        if used != [*self.sentinel_ids[:num_spans]] * 2:
            raise ValueError(
                f"The sentinels {used} are not those of a document with moved spans: each of them in order, once in "
                f"the document and once behind it. It may have been cut."
            )
        pieces, start = [], 0
        for place in [*places, len(ids)]:
            pieces.append(list(ids[start:place]))
            start = place + 1
        kept, moved = pieces[: num_spans + 1], pieces[num_spans + 1 :]
        if self.end_id is not None:
            if any(span[-1:] != [self.end_id] for span in moved):
                raise ValueError(f"A moved span does not end with end_id {self.end_id}. It may have been cut.")
            moved = [span[:-1] for span in moved]
        return [*kept[0], *(token for pair in zip(moved, kept[1:], strict=True) for part in pair for token in part)]

    def labels(self, ids: Iterable[int]) -> list[int]:
        """What is learnt of a document with moved spans: all but the sentinels, whose places say nothing."""
        return [IGNORED_LABEL if token in self.sentinel_ids else token for token in ids]

    def infill(
        self, model: Any, pieces: Sequence[Sequence[int]], max_new_tokens: int = 64,
        stop_tokens: int | Sequence[int] = (), **options: Any,
    ) -> list[int]:
        """Fill the holes of a document, one after the other (section 4.1.2).

        Args:
            model: a language model that was trained on such documents.
            pieces: the document's token ids before, between and after the holes.
            max_new_tokens: at most so many in each hole.
            stop_tokens: ids that end a hole; sentinels and `end_id` do so too.
            **options: as of `mixformer.generate.stream`.

        Returns:
            the document with the holes filled.

        Raises:
            ValueError: no hole, or more than there are sentinels.
        """
        holes = self.sentinel_ids[: len(pieces) - 1]
        if not 0 < len(pieces) - 1 == len(holes):
            raise ValueError(
                f"{len(pieces)} pieces leave {len(pieces) - 1} holes; there must be 1 to {len(self.sentinel_ids)}."
            )
        ids = [*pieces[0], *(token for hole, piece in zip(holes, pieces[1:], strict=True) for token in (hole, *piece))]
        stops = self._marks | set(as_tuple(stop_tokens))
        for hole in holes:
            ids.append(hole)
            prompt = {"input_ids": torch.tensor([ids], device=model.device)}
            new = generate(model, prompt, max_new_tokens, stop_tokens=sorted(stops), **options)[0].tolist()
            end = next((place for place, token in enumerate(new) if token in stops), len(new))
            ids += [*new[:end], *([] if self.end_id is None else [self.end_id])]
        return self.restore(ids)
