"""Streams: samples in a seeded order, in batches, split over processes, with a cursor.

The order follows from the seed and the position alone. Batch k holds the same samples whatever the number of processes
and workers; a process makes the rows of it that are its own. All draws of a sample follow from the seed, the round and
the sample, so they do not depend on who makes it either. `mixformer.data.remote` says what of this holds for sources
that have to be fetched.
"""

from __future__ import annotations

import logging
import multiprocessing
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from mixformer.data.order import Deck, Order, Place
from mixformer.data.processor import UnusableSampleError
from mixformer.data.readers import ChangedFileError
from mixformer.data.records import Record, RecordError
from mixformer.data.remote import RemoteRecords
from mixformer.data.skipped import Skipped, report
from mixformer.objectives import IGNORED_LABEL

__all__ = ["CHOICES", "Batch", "Deck", "MakeBatch", "Order", "Place", "Reading", "Stream"]

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
        self.remote = [source for source in self.sources if isinstance(source, RemoteRecords)]
        sizes = [source if isinstance(source, RemoteRecords) else len(source) for source in self.sources]
        self.order = Order(sizes, weights, batch_size, seed, self.reading.shuffle)
        self._strict()
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
        self._strict()

    def _strict(self) -> None:
        for source in self.remote:
            source.strict = self.world_size > 1 or self.reading.broken == "error"

    def state_dict(self) -> dict[str, Any]:
        """The place of the batch that comes next, however many were made ahead of time; the same in all processes."""
        return {"order": self._cursor, "sources": [_described(source) for source in self.sources]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Files of the same number of samples and another size are taken, with a warning.

        Raises:
            ValueError: the state of other data.
        """
        now = [_described(source) for source in self.sources]
        saved = state.get("sources", now)
        if len(saved) != len(now):
            raise ValueError(f"The data has {len(now)} sources, but {len(saved)} when the state was saved.")
        for one, before in zip(now, saved, strict=True):
            if one["samples"] != before["samples"]:
                raise ValueError(
                    f"{one['name']} has {one['samples']} samples, but {before['samples']} when the state was saved: "
                    f"resume with the same files, or start anew."
                )
            if one["bytes"] != before["bytes"]:
                log.warning(
                    "%s has %s bytes, but %s when the state was saved. It has as many samples as before, so that the "
                    "run goes on in the same order.", one["name"], one["bytes"], before["bytes"],
                )
        self.order.load_state_dict(state["order"])
        self._cursor = self.order.state_dict()

    def __iter__(self) -> Iterator[Batch]:
        self.order.load_state_dict(self._cursor)  # batches that were made ahead and not taken come again
        empty = 0
        for batch, skipped, cursor in self._made():
            self._cursor = cursor
            self.order.release(cursor)
            for sample in skipped:
                self.skipped[sample.kind] += 1
                report(sample, sum(self.skipped.values()))
            empty = empty + 1 if batch is None else 0
            if batch is not None:
                yield batch
            elif (size := self._size()) is not None and empty * self.order.batch_size >= size:
                raise ValueError("No sample of the data can be used: see the log, or `mixformer data check FILE`.")

    def _size(self) -> int | None:
        """How many samples there are, as soon as it is known."""
        sizes = [source.known_size if isinstance(source, RemoteRecords) else len(source) for source in self.sources]
        return None if None in sizes else sum(filter(None, sizes))

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
        except ChangedFileError:
            raise
        except (ValueError, OSError) as error:
            together = error
        good, skipped = [], []
        for place in places:  # look for the sample that it was
            try:
                self._make([place])
            except (ValueError, OSError) as error:
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

    def _named(self, place: Place, error: ValueError | OSError) -> tuple[str, str]:
        """The name of a sample that cannot be used, and the message with its place in it."""
        if isinstance(error, RecordError):
            return error.where, str(error)
        try:
            record = self.sources[place.source][place.number]
        except OSError:
            where = f"sample {place.number} of {_described(self.sources[place.source])['name']}"
            return where, f"{where}: {error}"
        return record.where, str(error) if record.place in str(error) else f"{record.place}: {error}"

    def _nothing_to_learn(self, places: list[Place], skipped: list[Skipped]) -> Batch:
        """A batch for a process whose own samples all were left out."""
        last = places[-1]
        source = self.sources[last.source]
        size = 0 if isinstance(source, RemoteRecords) else len(source)
        others = source.beside(last.number) if isinstance(source, RemoteRecords) else (
            (last.number + step) % size for step in range(size)
        )
        for place in [*places, *(Place(last.source, last.round, number) for number in others)]:
            try:
                batch = self._make([place])
            except (ValueError, OSError):
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
        except (ValueError, TypeError, OSError) as error:
            return error  # raised where it is taken, as itself


def _described(source: Sequence[Record]) -> dict[str, Any]:
    """What tells a source from another, as far as it is known before it is read."""
    count = None if isinstance(source, RemoteRecords) else len(source)
    name, size = getattr(source, "name", "The data"), getattr(source, "num_bytes", None)
    return {"name": name, "samples": count, "bytes": size}


def _unchanged(item: Any) -> Any:
    return item
