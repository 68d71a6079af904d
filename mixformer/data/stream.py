"""Streams: samples in a seeded order, in batches, split over processes, with a cursor.

The order follows from the seed and the position alone. Batch k holds the same samples whatever the number of processes
and workers; a process makes the rows of it that are its own. All draws of a sample follow from the seed, the round and
the sample, so they do not depend on who makes it either.
"""

from __future__ import annotations

import logging
import multiprocessing
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mixformer.data.processor import UnusableSampleError
from mixformer.data.records import Record, RecordError
from mixformer.objectives import IGNORED_LABEL

Batch = dict[str, Any]
MakeBatch = Callable[[list[Record], list[random.Random]], Batch]

log = logging.getLogger(__name__)

CHOICES = ("error", "skip")
"""What can be done about samples that cannot be used."""


@dataclass
class Reading:
    """How samples are read.

    Attributes:
        num_workers: processes that make batches ahead of time; 0 to make them when they are asked for.
        broken: `skip` leaves out rows and pictures that cannot be read, counts them and names them in the log; `error`
            stops.
        unusable: the same for samples of which nothing is left to learn, or whose image span would be cut.
        shuffle: whether samples come in a new order in every round, or always in that of the files.
    """

    num_workers: int = 0
    broken: str = "error"
    unusable: str = "error"
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise ValueError(f"Reading.num_workers is {self.num_workers}; it must be 0 or more.")
        for name in ("broken", "unusable"):
            if getattr(self, name) not in CHOICES:
                raise ValueError(f"Reading.{name} is {getattr(self, name)!r}; choose {' or '.join(CHOICES)}.")


class Place(NamedTuple):
    """A sample in the order: the number of its source, the round, and its number in the source."""

    source: int
    round: int
    number: int


class Deck:
    """The numbers below `size` without end, each once a round, shuffled anew in every round.

    Args:
        size: how many.
        seed: of the order.
        shuffle: False for the plain order.
    """

    def __init__(self, size: int, seed: Sequence[int], shuffle: bool = True) -> None:
        self.size, self.seed, self.shuffle = size, list(seed), shuffle
        self.round, self.position = 0, 0
        self._late: list[int] = []
        self._order = self._shuffled()

    def _shuffled(self) -> Any:
        if not self.shuffle:
            return range(self.size)
        return np.random.default_rng([*self.seed, self.round]).permutation(self.size)

    def draw(self, held: set[int]) -> tuple[int, int]:
        """The next round and number; those in `held` come as late in the round as can be."""
        while self.position < self.size:
            index = int(self._order[self.position])
            self.position += 1
            if index not in held:
                return self.round, index
            self._late.append(index)
        if self._late:
            return self.round, self._late.pop(0)
        self.round, self.position = self.round + 1, 0
        self._order = self._shuffled()
        return self.draw(held)

    def state_dict(self) -> dict[str, Any]:
        """Where the next draw goes on."""
        return {"round": self.round, "position": self.position, "late": list(self._late), "size": self.size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: the state of another number of samples.
        """
        if state["size"] != self.size:
            raise ValueError(
                f"The data has {self.size} samples, but {state['size']} when the state was saved: resume with the same "
                f"files, or start anew."
            )
        self.round, self.position, self._late = state["round"], state["position"], list(state["late"])
        self._order = self._shuffled()


class Order:
    """Places of samples, batch after batch.

    Args:
        sizes: samples of each source.
        weights: how often the sources come; None for all samples of all sources once a round.
        batch_size: of a batch of all processes together.
        seed: of the order.
        shuffle: False for that of the files.
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float] | None, batch_size: int, seed: int, shuffle: bool = True
    ) -> None:
        self.batch_size, self.weights, self._ends = batch_size, weights, np.cumsum(sizes)
        amounts = sizes if weights is not None else [sum(sizes)]
        self.decks = [Deck(size, [seed % 2**32, number], shuffle) for number, size in enumerate(amounts)]
        self.drawn = [0] * len(self.decks)

    def next(self) -> list[Place]:
        """The places of the next batch; none twice unless there are fewer samples than it takes."""
        places: list[Place] = []
        held: list[set[int]] = [set() for _ in self.decks]
        for _ in range(self.batch_size):
            number = self._deck()
            self.drawn[number] += 1
            turn, index = self.decks[number].draw(held[number])
            held[number].add(index)
            places.append(self._place(number, turn, index))
        return places

    def _deck(self) -> int:
        """The source that is furthest behind its share."""
        if self.weights is None:
            return 0
        done = sum(self.drawn) + 1
        behind = [w * done - n * sum(self.weights) for w, n in zip(self.weights, self.drawn, strict=True)]
        return behind.index(max(behind))

    def _place(self, number: int, turn: int, index: int) -> Place:
        if self.weights is not None:
            return Place(number, turn, index)
        source = int(np.searchsorted(self._ends, index, side="right"))
        return Place(source, turn, index - int(self._ends[source - 1]) if source else index)

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch goes on."""
        return {"drawn": list(self.drawn), "decks": [deck.state_dict() for deck in self.decks]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: the state of other sources.
        """
        if len(state["decks"]) != len(self.decks):
            raise ValueError(f"The data has {len(self.decks)} weighted sources, but {len(state['decks'])} when saved.")
        self.drawn = list(state["drawn"])
        for deck, saved in zip(self.decks, state["decks"], strict=True):
            deck.load_state_dict(saved)


