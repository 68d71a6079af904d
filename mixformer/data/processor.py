"""Prompts and pictures to the tensors of `model(**batch)`, and ids back to answers.

A sequence is bos, then for each image its patches, between boi and eoi in models that have them (placeholder ids,
token type 1), then the text. In families with image slots the text marks other places for images, and the
configuration may put them elsewhere or cut a picture into several images of the model. Rows are padded on the left for
generation, on the right for training. Sources: the remote code of CogVLM, CogVLM2 and CogAgent; the text processors of
THUDM/CogVLM; `mixformer.prompts` for the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from PIL import Image

from mixformer.data.folders import PROCESSOR_FILE, read_settings, settings_file
from mixformer.data.grounding import snap_coordinates
from mixformer.data.processor_config import ProcessorConfig, TilingConfig
from mixformer.images import ImageSource, load_image, preprocess_image, quarter_picture, tile_picture
from mixformer.objectives import IGNORED_LABEL
from mixformer.prompts import Turn, extract_answer, get_template, render_prompt
from mixformer.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Processor", "ProcessorConfig", "TilingConfig", "TrainingSample", "UnusableSampleError", "join_picture_inputs",
    "load_processor",
]  # fmt: skip

Message = Mapping[str, str]
"""One message of a conversation: ``{"role": "user" or "assistant", "content": text}``."""

Prompt = str | Sequence[Message]
"""A question, or a conversation that ends with one."""

Images = ImageSource | Sequence[ImageSource] | None
"""The images of one prompt: none, one or several."""

Batch = dict[str, torch.Tensor]

_ANSWER_EDGE = "\ufdd0"  # a code point that Unicode keeps out of text; stands around answers while prompts are written

_TEXT_ONLY = "this model reads text only (no image_size): leave the images out"


class UnusableSampleError(ValueError):
    """A sample of which nothing is left to learn, or whose image span would be cut."""


@dataclass(frozen=True)
class TrainingSample:
    """A prompt and the answer to learn.

    Attributes:
        prompt: a question or a conversation; one that ends with an assistant's message brings its own answer.
        answer: the text to learn.
        images: as for `Processor.__call__`.
        history: past turns, for a prompt that is a plain question.
        template: name of the template; None for the processor's.
        supervise: `last` for the last answer, `all` for those of past turns as well.
    """

    prompt: Prompt
    answer: str | None = None
    images: Images = None
    history: Sequence[Turn] | None = None
    template: str | None = None
    supervise: str = "last"

    def __post_init__(self) -> None:
        if self.supervise not in ("last", "all"):
            raise ValueError(f"supervise is {self.supervise!r}: choose last or all (answers of a conversation)")


@dataclass
class _Row:
    """One sequence.

    Attributes:
        ids: token ids.
        types: 1 on the tokens that images fill, 0 elsewhere.
        labels: what is learnt.
        images: what the model reads, one entry per span.
        prompt_length: tokens of the prompt, which comes first.
        ends_with_image: whether an image is the last thing in it.
    """

    ids: list[int] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    images: list[ImageSource] = field(default_factory=list)
    prompt_length: int = 0
    ends_with_image: bool = False

    def add(self, ids: Sequence[int], kind: int = 0, learnt: bool = False) -> None:
        self.ids += ids
        self.types += [kind] * len(ids)
        self.labels += ids if learnt else [IGNORED_LABEL] * len(ids)
        self.ends_with_image = False

    def cut(self, length: int) -> None:
        """Leave out what comes after so many tokens."""
        del self.ids[length:], self.types[length:], self.labels[length:]


class Processor:
    """Prepares the inputs of a model and reads its answers.

    Args:
        config: see `ProcessorConfig`.
        tokenizer: the model's tokenizer.
    """

    def __init__(self, config: ProcessorConfig, tokenizer: Tokenizer) -> None:
        self.config = config
        self.tokenizer = tokenizer
        family = config.spelling
        texts = (config.image_open, family.image_open), (config.image_close, family.image_close)
        self._open, self._close = (self.inner_ids(own if given is None else given) for given, own in texts)

    def __call__(
        self,
        prompts: Prompt | Sequence[Prompt],
        images: Images | Sequence[Images] = None,
        template: str | None = None,
        history: Sequence[Turn] | Sequence[Sequence[Turn] | None] | None = None,
    ) -> Batch:
        """Make a batch to generate from, padded on the left.

        Args:
            prompts: a question, a conversation (messages with role and content), or a list of them.
            images: for one prompt: None, an image or a list of images; for a list of prompts: one such entry
                each. They come directly after bos in their order, or, in families with image slots, where the
                prompt marks them, or where `image_place` puts them.
            template: name of the template for all rows; None for the processor's.
            history: past (question, answer) turns of one prompt; for a list of prompts one entry (or None)
                each.

        Returns:
            input_ids [b,s] and attention_mask [b,s] (0 on padding); for models with pictures token_type_ids
            [b,s] (1 on boi, patches and eoi); if there is any picture, images [m,3,y,x], and cross_images
            [m,3,y,x] for models that have them, in the order in which the images stand in the batch, and
            pixel_attention_mask [m,y,x] (1 on pixels, 0 on padding) where pictures keep their size. With
            `prefix_lm`, prefix_lengths [b].

        Raises:
            ValueError: images or history that do not match the prompts, an unknown template, a conversation
                out of order, an unreadable picture, images for a text-only model.
        """
        batch_prompts, batch_images, batch_history = _as_batch(prompts, images, history)
        rows = []
        for index, prompt in enumerate(batch_prompts):
            try:
                rows.append(self._row(prompt, batch_images[index], template, batch_history[index]))
            except ValueError as error:
                raise ValueError(f"prompt {index}: {error}") from error
        return self._collate(rows, "left", None)

    def training_batch(
        self,
        samples: Sequence[TrainingSample | Mapping[str, Any]],
        max_length: int | None = None,
        padding_side: Literal["left", "right"] = "right",
        pad_to_max_length: bool = False,
    ) -> Batch:
        """Make a batch to learn from.

        The answer and the eos after it are learnt, nothing else. With `max_length`, a long answer is cut
        after max_length - 4 tokens of prompt, images and answer together, and still ends with eos, as in the
        released training code.

        Where a sample supervises `all` answers, each past one is tokenised as it would be generated, and the label
        of the token behind it is eos, also in templates that go on without one: there the model learns to stop while
        it reads on. With `max_length`, turns that do not fit are left out from the end.

        Args:
            samples: training samples, or mappings with their fields.
            max_length: longest sequence allowed.
            padding_side: where shorter rows are filled.
            pad_to_max_length: fill up to `max_length` rather than to the longest row.

        Returns:
            What `__call__` returns, and labels [b,s]: the ids to learn, -100 elsewhere.

        Raises:
            ValueError: as `__call__`.
            UnusableSampleError: a sample of which nothing is left to learn, or whose image span or prompt does not
                fit into `max_length`.
        """
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
        if pad_to_max_length and max_length is None:
            raise ValueError("pad_to_max_length needs max_length: say how long rows are to be")
        if not samples:
            raise ValueError("no samples: a batch needs at least one")
        rows = []
        for index, sample in enumerate(samples):
            try:
                rows.append(self._training_row(_as_sample(sample), max_length))
            except ValueError as error:
                kind = UnusableSampleError if isinstance(error, UnusableSampleError) else ValueError
                raise kind(f"sample {index}: {error}") from error
        batch = self._collate(rows, padding_side, max_length if pad_to_max_length else None)
        width = batch["input_ids"].shape[1]
        batch["labels"] = torch.tensor([_pad(r.labels, IGNORED_LABEL, width, padding_side) for r in rows])
        return batch

    def decode(self, ids: Sequence[int] | torch.Tensor) -> str:
        """Turn the ids of one row into text.

        Args:
            ids: [s]; prompt ids may come first. Padding, bos and image placeholders give no text, and what
                follows the first stop token is left out.
        """
        numbers = ids.tolist() if isinstance(ids, torch.Tensor) else [int(i) for i in ids]
        if any(isinstance(number, list) for number in numbers):
            raise ValueError("decode reads one row of ids: decode the rows of a batch one by one")
        config = self.config
        while numbers and numbers[0] == config.pad_id:  # before stop tokens are looked for: pad may be one
            numbers = numbers[1:]
        stops = (place for place, number in enumerate(numbers) if number in config.stop_ids)
        stop = next(stops, len(numbers))
        silent = {config.pad_id, config.placeholder_id, config.bos_id}
        return self.tokenizer.decode([number for number in numbers[:stop] if number not in silent])

    def answer(self, text: str, template: str | None = None) -> str:
        """Take the answer out of text that may repeat the prompt; see `mixformer.prompts.extract_answer`."""
        return extract_answer(text, template or self.config.template, self.config.family)

    def save(self, folder: str | Path) -> None:
        """Write ``processor.yaml`` and the tokenizer's files, for `load_processor(folder)`."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(target)
        settings = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self.config).items()
        }
        (target / PROCESSOR_FILE).write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")

    def split(self, picture: ImageSource) -> list[ImageSource]:
        """The images of the model that a picture becomes: its tiles, its quarters and itself, or itself alone.

        Raises:
            ValueError: an unreadable picture that is to be cut.
        """
        config = self.config
        if config.quarters:
            return list(quarter_picture(load_image(picture)))
        if config.tiles is None or config.image_size is None:
            return [picture]
        options = dataclasses.asdict(config.tiles)
        return list(tile_picture(load_image(picture), config.image_size, **options, resample=config.image_filter))

    def picture_inputs(self, images: Sequence[ImageSource]) -> Batch:
        """What the model reads for the images that `split` gave: images, and what comes with them (see `__call__`).

        Raises:
            ValueError: an unreadable picture, or a model without pictures.
        """
        config = self.config
        if config.image_size is None:
            raise ValueError(_TEXT_ONLY)
        prepared = [self._prepare(image, config.image_size) for image in images]
        batch = {"images": _stack(prepared)}
        if config.cross_image_size is not None:
            batch["cross_images"] = self._pictures(images, config.cross_image_size)
        if config.image_fit == "native":
            batch["pixel_attention_mask"] = _stack([torch.ones_like(pixels[0]) for pixels in prepared]).long()
        return batch

    def inner_ids(self, text: str) -> list[int]:
        """Ids of a text inside of others: without the space that some tokenizers put before a text of its own."""
        if not text:
            return []
        before, both = self.tokenizer.encode("a"), self.tokenizer.encode(f"a{text}")
        inside = both[: len(before)] == before
        return both[len(before) :] if inside else self.tokenizer.encode(text)

    def sentences(
        self, texts: Sequence[Sequence[int]], num_images: int = 0
    ) -> tuple[list[int], list[int], list[int]]:
        """Texts as an encoder reads them: bos, then each text and eos, with placeholders where `image_place` puts them.

        Args:
            texts: ids of each text.
            num_images: how many images of the model belong to them.

        Returns:
            the ids; 1 for each of them that an image fills, 0 for the others; and the number of the text that each
            belongs to, its eos included, -1 for the others.
        """
        row, place = _Row(), self.config.place
        if place == "front":
            self._add_images(row, [num_images])
        row.add([] if self.config.bos_id is None else [self.config.bos_id])
        if place in ("first", "slot"):
            self._add_images(row, [num_images])
        owners = [-1] * len(row.ids)
        for number, text in enumerate(texts):
            row.add([*text, self.config.eos_id])
            owners += [number] * (len(text) + 1)
        self._add_last(row, [num_images])
        return row.ids, row.types, owners + [-1] * (len(row.ids) - len(owners))

    def _row(
        self,
        prompt: Prompt,
        images: Images,
        template: str | None,
        history: Sequence[Turn] | None,
        spans: Sequence[int] | None = None,
    ) -> _Row:
        """A prompt; `spans` is how many images of the model each picture becomes, None to cut the pictures here."""
        sample = TrainingSample(prompt, images=images, history=history, template=template)
        row, groups, pieces = self._start(sample, spans)
        self._add_text(row, pieces[0], groups)
        row.prompt_length = len(row.ids)
        self._add_last(row, groups)
        return row

    def _start(self, sample: TrainingSample, spans: Sequence[int] | None = None) -> tuple[_Row, list[int], list[str]]:
        """What a row begins with.

        Returns:
            the row up to its text; the images of the model per picture; and the text, in one piece, or, where all
            answers are learnt, in pieces, of which every second one is a past answer.
        """
        config, pictures = self.config, _as_images(sample.images)
        if pictures and config.image_size is None:
            raise ValueError(_TEXT_ONLY)
        query, turns = _as_question(sample.prompt, sample.history)
        grid = config.coordinate_grid
        if grid is not None:
            query = snap_coordinates(query, grid)
            turns = [(snap_coordinates(asked, grid), snap_coordinates(said, grid)) for asked, said in turns]
        apart = sample.supervise == "all" and bool(turns)
        if apart:
            turns = [(asked, f"{_ANSWER_EDGE}{said.replace(_ANSWER_EDGE, '')}{_ANSWER_EDGE}") for asked, said in turns]
        place = config.place
        count, marked = len(pictures), place == "slot"
        text = render_prompt(query, sample.template or config.template, config.family, turns, count, marked)
        parts = [[picture] for picture in pictures] if spans else [self.split(picture) for picture in pictures]
        groups = list(spans) if spans else [len(part) for part in parts]
        row = _Row(images=[image for part in parts for image in part])
        if place == "front":
            self._add_images(row, groups)
        row.add([] if config.bos_id is None else [config.bos_id])
        if place == "first":
            self._add_images(row, groups)
        pieces = text.split(_ANSWER_EDGE) if apart else [text]
        if apart and len(pieces) == 1:
            raise ValueError("its template leaves past turns out: learn the last answer only, or use another template")
        return row, groups, pieces

    def _add_last(self, row: _Row, groups: list[int]) -> None:
        if self.config.place == "last":
            self._add_images(row, groups)

    def _add_images(self, row: _Row, groups: Sequence[int]) -> None:
        """Add the images of some pictures, which become so many images of the model each."""
        config = self.config
        for count in filter(None, groups):
            for number in [1] * count if config.quarters else [count]:
                if not (row.ends_with_image and self._open == self._close):
                    row.add(self._open)
                row.add([config.placeholder_id] * (config.span_length * number), kind=1)
                row.add(self._close)
                row.ends_with_image = True

    def _add_text(self, row: _Row, text: str, groups: Sequence[int], inner: bool = False) -> int:
        """Add a text and the images that it marks; how many pictures these are. `inner`: it follows other text."""
        spelling = self.config.spelling
        slot = spelling.image_slot if self.config.place == "slot" else None
        pieces = [text] if slot is None else text.split(slot)
        for index, piece in enumerate(pieces):
            if index:
                self._add_images(row, groups[index - 1 : index])
                attached = piece and not piece[0].isspace() and piece[0] != "<"
                piece = self._led(piece, spelling.image_lead) if attached else piece
            for number, part in enumerate([piece] if spelling.end_slot is None else piece.split(spelling.end_slot)):
                if number:
                    row.add([self.config.eos_id])
                if part:
                    joined = inner and not index and not number
                    row.add(self.inner_ids(part) if joined else self.tokenizer.encode(part))
        return len(pieces) - 1

    def _led(self, text: str, lead: str) -> str:
        """Put `lead` before a text, unless the tokenizer begins words by itself."""
        word = self.tokenizer.encode("a")
        return text if not lead or self.tokenizer.encode(f"a{lead}a")[len(word) :] == word else lead + text

    def _training_row(self, sample: TrainingSample, max_length: int | None) -> _Row:
        if sample.answer is None:
            raise UnusableSampleError("nothing to learn: give an answer, or end with the assistant's message")
        row, groups, pieces = self._start(sample)
        lead = self.config.spelling.answer_lead if pieces[0] else ""
        texts, said = pieces[::2], [*pieces[1::2], sample.answer]
        answers = [self.tokenizer.encode(self._led(text, lead if text else "")) for text in said]
        texts[:-1] = [self._without_gap(text, sample.template) for text in texts[:-1]]
        tail = _Row()
        self._add_last(tail, groups)
        used = 0
        for turn, (text, answer) in enumerate(zip(texts, answers, strict=True)):
            end = len(row.ids)
            marked = self._add_text(row, text, groups[used:], inner=turn > 0)
            if turn == 0:
                row.prompt_length = len(row.ids)
            room = len(answer) if max_length is None else max_length - 4 - len(row.ids) - len(tail.ids)
            if room < min(len(answer), 1):
                if turn == 0:
                    raise UnusableSampleError(self._does_not_fit(row, tail, len(answer), max_length))
                row.cut(end)
                break
            if turn:
                row.labels[end] = self.config.eos_id
            used += marked
            row.add(answer[:room], learnt=True)
            if room < len(answer):
                break
        if self.config.place == "slot" and used < len(groups):
            raise UnusableSampleError(
                f"{len(groups) - used} image(s) of later turns do not fit into max_length {max_length}: raise "
                f"max_length, or leave the sample out"
            )
        row.add([self.config.eos_id], learnt=True)
        self._add_last(row, groups)
        return row

    def _does_not_fit(self, row: _Row, tail: _Row, answer_length: int, max_length: int | None) -> str:
        """Why a prompt leaves no room."""
        before = len(row.ids) + len(tail.ids)
        images_length, needed = sum(row.types) + sum(tail.types), before + answer_length + 4
        if max_length is not None and images_length + 4 > max_length:
            return (
                f"its image span(s) of {images_length} tokens do not fit into max_length {max_length}: "
                f"raise max_length to {needed} or more, or use fewer or smaller images"
            )
        return (
            f"its prompt of {before} tokens leaves no room for the answer in max_length "
            f"{max_length}: raise max_length to {needed} or more, or leave the sample out"
        )

    def _without_gap(self, text: str, template: str | None) -> str:
        """What stands before a past answer, as it reads when that answer is generated."""
        current = get_template(self.config.family, template or self.config.template).current
        return text.rstrip() + current[len(current.rstrip()) :]

    def _collate(self, rows: list[_Row], side: str, width: int | None) -> Batch:
        width = max(len(row.ids) for row in rows) if width is None else width
        batch = {
            "input_ids": torch.tensor([_pad(row.ids, self.config.pad_id, width, side) for row in rows]),
            "attention_mask": torch.tensor([_pad([1] * len(row.ids), 0, width, side) for row in rows]),
        }
        if self.config.prefix_lm:
            batch["prefix_lengths"] = torch.tensor([row.prompt_length for row in rows])
        if self.config.image_size is None:
            return batch
        batch["token_type_ids"] = torch.tensor([_pad(row.types, 0, width, side) for row in rows])
        images = [image for row in rows for image in row.images]
        return {**batch, **self.picture_inputs(images)} if images else batch

    def _pictures(self, images: Sequence[ImageSource], size: int) -> torch.Tensor:
        """[m, 3, y, x]"""
        return _stack([self._prepare(image, size) for image in images])

    def _prepare(self, image: ImageSource, size: int) -> torch.Tensor:
        config = self.config
        means = config.image_mean, config.image_std
        return preprocess_image(image, size, *means, config.image_fit, config.image_filter, config.shortest_side)


