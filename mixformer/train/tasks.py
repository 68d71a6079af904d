"""What models learn from: files of conversations, texts and labelled pictures.

A file ends with ``.jsonl`` and has one JSON object a line, of which a task reads the fields that it needs:

    {"messages": [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "a red circle"}],
     "images": ["0001.png"], "text": "a red circle", "label": 3, "features": [[0.5, ...], ...]}

Pictures are named relative to the file. Any other file is plain text: every line that is not empty is a `text`, and
empty lines part documents. Files are relative to where the command runs. Batches come without end: the samples are
shuffled anew each time all of them were seen.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from mixformer.data.causal_mask import CausalMaskTransform
from mixformer.images import CLIP_MEAN, CLIP_STD, preprocess_image
from mixformer.objectives import IGNORED_LABEL
from mixformer.train.stages import Task

Batch = dict[str, Any]
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Sample:
    """One line of a file.

    Attributes:
        where: file and line, for messages.
        content: its fields; `images` are paths that exist.
        document: number of the document that it belongs to; every line of JSON is one by itself.
    """

    where: str
    content: dict[str, Any]
    document: int

    def get(self, name: str, kind: type[_Item]) -> _Item:
        """A field.

        Raises:
            ValueError: it is missing, or of another type.
        """
        if name not in self.content:
            names = ", ".join(self.content) or "nothing"
            raise ValueError(f"{self.where} has no '{name}', only {names}. This task learns from it.")
        value = self.content[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{self.where}: '{name}' must be of type {kind.__name__}, not {value!r}.")
        return value

    def picture(self) -> Path:
        """The one picture.

        Raises:
            ValueError: none, or several.
        """
        images = self.get("images", list)
        if len(images) != 1:
            raise ValueError(f"{self.where} has {len(images)} images; this task learns from one picture a line.")
        picture: Path = images[0]
        return picture


def read_samples(file: str | Path) -> list[Sample]:
    """Read a file of samples (see the top of this module).

    Raises:
        ValueError: no such file, nothing in it, a line that is no JSON object, or a picture that is not there; the
            message names the file and the line.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"There is no file {path} to learn from. Files are relative to where the command runs.")
    samples, document = [], 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            document += 1
        elif path.suffix == ".jsonl":
            samples.append(Sample(where, _parsed(line, where, path.parent), number))
        else:
            samples.append(Sample(where, {"text": line.strip()}, document))
    if not samples:
        raise ValueError(f"{path} is empty: it takes one sample a line.")
    return samples


def _parsed(line: str, where: str, folder: Path) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON ({error}). Write one object a line.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where} is no JSON object: write {{...}} with the fields of a sample.")
    names = content.get("images")
    if names is None:
        return content
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where}: 'images' must be a list of file names, not {names!r}.")
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{where} names the picture {name}, which is not in {folder}.")
    return {**content, "images": [folder / name for name in names]}


def shuffled_batches(items: Sequence[_Item], batch_size: int, source: random.Random) -> Iterator[list[_Item]]:
    """Yield lists of `batch_size` items without end, every item once before any comes again.

    A batch may hold the last items of one round and the first of the next, but none twice unless there are fewer items
    than it takes.
    """
    waiting: list[int] = []
    while True:
        while len(waiting) < batch_size:
            held = set(waiting)
            waiting += sorted(source.sample(range(len(items)), len(items)), key=lambda index: index in held)
        yield [items[index] for index in waiting[:batch_size]]
        waiting = waiting[batch_size:]