class Skipped(NamedTuple):
    """A sample that was left out."""

    where: str
    kind: str
    reason: str


class Stream:
    """Batches of samples without end.

    A sample that is left out makes its batch smaller. Where all rows of a process are left out, it makes the next one
    that can be used with nothing to learn in it, so that no process waits for another; where a process is alone, the
    batch is left out.

    Args:
        sources: sequences of records.
        make: makes a batch of records, with a source of draws for each.
        batch_size: of a batch of all processes together.
        seed: of the order, and of all draws.
        weights: how often the sources come, relative to one another; None for all samples once a round.
        reading: options.

    Attributes:
        skipped: how many samples this process left out so far, by `broken` and `unusable`.
    """

    def __init__(
        self, sources: Sequence[Sequence[Record]], make: MakeBatch, batch_size: int, seed: int = 0,
        weights: Sequence[float] | None = None, reading: Reading | None = None,
    ) -> None:
        self.sources, self.make, self.seed = list(sources), make, seed
        self.reading = Reading() if reading is None else reading
        self.rank, self.world_size = 0, 1
        self.order = Order([len(source) for source in sources], weights, batch_size, seed, self.reading.shuffle)
        self.skipped = Counter[str]()
        self._cursor = self.order.state_dict()

    def shard(self, rank: int, world_size: int) -> None:
        """Make the rows of one process only: every `world_size`-th.

        Raises:
            ValueError: a batch has fewer rows than there are processes.
        """
        if self.order.batch_size < world_size:
            raise ValueError(
                f"batch_size {self.order.batch_size} is less than the {world_size} processes that it is split over: "
                f"raise it to {world_size} or more."
            )
        self.rank, self.world_size = rank, world_size

    def state_dict(self) -> dict[str, Any]:
        """The place of the batch that comes next, however many were made ahead of time; the same in all processes."""
        return {"order": self._cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: the state of other data.
        """
        self.order.load_state_dict(state["order"])
        self._cursor = self.order.state_dict()

    def __iter__(self) -> Iterator[Batch]:
        self.order.load_state_dict(self._cursor)  # batches that were made ahead and not taken come again
        empty = 0
        for batch, skipped, cursor in self._made():
            self._cursor = cursor
            for sample in skipped:
                self.skipped[sample.kind] += 1
                number = sum(self.skipped.values())
                log.warning("skipped %s sample %s (%d so far): %s", sample.kind, sample.where, number, sample.reason)
            empty = empty + 1 if batch is None else 0
            if batch is not None:
                yield batch
            elif empty * self.order.batch_size >= sum(map(len, self.sources)):
                raise ValueError("No sample of the data can be used: see the log, or `mixformer data check FILE`.")

    def _made(self) -> Iterator[tuple[Batch | None, list[Skipped], dict[str, Any]]]:
        if self.reading.num_workers == 0:
            for request in self._requests():
                yield self.made(request)
            return
        fork = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
        loader: DataLoader[Any] = DataLoader(
            _Requests(self), sampler=self._requests(), batch_size=None, num_workers=self.reading.num_workers,
            collate_fn=_unchanged, multiprocessing_context=fork,
        )
        for item in loader:
            if isinstance(item, Exception):
                raise item
            yield item

    def _requests(self) -> Iterator[tuple[list[Place], dict[str, Any]]]:
        while True:
            places = self.order.next()
            yield places, self.order.state_dict()

    def made(self, request: tuple[list[Place], dict[str, Any]]) -> tuple[Batch | None, list[Skipped], dict[str, Any]]:
        """What this process makes of the places of a batch: it, what was left out, and the cursor behind it."""
        places, cursor = request
        own = places[self.rank :: self.world_size]
        batch, skipped = self._batch(own)
        if batch is None and self.world_size > 1:
            batch = self._nothing_to_learn(places, skipped)
        return batch, skipped, cursor

    def _batch(self, places: list[Place]) -> tuple[Batch | None, list[Skipped]]:
        try:
            return self._make(places), []
        except ValueError as error:
            together = error
        good, skipped = [], []
        for place in places:  # look for the sample that it was
            try:
                self._make([place])
            except ValueError as error:
                where, reason = self._named(place, error)
                unusable = isinstance(error, UnusableSampleError)
                if (self.reading.unusable if unusable else self.reading.broken) == "error":
                    raise (UnusableSampleError if unusable else ValueError)(reason) from error
                skipped.append(Skipped(where, "unusable" if unusable else "broken", reason))
            else:
                good.append(place)
        if not skipped:
            raise together  # no sample by itself
        return self._make(good) if good else None, skipped

    def _make(self, places: list[Place]) -> Batch:
        records = [self.sources[place.source][place.number] for place in places]
        return self.make(records, [random.Random(f"{self.seed} {place}") for place in places])

    def _named(self, place: Place, error: ValueError) -> tuple[str, str]:
        """The name of a sample that cannot be used, and the message with its place in it."""
        if isinstance(error, RecordError):
            return f"{error.file}:{error.line}", str(error)
        record = self.sources[place.source][place.number]
        return record.where, str(error) if record.place in str(error) else f"{record.place}: {error}"

    def _nothing_to_learn(self, places: list[Place], skipped: list[Skipped]) -> Batch:
        """A batch for a process whose own samples all were left out."""
        last = places[-1]
        size = len(self.sources[last.source])
        others = (Place(last.source, last.round, (last.number + step) % size) for step in range(size))
        for place in [*places, *others]:
            try:
                batch = self._make([place])
            except ValueError:
                continue
            learnt = [name for name in batch if name == "labels" or name.endswith("_labels")]
            if not learnt:
                raise ValueError(
                    f"All samples of a batch of process {self.rank} were left out ({skipped[0].where}: "
                    f"{skipped[0].reason}), and what is learnt of others cannot be masked: take them out of the data."
                )
            return {**batch, **{name: torch.full_like(batch[name], IGNORED_LABEL) for name in learnt}}
        raise ValueError("No sample of the data can be used: see the log, or `mixformer data check FILE`.")


class _Requests(Dataset[Any]):
    """What workers are asked for."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __getitem__(self, request: Any) -> Any:
        try:
            return self.stream.made(request)
        except (ValueError, TypeError) as error:
            return error  # raised where it is taken, as itself


def _unchanged(item: Any) -> Any:
    return item