def join_picture_inputs(parts: Sequence[Batch]) -> Batch:
    """What `Processor.picture_inputs` gives for several lists of images as if they were one, pads included."""
    return {name: _stack([picture for part in parts for picture in part[name]]) for name in parts[0]}


def load_processor(
    path: str | Path, tokenizer: Tokenizer | str | Path | None = None, template: str | None = None
) -> Processor:
    """Make the processor of a checkpoint folder.

    Args:
        path: a folder written by `Processor.save` (``processor.yaml``), one in the Hugging Face layout
            (``config.json`` of CogVLM, CogVLM2, CogAgent, LLaVA, InternVL, Idefics2, GIT, CLIP or a text model), or
            one of SwissArmyTransformer (``model_config.json``).
        tokenizer: a tokenizer, or the file or folder of one; None if it lies in `path`.
        template: name of the template to use by default instead of the checkpoint's.

    Raises:
        ValueError: no such folder, none of these layouts, a setting that is missing or makes no sense, no
            tokenizer.
    """
    folder = Path(path)
    file = settings_file(folder)
    if tokenizer is None or isinstance(tokenizer, (str, Path)):
        tokenizer = load_tokenizer(folder if tokenizer is None else tokenizer)
    settings = read_settings(file, tokenizer)
    if template is not None:
        settings["template"] = template
    try:
        return Processor(ProcessorConfig(**settings), tokenizer)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from error


