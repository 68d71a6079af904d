"""Samples of different length side by side in rows of one length, instead of padding (arXiv:2107.02027).

A sample is a batch of one row; in a packed row samples are the documents that `DocumentsMixin` keeps apart. A sample is
packed whole, its pictures with it, or not at all.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from mixformer.data.skipped import Skipped, report
from mixformer.mixins.documents import DocumentsMixin
from mixformer.objectives import IGNORED_LABEL
from mixformer.train.task import Task
from mixformer.train.wrapped_task import WrappedTask

Batch = dict[str, Any]
PER_PICTURE = ("images", "cross_images", "pixel_attention_mask", "image_text_alignment", "frame_ids")
"""Inputs with an entry for each picture of the batch, in the order of their places."""
NAMES = "_samples"
_NAME = "documents"


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put things into bins: the longest first, each into the first bin with room; of two alike, the earlier first.

    Args:
        lengths: of each thing.
        capacity: of a bin.

    Returns:
        the indices in each bin, ascending; bins in the order of their first index.

    Raises:
        ValueError: a thing that no bin can hold.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if lengths[index] > capacity:
            raise ValueError(f"Sample {index} has {lengths[index]} tokens, a packed row {capacity}: raise the length.")
        place = next((place for place, left in enumerate(room) if lengths[index] <= left), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(capacity)
        bins[place].append(index)
        room[place] -= lengths[index]
    return sorted(sorted(held) for held in bins)


def split_batch(batch: Mapping[str, Any]) -> list[Batch]:
    """The rows of a batch, each a batch of its own without padding.

    Args:
        batch: what `Processor.training_batch` returns: inputs [b, s], pictures [m, ...] in the order of their places.

    Raises:
        ValueError: inputs that are neither of tokens nor of pictures, pictures without `token_type_ids`, or more or
            fewer than fit their places.
    """
    ids: torch.Tensor = batch["input_ids"]
    given = {name: value for name, value in batch.items() if value is not None}
    mask = given.pop("attention_mask", torch.ones_like(ids))
    marked = given.get("token_type_ids", torch.zeros_like(ids)) != 0
    pictures = {name: given.pop(name) for name in PER_PICTURE if name in given}
    names, prefixes = given.pop(NAMES, None), given.pop("prefix_lengths", None)
    for name, value in given.items():
        if not isinstance(value, torch.Tensor) or value.shape[:2] != ids.shape:
            shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(
                f"'{name}' ({shape}) has no value for each token of input_ids {tuple(ids.shape)}, so it cannot be "
                f"packed: pad instead."
            )
    counts = _pictures_by_row(marked, pictures)
    firsts, samples = [0, *torch.tensor(counts).cumsum(0).tolist()], []
    for row in range(len(ids)):
        real = (mask[row].bool() | marked[row]).nonzero().flatten()
        begin, end = (int(real[0]), int(real[-1]) + 1) if len(real) else (0, 0)
        sample: Batch = {name: value[row : row + 1, begin:end] for name, value in given.items()}
        sample["attention_mask"] = mask[row : row + 1, begin:end]
        if counts[row]:
            sample |= {name: value[firsts[row] : firsts[row + 1]] for name, value in pictures.items()}
        if prefixes is not None:
            sample["prefix_lengths"] = prefixes[row : row + 1]
        if names is not None:
            sample[NAMES] = [names[row]]
        samples.append(sample)
    return samples


def _pictures_by_row(marked: torch.Tensor, pictures: Mapping[str, torch.Tensor]) -> list[int]:
    """How many pictures each row of marked tokens [b, s] has."""
    taken: list[int] = marked.sum(1).tolist()
    sizes = {name: len(value) for name, value in pictures.items()}
    if not sizes:
        return [0] * len(taken)
    total, number = sum(taken), max(sizes.values())
    if len(set(sizes.values())) > 1 or not total or total % number or any(count % (total // number) for count in taken):
        raise ValueError(
            f"The pictures ({', '.join(f'{count} {name}' for name, count in sizes.items())}) do not fit their places: "
            f"rows have {taken} image tokens in token_type_ids."
        )
    return [count // (total // number) for count in taken]


def pack(samples: Sequence[Mapping[str, Any]], length: int, rows: Sequence[Sequence[int]] | None = None) -> Batch:
    """Put samples side by side into rows.

    Args:
        samples: batches of one row without padding at its ends (see `split_batch`).
        length: of the rows.
        rows: which samples each row holds; None for `first_fit_decreasing`.

    Returns:
        their inputs, [b, length] for tokens and [m, ...] for pictures in the order of their places; attention_mask,
        document_ids [b, length] (from 1 on, 0 on padding), and for prefix_lengths [b, most documents of a row]. The
        label of each document's first token is ignored, as nothing before it tells it.

    Raises:
        ValueError: no samples, one longer than a row, samples that have different inputs.
    """
    lengths = [sample["input_ids"].shape[1] for sample in samples]
    rows = first_fit_decreasing(lengths, length) if rows is None else rows
    if not any(rows):
        raise ValueError("There are no samples to pack.")
    ids: torch.Tensor = samples[0]["input_ids"]
    packed: Batch = {"document_ids": torch.zeros(len(rows), length, dtype=torch.int64, device=ids.device)}
    packed["attention_mask"] = torch.zeros_like(packed["document_ids"])
    order = [samples[index] for row in rows for index in row]
    for name in dict.fromkeys(name for sample in order for name in sample):
        if name in PER_PICTURE:
            packed[name] = torch.cat([sample[name] for sample in order if name in sample])
        elif name == NAMES:
            packed[name] = [told for sample in order for told in sample.get(name, ["?"])]
        elif name == "prefix_lengths":
            packed[name] = ids.new_zeros(len(rows), max(map(len, rows)))
    for number, row in enumerate(rows):
        start = 0
        for document, index in enumerate(row):
            sample, stop = samples[index], start + lengths[index]
            if stop > length:
                raise ValueError(f"Samples {list(row)} do not fit into a row of {length} tokens.")
            packed["document_ids"][number, start:stop] = document + 1
            packed["attention_mask"][number, start:stop] = 1
            for name, value in sample.items():
                if name == "prefix_lengths":
                    packed[name][number, document] = value[0]
                elif name != NAMES and name not in PER_PICTURE:
                    if name not in packed:
                        fill = IGNORED_LABEL if name == "labels" else 0
                        packed[name] = value.new_full((len(rows), length, *value.shape[2:]), fill)
                    packed[name][number, start:stop] = value[0]
            if "labels" in packed:
                packed["labels"][number, start] = IGNORED_LABEL
            start = stop
    return packed


def _own(sample: Batch) -> Batch:
    """The sample with memory of its own, that it can be saved without the batch it was cut from."""
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in sample.items()}


class PackedTask(WrappedTask):
    """Learn what another task gives, in packed rows.

    Samples are gathered `buffer` at a time and packed; rows come in the order of their first samples. What does not
    fill a batch waits for the next samples. With several processes each reads everything and takes its rows of each
    batch, so that batches do not depend on how many there are.

    Args:
        task: what gives the samples; its batch size does not matter.
        length: of the rows.
        rows: of a batch.
        buffer: samples that are packed together; more of them leave less padding.
        too_long: `error`, or `skip` for leaving samples out that are longer than a row; `skipped` counts them, and the
            log names them.

    Raises:
        ValueError: a number below 1, or another word for `too_long`.
    """

    def __init__(self, task: Task, length: int, rows: int = 1, buffer: int = 256, too_long: str = "error") -> None:
        for name, value in (("length", length), ("rows", rows), ("buffer", buffer)):
            if value < 1:
                raise ValueError(f"PackedTask.{name} is {value}; it must be at least 1.")
        if too_long not in ("error", "skip"):
            raise ValueError(f"PackedTask.too_long is {too_long!r}; choose error or skip.")
        super().__init__(task)
        self.length, self.rows, self.buffer, self.too_long = length, rows, buffer, too_long
        self.skipped, self._rank, self._world_size, self._added = 0, 0, 1, False
        self._fitted, self._lost = False, set[str]()
        self._start: dict[str, Any] = {"task": None, "taken": 0, "waiting": [], "skipped": 0}
        self._done = 0

    def prepare(self, model: Any, processor: Any) -> None:
        super().prepare(model, processor)
        if not any(isinstance(mixin, DocumentsMixin) for mixin in model.mixins.values()):
            model.add_mixin(_NAME, DocumentsMixin())
            self._added = True

    def finish(self, model: Any) -> None:
        if self._added:
            model.del_mixin(_NAME)
            self._added = False
        super().finish(model)

    def shard(self, rank: int, world_size: int) -> None:
        """Give this process its rows of every batch.

        Raises:
            ValueError: rows that cannot be shared out evenly.
        """
        if self.rows % world_size:
            raise ValueError(
                f"PackedTask.rows is {self.rows}, which {world_size} processes cannot share evenly: set a multiple."
            )
        self.task.shard(0, 1)
        self._rank, self._world_size = rank, world_size

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch begins."""
        return {**self._start, "done": self._done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there, when `batches` is called next."""
        self._start = {name: state[name] for name in self._start}
        self._done = state["done"]

    def batches(self) -> Iterator[Batch]:
        """Yield packed batches as long as the task gives samples.

        Raises:
            ValueError: a sample longer than a row, unless it is skipped; no sample that fits; inputs that cannot be
                packed.
        """
        stream, begin = self._resumed(), self._done * self.rows
        share = self.rows // self._world_size
        while True:
            start, ended = self._start, True
            samples, taken, self.skipped = list(start["waiting"]), start["taken"], start["skipped"]
            for batch in stream:
                samples += self._fitting(split_batch(batch))
                taken += 1
                if len(samples) >= self.buffer:
                    ended = False
                    break
            bins = first_fit_decreasing([sample["input_ids"].shape[1] for sample in samples], self.length)
            whole = len(bins) if ended else len(bins) // self.rows * self.rows
            after = {
                "task": copy.deepcopy(self.task.state_dict()), "taken": taken, "skipped": self.skipped,
                "waiting": [_own(samples[index]) for index in sorted(index for held in bins[whole:] for index in held)],
            }
            for first in range(begin, whole, self.rows):
                self._done = first // self.rows + 1
                if first + self.rows >= whole:
                    self._start, self._done = after, 0
                if first + self.rows > whole and self._world_size > 1:
                    raise ValueError("The task ended within a batch, which several processes cannot share evenly.")
                held = bins[first + self._rank * share : min(first + (self._rank + 1) * share, whole)]
                yield pack(samples, self.length, held)
            if ended:
                return
            self._start, self._done, begin = after, 0, 0

    def _fitting(self, samples: list[Batch]) -> list[Batch]:
        fitting = [sample for sample in samples if sample["input_ids"].shape[1] <= self.length]
        if len(fitting) < len(samples) and self.too_long == "error":
            longest = max(sample["input_ids"].shape[1] for sample in samples)
            name = next((self._name(sample) for sample in samples if sample["input_ids"].shape[1] == longest), "")
            raise ValueError(
                f"{name} has {longest} tokens and a packed row {self.length}: raise PackedTask.length, lower the "
                f"task's max_length, or set too_long: skip."
            )
        self._fitted = self._fitted or bool(fitting)
        for sample in samples:
            if sample["input_ids"].shape[1] > self.length:
                if not self._fitted and NAMES in sample:
                    if self._name(sample) in self._lost:
                        raise ValueError(f"No sample fits into a packed row of {self.length}: raise PackedTask.length.")
                    self._lost.add(self._name(sample))
                self.skipped += 1
                reason = f"it has {sample['input_ids'].shape[1]} tokens, and a packed row {self.length}."
                report(Skipped(self._name(sample), "unusable", reason), self.skipped)
        return fitting

    @staticmethod
    def _name(sample: Batch) -> str:
        return str(sample[NAMES][0]) if NAMES in sample else "A sample"

    def _resumed(self) -> Iterator[Any]:
        """The task's batches from where the samples of the next batch begin."""
        if self._start["task"] is not None:
            self.task.load_state_dict(copy.deepcopy(self._start["task"]))
        stream = iter(self.task.batches())
        if self._start["task"] is None:
            for _ in range(self._start["taken"]):
                next(stream)
        return stream