class FileTask(Task):
    """Learn from a file; subclasses turn samples into a batch.

    Args:
        file: see `read_samples`.
        batch_size: samples in a batch.
        max_length: most tokens in a row; None for no limit.
        seed: of the order, and of all other draws.

    Raises:
        ValueError: a batch size or a length below 1.
    """

    def __init__(self, file: str, batch_size: int = 8, max_length: int | None = None, seed: int = 0) -> None:
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value is not None and value < 1:
                raise ValueError(f"{type(self).__name__}.{name} is {value}; it must be at least 1.")
        self.file, self.batch_size, self.max_length, self.seed = file, batch_size, max_length, seed
        self.processor: Any = None
        self.model: Any = None

    def prepare(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor

    def batches(self) -> Iterator[Batch]:
        self.check()
        samples, source = self.samples(), random.Random(self.seed)
        for chosen in shuffled_batches(samples, self.batch_size, source):
            yield _on_device(self.batch(chosen, source), self.model)

    def samples(self) -> list[Sample]:
        """All samples of the file."""
        return read_samples(self.file)

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

    def batch(self, samples: list[Sample], source: random.Random) -> Batch:
        """A batch of the samples.

        Raises:
            TypeError: a task that makes none.
        """
        raise TypeError(f"{type(self).__name__} must define batch(samples, source).")


class ConversationTask(FileTask):
    """Learn the assistant's last answer in `messages`, given what comes before it and `images`."""

    def batch(self, samples: list[Sample], source: random.Random) -> Batch:
        rows = [{"prompt": s.get("messages", list), "images": s.content.get("images")} for s in samples]
        return _training_batch(self, samples, rows)


class TextTask(FileTask):
    """Learn all tokens of `text`.

    Args:
        file, batch_size, max_length, seed: as of `FileTask`.
        pictures: the text is about the line's `images`, which come with it.
        random_prefix: a random number of the first words, not all, is given instead of learnt, as in SimVLM
            (arXiv:2108.10904, section 3.1).
    """

    def __init__(
        self, file: str, batch_size: int = 8, max_length: int | None = None, seed: int = 0, pictures: bool = False,
        random_prefix: bool = False,
    ) -> None:
        super().__init__(file, batch_size, max_length, seed)
        self.pictures, self.random_prefix = pictures, random_prefix

    def batch(self, samples: list[Sample], source: random.Random) -> Batch:
        rows = []
        for sample in samples:
            words = sample.get("text", str).split(" ")
            given = source.randrange(len(words)) if self.random_prefix else 0
            images = sample.get("images", list) if self.pictures else None
            rows.append({"prompt": " ".join(words[:given]), "answer": " ".join(words[given:]), "images": images})
        return _training_batch(self, samples, rows)


class MaskedTextTask(FileTask):
    """Learn masked words, and whether two parts belong together (BERT, arXiv:1810.04805, section 3.1).

    Of the chosen tokens 80% become the tokenizer's mask, 10% a random token, 10% stay. Without pictures the parts are
    two sentences: those that follow one another in `messages`, or else lines that do in a plain file; half of the time
    the second comes from elsewhere. With pictures they are `text` and the picture, and half of the time the text is
    that of another line (VisualBERT, arXiv:1908.03557, section 3.3).

    Args:
        file, batch_size, max_length, seed: as of `FileTask`.
        mask_fraction: of the tokens of the texts; one at least is chosen.
        pairs: whether to learn that the parts belong together; without, each row is one `text`.
        pictures: `none`; `images` for pixels; `features` for the line's own `features` [N, c], or, where it has none,
            the pixels of the picture's patches, row by row.
    """

    def __init__(
        self, file: str, batch_size: int = 8, max_length: int | None = None, seed: int = 0,
        mask_fraction: float = 0.15, pairs: bool = True, pictures: str = "none",
    ) -> None:
        super().__init__(file, batch_size, max_length, seed)
        if pictures not in ("none", "images", "features"):
            raise ValueError(f"MaskedTextTask.pictures is {pictures!r}; choose none, images or features.")
        if not 0.0 < mask_fraction < 1.0:
            raise ValueError(f"MaskedTextTask.mask_fraction is {mask_fraction}; it must be between 0 and 1.")
        self.mask_fraction, self.pairs, self.pictures = mask_fraction, pairs, pictures
        self._all: list[list[str]] = []

    def check(self) -> None:
        super().check()
        if getattr(self.processor.tokenizer, "mask_id", None) is None:
            raise ValueError("The tokenizer has no token that masks others: take one with [MASK] or <mask>.")

    def samples(self) -> list[Sample]:
        samples = super().samples()
        if self.pictures == "none" and self.pairs:
            samples = _neighbours(samples)
        self._all = [self._parts(sample) for sample in samples]
        if self.pairs and len({parts[-1] for parts in self._all}) < 2:
            raise ValueError(f"{self.file} has one text only: nothing else can take its place. Set pairs: false.")
        return samples

    def batch(self, samples: list[Sample], source: random.Random) -> Batch:
        encode, config = self.processor.tokenizer.encode, self.processor.config
        with_images = self.pictures != "none"
        rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "segment_ids": [], "token_type_ids": []}
        apart = []
        for sample in samples:
            parts = self._parts(sample)
            swapped = self.pairs and source.random() < 0.5
            if swapped:
                parts = [*parts[:-1], source.choice([p[-1] for p in self._all if p[-1] != parts[-1]])]
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

    def _parts(self, sample: Sample) -> list[str]:
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

    def _picture_inputs(self, samples: list[Sample]) -> Batch:
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
                    f"{sample.where}: features are {list(features.shape)}, but the processor has room for {length} "
                    f"regions of a picture; set its num_image_tokens."
                )
            found.append(features)
        return {"images": torch.stack(found)}


