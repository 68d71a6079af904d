"""What models learn from: files of conversations, texts and labelled pictures.

Files are in any form that `mixformer.data.readers` reads; of each sample a task reads the fields that it needs:

    {"messages": [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "a red circle"}],
     "images": ["0001.png"], "text": "a red circle", "label": 3, "features": [[0.5, ...], ...]}

Files are relative to where the command runs. Batches come without end: the samples are shuffled anew each time all of
them were seen (`mixformer.data.stream`).
"""

from __future__ import annotations

import random
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from mixformer.data.causal_mask import CausalMaskTransform
from mixformer.data.processor import TrainingSample, UnusableSampleError
from mixformer.data.readers import JoinedRecords, Records, Source, open_records
from mixformer.data.records import Record, training_sample
from mixformer.data.stream import Batch, Deck, Reading, Stream
from mixformer.images import CLIP_MEAN, CLIP_STD, preprocess_image
from mixformer.objectives import IGNORED_LABEL
from mixformer.train.stages import Task

_Item = TypeVar("_Item")


def read_samples(file: str | Path) -> Records:
    """Open a file of samples.

    Raises:
        ValueError: no such file, or nothing in it. What is wrong with a sample is said when it is read, with file and
            line.
    """
    return open_records(str(file))


def shuffled_batches(items: Sequence[_Item], batch_size: int, source: random.Random) -> Iterator[list[_Item]]:
    """Yield lists of `batch_size` items without end, every item once before any comes again.

    A batch may hold the last items of one round and the first of the next, but none twice unless there are fewer items
    than it takes.
    """
    deck = Deck(len(items), [source.getrandbits(32)])
    while True:
        chosen: list[int] = []
        for _ in range(batch_size):
            chosen.append(deck.draw(set(chosen))[1])
        yield [items[index] for index in chosen]