def _pad(values: list[int], fill: int, width: int, side: str) -> list[int]:
    filling = [fill] * (width - len(values))
    return filling + values if side == "left" else values + filling


def _stack(pictures: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack [..., y, x] tensors; smaller ones are padded with zeros at the right and at the bottom."""
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (-2, -1))
    stacked = pictures[0].new_zeros(len(pictures), *pictures[0].shape[:-2], height, width)
    for row, picture in zip(stacked, pictures, strict=True):
        row[..., : picture.shape[-2], : picture.shape[-1]] = picture
    return stacked


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping)


def _as_batch(prompts: Any, images: Any, history: Any) -> tuple[list[Prompt], list[Images], list[Any]]:
    """Bring one prompt and a list of prompts to the same form."""
    if isinstance(prompts, str) or (isinstance(prompts, Sequence) and prompts and _is_message(prompts[0])):
        return [prompts], [images], [history]
    if not isinstance(prompts, Sequence):
        kind = type(prompts).__name__
        raise TypeError(f"prompts must be text, a conversation or a list of them, got {kind}")
    if not prompts:
        raise ValueError("no prompts: a batch needs at least one")
    lists = {"images": images, "history": history}
    for name, value in lists.items():
        if value is None:
            lists[name] = [None] * len(prompts)
        elif not isinstance(value, (list, tuple)) or len(value) != len(prompts):
            count = f"a list of {len(value)}" if isinstance(value, (list, tuple)) else type(value).__name__
            raise ValueError(
                f"{len(prompts)} prompt(s) in a list, but {name} is {count}: give a list with one entry per "
                f"prompt, None for a prompt without"
            )
    return list(prompts), list(lists["images"]), list(lists["history"])


def _as_images(images: Any) -> list[ImageSource]:
    if images is None:
        return []
    if isinstance(images, (str, Path, bytes, bytearray, Image.Image, np.ndarray)):
        return [images]
    if isinstance(images, (list, tuple)):
        return list(images)
    raise TypeError(
        f"images of a prompt must be None, an image or a list of images, got {type(images).__name__}: "
        f"an image is a path, the bytes of a file, a PIL image or a numpy array"
    )


def _as_question(prompt: Prompt, history: Sequence[Turn] | None) -> tuple[str, list[Turn]]:
    """Split a prompt into the question to answer and the turns before it."""
    if isinstance(prompt, str):
        turns = [] if history is None else list(history)
        for turn in turns:
            pair = isinstance(turn, (list, tuple)) and len(turn) == 2
            if not pair or not all(isinstance(text, str) for text in turn):
                raise ValueError(f"history must be (question, answer) pairs of text, got {turn!r}")
        return prompt, [(question, answer) for question, answer in turns]
    if history is not None:
        raise ValueError("a conversation brings its own history: leave history out")
    contents = []
    for place, message in enumerate(prompt):
        expected = "assistant" if place % 2 else "user"
        role = message.get("role") if _is_message(message) else None
        if role != expected or not isinstance(message.get("content"), str):
            raise ValueError(
                f"message {place} must be {{'role': '{expected}', 'content': text}}, got {message!r}: "
                f"messages alternate, the user's first; put other instructions into the user's text"
            )
        contents.append(message["content"])
    if len(contents) % 2 == 0:
        raise ValueError("a conversation to be answered must end with the user's message")
    return contents[-1], list(zip(contents[:-1:2], contents[1::2], strict=True))


def _as_sample(sample: TrainingSample | Mapping[str, Any]) -> TrainingSample:
    if isinstance(sample, Mapping):
        known = [field.name for field in dataclasses.fields(TrainingSample)]
        for name in sample:
            if name not in known:
                raise ValueError(f"unknown field {name!r}: a sample has {', '.join(known)}")
        if "prompt" not in sample:
            raise ValueError("no prompt: a sample has at least prompt and answer")
        sample = TrainingSample(**sample)
    if not isinstance(sample, TrainingSample):
        raise TypeError(f"a sample must be a TrainingSample or a mapping, got {type(sample).__name__}")
    prompt = sample.prompt
    if sample.answer is not None or isinstance(prompt, str) or not prompt:
        return sample
    if _is_message(prompt[-1]) and prompt[-1].get("role") == "assistant":
        return dataclasses.replace(sample, prompt=prompt[:-1], answer=prompt[-1]["content"])
    return sample