class PairTask(FileTask):
    """Learn which `text` belongs to which picture of a batch (CLIP, arXiv:2103.00020).

    Raises:
        ValueError: a batch larger than the file, in which a pair would stand twice.
    """

    def samples(self) -> list[Sample]:
        samples = super().samples()
        if len(samples) < self.batch_size:
            raise ValueError(
                f"{self.file} has {len(samples)} pairs, fewer than a batch of {self.batch_size}, in which each may "
                f"stand once. Lower batch_size."
            )
        return samples

    def batch(self, samples: list[Sample], source: random.Random) -> Batch:
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
        file, batch_size, seed: as of `FileTask`.
        image_size: side of the square picture in pixels, where there is no processor; None for the model's.
        image_mean: per channel, of pictures in 0..1, where there is no processor.
        image_std: per channel.
    """

    def __init__(
        self, file: str, batch_size: int = 8, seed: int = 0, image_size: int | None = None,
        image_mean: tuple[float, float, float] = CLIP_MEAN, image_std: tuple[float, float, float] = CLIP_STD,
    ) -> None:
        super().__init__(file, batch_size, None, seed)
        self.image_size, self.image_mean, self.image_std = image_size, image_mean, image_std

    def check(self) -> None:
        if self.processor is None and self.image_size is None:
            self.image_size = getattr(self.model.config, "image_size", None)
            if self.image_size is None:
                raise ValueError(f"{type(self.model).__name__} has no image_size of its own: set ClassTask.image_size.")

    def batch(self, samples: list[Sample], source: random.Random) -> Batch:
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
        file, batch_size, max_length, seed: as of `FileTask`.
        sentinels: the tokens that stand for moved spans, in order; at most so many spans are moved.
        end: the token that ends each moved span; None for none.
        rate: mean of the Poisson draw of the number of spans.
    """

    def __init__(
        self, file: str, batch_size: int = 8, max_length: int | None = None, seed: int = 0,
        sentinels: Sequence[str] = ("<mask:0>",), end: str | None = None, rate: float = 1.0,
    ) -> None:
        super().__init__(file, batch_size, max_length, seed)
        self.sentinels, self.end, self.rate = tuple(sentinels), end, rate

    def batch(self, samples: list[Sample], source: random.Random) -> Batch:
        marks = [self._token(text) for text in self.sentinels]
        end = None if self.end is None else self._token(self.end)
        transform = CausalMaskTransform(tuple(marks), end, self.rate, max_spans=len(marks))
        draws, config, rows = np.random.default_rng(source.getrandbits(64)), self.processor.config, []
        for sample in samples:
            (ids,) = _shortened([self.processor.tokenizer.encode(sample.get("text", str))], self.max_length)
            try:
                moved = transform(ids, draws)
            except ValueError as error:
                raise ValueError(f"{sample.where}: {error}") from error
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


def _training_batch(task: FileTask, samples: list[Sample], rows: list[dict[str, Any]]) -> Batch:
    try:
        batch: Batch = task.processor.training_batch(rows, task.max_length)
    except ValueError as error:
        found = re.match(r"sample (\d+): ", str(error))
        if found is None:
            raise
        raise ValueError(f"{samples[int(found[1])].where}: {str(error)[found.end() :]}") from error
    return batch


def _neighbours(samples: list[Sample]) -> list[Sample]:
    """Pairs of sentences that follow one another, as `parts`."""
    pairs = []
    for sample in samples:
        if "messages" in sample.content:
            said = [str(message["content"]) for message in sample.get("messages", list)]
            pairs += [Sample(sample.where, {"parts": list(pair)}, 0) for pair in pairwise(said)]
    for first, second in pairwise(samples):
        if first.document == second.document and "messages" not in first.content:
            parts = [first.get("text", str), second.get("text", str)]
            pairs.append(Sample(first.where, {"parts": parts}, 0))
    if not pairs:
        where = samples[0].where
        raise ValueError(f"{where} and all others have no second sentence: give `messages`, or set pairs: false.")
    return pairs


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
    return batch if device is None else {name: value.to(device) for name, value in batch.items()}