class FileTask(Task):
    """Learn from files; subclasses turn samples into a batch.

    Args:
        file: a file or folder, or several `Source`s with weights (see `mixformer.data.readers`).
        batch_size: samples in a batch, of all processes together.
        max_length: most tokens in a row; None for no limit.
        seed: of the order, and of all other draws.
        reading: workers, and what is done about samples that cannot be used; None for the defaults.

    Raises:
        ValueError: a batch size or a length below 1, or no file.
    """

    def __init__(
        self, file: str | list[Source], batch_size: int = 8, max_length: int | None = None, seed: int = 0,
        reading: Reading | None = None,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value is not None and value < 1:
                raise ValueError(f"{type(self).__name__}.{name} is {value}; it must be at least 1.")
        self.sources = [Source(file)] if isinstance(file, (str, Path)) else list(file)
        self.weights = _weights(self.sources)
        self.batch_size, self.max_length, self.seed = batch_size, max_length, seed
        self.reading = Reading() if reading is None else reading
        self.processor: Any = None
        self.model: Any = None
        self._stream: Stream | None = None
        self._saved: dict[str, Any] | None = None
        self._shard: tuple[int, int] | None = None

    @property
    def file(self) -> str:
        """The files, for messages."""
        return ", ".join(source.file for source in self.sources)

    def prepare(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self._stream = self._saved = self._shard = None

    def shard(self, rank: int, world_size: int) -> None:
        """Make the rows of one process, every `world_size`-th; batches then name their samples in `_samples`."""
        self._shard = rank, world_size
        if self._stream is not None:
            self._stream.shard(rank, world_size)

    def state_dict(self) -> dict[str, Any]:
        """The place of the next batch."""
        return self.stream().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; called after `prepare`."""
        self._saved = state
        if self._stream is not None:
            self._stream.load_state_dict(state)

    def stream(self) -> Stream:
        """Where the batches come from; opened once after `prepare`."""
        if self._stream is None:
            self.check()
            sources = self.samples()
            stream = Stream(sources, self._named_batch, self.batch_size, self.seed, self.weights, self.reading)
            if self._shard is not None:
                stream.shard(*self._shard)
            if self._saved is not None:
                stream.load_state_dict(self._saved)
            self._stream = stream
        return self._stream

    def batches(self) -> Iterator[Batch]:
        for batch in self.stream():
            yield _on_device(batch, self.model)

    def samples(self) -> list[Sequence[Record]]:
        """The samples of each source."""
        return [open_records(source) for source in self.sources]

    def check(self) -> None:
        """Look before the first batch whether all that the task needs is there.

        Raises:
            ValueError: there is no processor.
        """
        if self.processor is None:
            raise ValueError(
                f"{type(self).__name__} writes texts down with the model's processor, and there is none. Set "
                f"`processor:` (and `tokenizer:`) in the configuration file."
            )

    def batch(self, samples: list[Record], draws: list[random.Random]) -> Batch:
        """A batch of the samples; each has draws of its own, which do not depend on what else is in the batch.

        Raises:
            TypeError: a task that makes none.
        """
        raise TypeError(f"{type(self).__name__} must define batch(samples, draws).")

    def _named_batch(self, samples: list[Record], draws: list[random.Random]) -> Batch:
        batch = self.batch(samples, draws)
        return batch if self._shard is None else {**batch, "_samples": [sample.where for sample in samples]}


class ConversationTask(FileTask):
    """Learn the assistant's answers in `messages`, given what comes before them and `images`.

    Args:
        file, batch_size, max_length, seed, reading: as of `FileTask`.
        supervise: `last` to learn the last answer only, `all` for every answer (see `TrainingSample`).
    """

    def __init__(
        self, file: str | list[Source], batch_size: int = 8, max_length: int | None = None, seed: int = 0,
        reading: Reading | None = None, supervise: str = "last",
    ) -> None:
        super().__init__(file, batch_size, max_length, seed, reading)
        if supervise not in ("last", "all"):
            raise ValueError(f"ConversationTask.supervise is {supervise!r}; choose last or all.")
        self.supervise = supervise

    def batch(self, samples: list[Record], draws: list[random.Random]) -> Batch:
        for sample in samples:
            sample.get("messages", list)
        rows = [training_sample(sample, self.processor.config, self.supervise) for sample in samples]
        return _training_batch(self, samples, rows)


class TextTask(FileTask):
    """Learn all tokens of `text`.

    Args:
        file, batch_size, max_length, seed, reading: as of `FileTask`.
        pictures: the text is about the line's `images`, which come with it.
        random_prefix: a random number of the first words, not all, is given instead of learnt, as in SimVLM
            (arXiv:2108.10904, section 3.1).
    """

    def __init__(
        self, file: str | list[Source], batch_size: int = 8, max_length: int | None = None, seed: int = 0,
        pictures: bool = False, random_prefix: bool = False, reading: Reading | None = None,
    ) -> None:
        super().__init__(file, batch_size, max_length, seed, reading)
        self.pictures, self.random_prefix = pictures, random_prefix

    def batch(self, samples: list[Record], draws: list[random.Random]) -> Batch:
        rows = []
        for sample, source in zip(samples, draws, strict=True):
            words = sample.get("text", str).split(" ")
            given = source.randrange(len(words)) if self.random_prefix else 0
            images = sample.get("images", list) if self.pictures else None
            rows.append(TrainingSample(" ".join(words[:given]), " ".join(words[given:]), images))
        return _training_batch(self, samples, rows)


class MaskedTextTask(FileTask):
    """Learn masked words, and whether two parts belong together (BERT, arXiv:1810.04805, section 3.1).

    Of the chosen tokens 80% become the tokenizer's mask, 10% a random token, 10% stay. Without pictures the parts are
    two sentences: those that follow one another in `messages`, or else lines that do in a plain file; half of the time
    the second comes from elsewhere. With pictures they are `text` and the picture, and half of the time the text is
    that of another line (VisualBERT, arXiv:1908.03557, section 3.3).

    Args:
        file, batch_size, max_length, seed, reading: as of `FileTask`.
        mask_fraction: of the tokens of the texts; one at least is chosen.
        pairs: whether to learn that the parts belong together; without, each row is one `text`.
        pictures: `none`; `images` for pixels; `features` for the line's own `features` [N, c], or, where it has none,
            the pixels of the picture's patches, row by row.
    """

    def __init__(
        self, file: str | list[Source], batch_size: int = 8, max_length: int | None = None, seed: int = 0,
        mask_fraction: float = 0.15, pairs: bool = True, pictures: str = "none", reading: Reading | None = None,
    ) -> None:
        super().__init__(file, batch_size, max_length, seed, reading)
        if pictures not in ("none", "images", "features"):
            raise ValueError(f"MaskedTextTask.pictures is {pictures!r}; choose none, images or features.")
        if not 0.0 < mask_fraction < 1.0:
            raise ValueError(f"MaskedTextTask.mask_fraction is {mask_fraction}; it must be between 0 and 1.")
        self.mask_fraction, self.pairs, self.pictures = mask_fraction, pairs, pictures
        self._all: list[Sequence[Record]] = []

    def check(self) -> None:
        super().check()
        if getattr(self.processor.tokenizer, "mask_id", None) is None:
            raise ValueError("The tokenizer has no token that masks others: take one with [MASK] or <mask>.")

    def samples(self) -> list[Sequence[Record]]:
        sources = super().samples()
        if self.pictures == "none" and self.pairs:
            sources = [_Neighbours(samples) for samples in sources]
        self._all = sources
        if self.pairs:
            joined = JoinedRecords(sources)
            texts = (self._last_part(joined, number) for number in range(len(joined)))
            known = (text for text in texts if text is not None)
            first = next(known, None)
            if all(text == first for text in known):
                raise ValueError(f"{self.file} has one text only: nothing else can take its place. Set pairs: false.")
        return sources

    def batch(self, samples: list[Record], draws: list[random.Random]) -> Batch:
        encode, config = self.processor.tokenizer.encode, self.processor.config
        with_images = self.pictures != "none"
        rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "segment_ids": [], "token_type_ids": []}
        apart = []
        for sample, source in zip(samples, draws, strict=True):
            parts = self._parts(sample)
            swapped = self.pairs and source.random() < 0.5
            if swapped:
                parts = [*parts[:-1], self._other(parts[-1], source)]
            apart.append(int(swapped))
            texts = _shortened([encode(part) for part in parts], self.max_length)
            ids, types, owners = self.processor.sentences(texts, int(with_images))
            masked, labels = self._masked(ids, owners, source)
            segments = [max(owner, 0) for owner in owners]
            for name, values in zip(rows, (masked, labels, segments, types), strict=True):
                rows[name].append(values)
        fills = {"input_ids": config.pad_id, "labels": IGNORED_LABEL}
        batch: Batch = {name: _padded(values, fills.get(name, 0)) for name, values in rows.items()}
        batch["attention_mask"] = _padded([[1] * len(ids) for ids in rows["input_ids"]], 0)
        if "segment_ids" not in getattr(self.model, "declared", ()):
            del batch["segment_ids"]
        if self.pairs:
            batch["next_sentence_labels"] = torch.tensor(apart)
        if not with_images:
            del batch["token_type_ids"]
            return batch
        return {**batch, **self._picture_inputs(samples)}

    def _other(self, text: str, source: random.Random) -> str:
        """A text that is not this one, of any sample."""
        samples = JoinedRecords(self._all)
        while True:
            other = self._last_part(samples, source.randrange(len(samples)))
            if other not in (None, text):
                return str(other)

    def _last_part(self, samples: Sequence[Record], number: int) -> str | None:
        """The second text of a sample; None for one that cannot be read, which is reported when its turn comes."""
        try:
            return self._parts(samples[number])[-1]
        except ValueError:
            return None

    def _parts(self, sample: Record) -> list[str]:
        if self.pictures == "none" and self.pairs:
            return [str(part) for part in sample.get("parts", list)]
        return [sample.get("text", str)]

    def _masked(self, ids: list[int], owners: list[int], source: random.Random) -> tuple[list[int], list[int]]:
        """The ids with some of the texts' tokens changed, and the labels."""
        masked, labels, tokenizer = list(ids), [IGNORED_LABEL] * len(ids), self.processor.tokenizer
        ends = zip(owners, [*owners[1:], None], strict=True)  # the last token of a text is eos
        places = [place for place, (owner, after) in enumerate(ends) if owner >= 0 and owner == after]
        for place in source.sample(places, min(len(places), max(1, round(self.mask_fraction * len(places))))):
            labels[place], draw = ids[place], source.random()
            if draw < 0.9:
                masked[place] = tokenizer.mask_id if draw < 0.8 else source.randrange(tokenizer.vocab_size)
        return masked, labels

    def _picture_inputs(self, samples: list[Record]) -> Batch:
        if self.pictures == "images":
            inputs: Batch = self.processor.picture_inputs([sample.picture() for sample in samples])
            return inputs
        length, found = self.processor.config.image_length, []
        for sample in samples:
            if "features" in sample.content:
                features = torch.tensor(sample.get("features", list), dtype=torch.float32)
            else:
                size = self.processor.config.patch_size
                pixels = self.processor.picture_inputs([sample.picture()])["images"][0]
                patches = pixels.unfold(1, size, size).unfold(2, size, size)  # [3, rows, columns, size, size]
                features = patches.permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)
            if features.dim() != 2 or len(features) != length:
                raise ValueError(
                    f"{sample.place}: features are {list(features.shape)}, but the processor has room for {length} "
                    f"regions of a picture; set its num_image_tokens."
                )
            found.append(features)
        return {"images": torch.stack(found)}


class PairTask(FileTask):
    """Learn which `text` belongs to which picture of a batch (CLIP, arXiv:2103.00020).

    Raises:
        ValueError: a batch larger than the file, in which a pair would stand twice.
    """

    def samples(self) -> list[Sequence[Record]]:
        sources = super().samples()
        total = sum(map(len, sources))
        if total < self.batch_size:
            raise ValueError(
                f"{self.file} has {total} pairs, fewer than a batch of {self.batch_size}, in which each may "
                f"stand once. Lower batch_size."
            )
        return sources

    def batch(self, samples: list[Record], draws: list[random.Random]) -> Batch:
        config, rows = self.processor.config, []
        for sample in samples:
            (text,) = _shortened([self.processor.tokenizer.encode(sample.get("text", str))], self.max_length)
            rows.append([*([] if config.bos_id is None else [config.bos_id]), *text, config.eos_id])
        return {
            "input_ids": _padded(rows, config.pad_id),
            "attention_mask": _padded([[1] * len(row) for row in rows], 0),
            **self.processor.picture_inputs([sample.picture() for sample in samples]),
        }


class ClassTask(FileTask):
    """Learn the class, `label`, of a picture. Without a processor, pictures are stretched to the model's size.

    Args:
        file, batch_size, seed, reading: as of `FileTask`.
        image_size: side of the square picture in pixels, where there is no processor; None for the model's.
        image_mean: per channel, of pictures in 0..1, where there is no processor.
        image_std: per channel.
    """

    def __init__(
        self, file: str | list[Source], batch_size: int = 8, seed: int = 0, image_size: int | None = None,
        image_mean: tuple[float, float, float] = CLIP_MEAN, image_std: tuple[float, float, float] = CLIP_STD,
        reading: Reading | None = None,
    ) -> None:
        super().__init__(file, batch_size, None, seed, reading)
        self.image_size, self.image_mean, self.image_std = image_size, image_mean, image_std

    def check(self) -> None:
        if self.processor is None and self.image_size is None:
            self.image_size = getattr(self.model.config, "image_size", None)
            if self.image_size is None:
                raise ValueError(f"{type(self.model).__name__} has no image_size of its own: set ClassTask.image_size.")

    def batch(self, samples: list[Record], draws: list[random.Random]) -> Batch:
        pictures = [sample.picture() for sample in samples]
        if self.processor is not None:
            inputs = self.processor.picture_inputs(pictures)
        else:
            assert self.image_size is not None
            means = self.image_mean, self.image_std
            inputs = {"images": torch.stack([preprocess_image(path, self.image_size, *means) for path in pictures])}
        return {**inputs, "labels": torch.tensor([sample.get("label", int) for sample in samples])}


class InfillingTask(FileTask):
    """Learn `text` whose spans were moved behind it (CM3, arXiv:2201.07520); see `CausalMaskTransform`.

    Args:
        file, batch_size, max_length, seed, reading: as of `FileTask`.
        sentinels: the tokens that stand for moved spans, in order; at most so many spans are moved.
        end: the token that ends each moved span; None for none.
        rate: mean of the Poisson draw of the number of spans.
    """

    def __init__(
        self, file: str | list[Source], batch_size: int = 8, max_length: int | None = None, seed: int = 0,
        sentinels: Sequence[str] = ("<mask:0>",), end: str | None = None, rate: float = 1.0,
        reading: Reading | None = None,
    ) -> None:
        super().__init__(file, batch_size, max_length, seed, reading)
        self.sentinels, self.end, self.rate = tuple(sentinels), end, rate

    def batch(self, samples: list[Record], draws: list[random.Random]) -> Batch:
        marks = [self._token(text) for text in self.sentinels]
        end = None if self.end is None else self._token(self.end)
        transform = CausalMaskTransform(tuple(marks), end, self.rate, max_spans=len(marks))
        config, rows = self.processor.config, []
        for sample, source in zip(samples, draws, strict=True):
            (ids,) = _shortened([self.processor.tokenizer.encode(sample.get("text", str))], self.max_length)
            try:
                moved = transform(ids, np.random.default_rng(source.getrandbits(64)))
            except ValueError as error:
                raise ValueError(f"{sample.place}: {error}") from error
            rows.append([*([] if config.bos_id is None else [config.bos_id]), *moved, config.eos_id])
        return {
            "input_ids": _padded(rows, config.pad_id),
            "attention_mask": _padded([[1] * len(row) for row in rows], 0),
            "labels": _padded([transform.labels(row) for row in rows], IGNORED_LABEL),
        }

    def _token(self, text: str) -> int:
        ids: list[int] = self.processor.inner_ids(text)
        if len(ids) != 1:
            raise ValueError(f"{text!r} is {len(ids)} tokens to this tokenizer; a mark must be one. Name another.")
        return ids[0]


def _weights(sources: Sequence[Source]) -> list[float] | None:
    if not sources:
        raise ValueError("There is no file to learn from: name one.")
    weights = [source.weight for source in sources if source.weight is not None]
    if weights and len(weights) < len(sources):
        without = next(source.file for source in sources if source.weight is None)
        raise ValueError(f"Some sources have a weight and {without} has none: give one to all of them, or to none.")
    return weights or None


def _training_batch(task: FileTask, samples: list[Record], rows: list[TrainingSample]) -> Batch:
    try:
        batch: Batch = task.processor.training_batch(rows, task.max_length)
    except ValueError as error:
        found = re.match(r"sample (\d+): ", str(error))
        if found is None:
            raise
        kind = UnusableSampleError if isinstance(error, UnusableSampleError) else ValueError
        raise kind(f"{samples[int(found[1])].place}: {str(error)[found.end() :]}") from error
    return batch


class _Neighbours(Records):
    """Pairs of sentences that follow one another, as `parts`: two messages, or two lines of one document."""

    def __init__(self, samples: Sequence[Record]) -> None:
        self.samples = samples
        self._places = array("q")  # of each pair: the number of its first sample, and of the message in it or -1
        before: int | None = None  # the document of the line before, where that is a text
        for number in range(len(samples)):
            try:
                sample = samples[number]
            except ValueError:
                self._places.extend((number, 0))  # reported when its turn comes
                before = None
                continue
            if before == sample.document:
                self._places.extend((number - 1, -1))
            talk = "messages" in sample.content
            for message in range(len(sample.get("messages", list)) - 1 if talk else 0):
                self._places.extend((number, message))
            before = None if talk else sample.document
        if not len(self):
            raise ValueError(
                f"{samples[0].place} and all others have no second sentence: give `messages`, or set pairs: false."
            )

    def __len__(self) -> int:
        return len(self._places) // 2

    def read(self, index: int) -> Record:
        number, message = self._places[2 * index : 2 * index + 2]
        first = self.samples[number]
        if message >= 0:
            parts = [str(said["content"]) for said in first.get("messages", list)[message : message + 2]]
        else:
            parts = [first.get("text", str), self.samples[number + 1].get("text", str)]
        return replace(first, content={"parts": parts})


def _shortened(texts: list[list[int]], max_length: int | None) -> list[list[int]]:
    """Cut tokens off the end of the longest text until all fit, with one end token each and bos."""
    texts = [list(text) for text in texts]
    while max_length is not None and sum(map(len, texts)) > max(len(texts), max_length - len(texts) - 1):
        max(texts, key=len).pop()
    return texts


def _padded(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


def _on_device(batch: Batch, model: Any) -> Batch:
    device = getattr(model, "device", None)
    if device is None:
        return batch
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}

