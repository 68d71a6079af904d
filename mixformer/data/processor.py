"""Prompts and pictures to the tensors of `model(**batch)`, and ids back to answers.

A sequence is bos, then for each image boi, its patches and eoi (placeholder ids, token type 1), then the
text. In the ``sat`` family the text may mark other places for images. Rows are padded on the left for
generation, on the right for training. Sources: the remote code of CogVLM, CogVLM2 and CogAgent; the text
processors of THUDM/CogVLM.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from PIL import Image

from mixformer.data.grounding import snap_coordinates
from mixformer.images import CLIP_MEAN, CLIP_STD, ImageSource, preprocess_image
from mixformer.prompts import Turn, extract_answer, get_family, get_template, render_prompt
from mixformer.tokenizer import Tokenizer, load_tokenizer

PROCESSOR_FILE = "processor.yaml"
IGNORED_LABEL = -100

Message = Mapping[str, str]
"""One message of a conversation: ``{"role": "user" or "assistant", "content": text}``."""

Prompt = str | Sequence[Message]
"""A question, or a conversation that ends with one."""

Images = ImageSource | Sequence[ImageSource] | None
"""The images of one prompt: none, one or several."""

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ProcessorConfig:
    """How prompts and pictures of one model are written down.

    Attributes:
        family: whose prompt spelling (`mixformer.prompts.FAMILIES`).
        template: the template used where a call names none; None for the family's default.
        image_size: side of the square picture in pixels; None for a model without pictures.
        patch_size: side of a patch in pixels.
        downsample: patches merged per side after the tower (2 in CogVLM2).
        num_image_tokens: patches of one image in the sequence, without boi and eoi; None to follow from the
            sizes.
        cross_image_size: side of the high-resolution picture; None without one.
        coordinate_grid: steps that boxes and points in prompts are rounded to, for a tokenizer that has only so
            many coordinates; None leaves thousandths as they are.
        image_mean: per channel, of pictures in 0..1.
        image_std: per channel.
        bos_id: id that opens a sequence; None for none.
        eos_id: id that ends an answer in training.
        pad_id: id that fills a batch.
        placeholder_id: id at boi, patches and eoi; the model overwrites their embeddings.
        stop_ids: every id that ends generation.
    """

    family: str = "hf-cogvlm"
    template: str | None = None
    image_size: int | None = None
    patch_size: int = 14
    downsample: int = 1
    num_image_tokens: int | None = None
    cross_image_size: int | None = None
    coordinate_grid: int | None = None
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD
    bos_id: int | None = 1
    eos_id: int = 2
    pad_id: int = 0
    placeholder_id: int = 0
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        get_template(self.family, self.template)
        object.__setattr__(self, "image_mean", tuple(self.image_mean))
        object.__setattr__(self, "image_std", tuple(self.image_std))
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids) or (self.eos_id,))
        optional = ("image_size", "num_image_tokens", "cross_image_size", "coordinate_grid")
        for name in ("patch_size", "downsample", *(n for n in optional if getattr(self, n) is not None)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"processor setting {name} must be a positive whole number, got {value!r}")
        for name in ("bos_id", "eos_id", "pad_id", "placeholder_id"):
            value = getattr(self, name)
            absent = value is None and name == "bos_id"
            if not absent and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"processor setting {name} must be a token id, got {value!r}")
        step = self.patch_size * self.downsample
        if self.image_size is not None and self.num_image_tokens is None and self.image_size % step:
            raise ValueError(
                f"image_size {self.image_size} does not divide into patches of {self.patch_size}, "
                f"{self.downsample} merged per side: choose a multiple of {step}, or give num_image_tokens"
            )
        if self.cross_image_size is not None and self.image_size is None:
            raise ValueError("cross_image_size comes beside image_size: give both")

    @property
    def image_length(self) -> int:
        """Patches of one image in the sequence (boi and eoi not counted); 0 without pictures."""
        if self.image_size is None:
            return 0
        return self.num_image_tokens or (self.image_size // (self.patch_size * self.downsample)) ** 2


@dataclass(frozen=True)
class TrainingSample:
    """A prompt and the answer to learn.

    Attributes:
        prompt: a question or a conversation; one that ends with an assistant's message brings its own answer.
        answer: the text to learn.
        images: as for `Processor.__call__`.
        history: past turns, for a prompt that is a plain question.
        template: name of the template; None for the processor's.
    """

    prompt: Prompt
    answer: str | None = None
    images: Images = None
    history: Sequence[Turn] | None = None
    template: str | None = None


@dataclass
class _Row:
    """One sequence: ids, where images are (1), what is learnt, and the pictures."""

    ids: list[int]
    types: list[int]
    labels: list[int]
    images: list[ImageSource]


class Processor:
    """Prepares the inputs of a model and reads its answers.

    Args:
        config: see `ProcessorConfig`.
        tokenizer: the model's tokenizer.
    """

    def __init__(self, config: ProcessorConfig, tokenizer: Tokenizer) -> None:
        self.config = config
        self.tokenizer = tokenizer

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
                prompt marks them.
            template: name of the template for all rows; None for the processor's.
            history: past (question, answer) turns of one prompt; for a list of prompts one entry (or None)
                each.

        Returns:
            input_ids [b,s] and attention_mask [b,s] (0 on padding); for models with pictures token_type_ids
            [b,s] (1 on boi, patches and eoi); if there is any picture, images [m,3,y,x], and cross_images
            [m,3,y,x] for models that have them, in the order in which the images stand in the batch.

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

        Args:
            samples: training samples, or mappings with their fields.
            max_length: longest sequence allowed.
            padding_side: where shorter rows are filled.
            pad_to_max_length: fill up to `max_length` rather than to the longest row.

        Returns:
            What `__call__` returns, and labels [b,s]: the ids to learn, -100 elsewhere.

        Raises:
            ValueError: as `__call__`; also a sample of which nothing is left to learn, or whose image span or
                prompt does not fit into `max_length`.
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
                raise ValueError(f"sample {index}: {error}") from error
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

    def _row(self, prompt: Prompt, images: Images, template: str | None, history: Sequence[Turn] | None) -> _Row:
        config = self.config
        pictures = _as_images(images)
        if pictures and config.image_size is None:
            raise ValueError("this model reads text only (no image_size): leave the images out")
        query, turns = _as_question(prompt, history)
        grid = config.coordinate_grid
        if grid is not None:
            query = snap_coordinates(query, grid)
            turns = [(snap_coordinates(asked, grid), snap_coordinates(said, grid)) for asked, said in turns]
        text = render_prompt(query, template or config.template, config.family, turns, len(pictures))
        slot = get_family(config.family).image_slot
        # Without slots all images open the sequence; with slots each piece of text follows one image, but the
        # first.
        pieces = [""] * len(pictures) + [text] if slot is None else text.split(slot)
        row = _Row([] if config.bos_id is None else [config.bos_id], [], [], pictures)
        row.types = [0] * len(row.ids)
        for index, piece in enumerate(pieces):
            span = config.image_length + 2 if index else 0
            encoded = self.tokenizer.encode(piece) if piece else []
            row.ids += [config.placeholder_id] * span + encoded
            row.types += [1] * span + [0] * len(encoded)
        row.labels = [IGNORED_LABEL] * len(row.ids)
        return row

    def _training_row(self, sample: TrainingSample, max_length: int | None) -> _Row:
        if sample.answer is None:
            raise ValueError("nothing to learn: give an answer, or end with the assistant's message")
        row = self._row(sample.prompt, sample.images, sample.template, sample.history)
        answer = self.tokenizer.encode(sample.answer)
        if max_length is not None:
            images_length, needed = sum(row.types), len(row.ids) + len(answer) + 4
            if images_length + 4 > max_length:
                raise ValueError(
                    f"its image span(s) of {images_length} tokens do not fit into max_length {max_length}: "
                    f"raise max_length to {needed} or more, or use fewer or smaller images"
                )
            room = max_length - 4 - len(row.ids)
            if room < min(len(answer), 1):
                raise ValueError(
                    f"its prompt of {len(row.ids)} tokens leaves no room for the answer in max_length "
                    f"{max_length}: raise max_length to {needed} or more, or leave the sample out"
                )
            answer = answer[:room]
        answer = [*answer, self.config.eos_id]
        row.ids += answer
        row.types += [0] * len(answer)
        row.labels += answer
        return row

    def _collate(self, rows: list[_Row], side: str, width: int | None) -> Batch:
        width = max(len(row.ids) for row in rows) if width is None else width
        batch = {
            "input_ids": torch.tensor([_pad(row.ids, self.config.pad_id, width, side) for row in rows]),
            "attention_mask": torch.tensor([_pad([1] * len(row.ids), 0, width, side) for row in rows]),
        }
        if self.config.image_size is None:
            return batch
        batch["token_type_ids"] = torch.tensor([_pad(row.types, 0, width, side) for row in rows])
        pictures = [picture for row in rows for picture in row.images]
        if pictures:
            batch["images"] = self._pictures(pictures, self.config.image_size)
            if self.config.cross_image_size is not None:
                batch["cross_images"] = self._pictures(pictures, self.config.cross_image_size)
        return batch

    def _pictures(self, pictures: Sequence[ImageSource], size: int) -> torch.Tensor:
        mean, std = self.config.image_mean, self.config.image_std
        return torch.stack([preprocess_image(picture, size, mean, std) for picture in pictures])


def load_processor(
    path: str | Path, tokenizer: Tokenizer | str | Path | None = None, template: str | None = None
) -> Processor:
    """Make the processor of a checkpoint folder.

    Args:
        path: a folder written by `Processor.save` (``processor.yaml``), one in the Hugging Face layout
            (``config.json`` of CogVLM, CogVLM2, CogAgent or a text model), or one of SwissArmyTransformer
            (``model_config.json``).
        tokenizer: a tokenizer, or the file or folder of one; None if it lies in `path`.
        template: name of the template to use by default instead of the checkpoint's.

    Raises:
        ValueError: no such folder, none of these layouts, a setting that is missing or makes no sense, no
            tokenizer.
    """
    folder = Path(path)
    readers = {PROCESSOR_FILE: _read_own, "config.json": _read_hf, "model_config.json": _read_sat}
    if not folder.is_dir():
        raise ValueError(f"no folder at {folder}: name the folder of a checkpoint")
    name = next((name for name in readers if (folder / name).is_file()), None)
    if name is None:
        raise ValueError(f"{folder} is no checkpoint folder: it holds none of {', '.join(readers)}")
    if tokenizer is None or isinstance(tokenizer, (str, Path)):
        tokenizer = load_tokenizer(folder if tokenizer is None else tokenizer)
    settings = readers[name](_read_settings(folder / name), folder / name, tokenizer)
    if template is not None:
        settings["template"] = template
    try:
        return Processor(ProcessorConfig(**settings), tokenizer)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / name}: {error}") from error


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        content = yaml.safe_load(text) if file.suffix == ".yaml" else json.loads(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file} cannot be read ({error}): write or copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no settings: expected names and values")
    return content


def _read_own(content: dict[str, Any], file: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    known = [field.name for field in dataclasses.fields(ProcessorConfig)]
    for name in content:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
            raise ValueError(f"{file} has an unknown setting {name!r}: did you mean {near[0]!r}?")
    return content


def _token_ids(content: dict[str, Any], tokenizer: Tokenizer, pad: int) -> dict[str, Any]:
    """Ids as the released code takes them: bos and eos of the tokenizer, the rest of the configuration."""
    ends = content.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    found = content.get("pad_token_id")
    return {
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "pad_id": pad if found is None else found,
        "stop_ids": tuple(dict.fromkeys([tokenizer.eos_id, *ends])),
    }


def _read_hf(content: dict[str, Any], file: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    vision = content.get("vision_config")
    if vision is None:
        return {"family": "llama", **_token_ids(content, tokenizer, tokenizer.pad_id)}
    architectures = content.get("architectures") or ["CogVLMForCausalLM"]
    if architectures[0] not in ("CogVLMForCausalLM", "CogAgentForCausalLM"):
        raise ValueError(
            f"{file} describes {architectures[0]}, whose prompts are not known here (CogVLM, CogVLM2, "
            f"CogAgent and text models are): build Processor(ProcessorConfig(...), tokenizer)"
        )
    # CogVLM2 marks images with 128002 whatever the tokenizer says, the others with the pad token.
    second = "num_multi_query_heads" in content
    ids = _token_ids(content, tokenizer, 128002 if second else 0)
    cross = content.get("cross_image_size")
    return {
        "family": "hf-cogvlm2" if second else "hf-cogagent" if cross else "hf-cogvlm",
        "template": content.get("template_version"),
        "image_size": _required(vision, "image_size", file),
        "patch_size": _required(vision, "patch_size", file),
        "downsample": 2 if second else 1,
        "cross_image_size": cross,
        "placeholder_id": ids["pad_id"],
        **ids,
    }


def _read_sat(content: dict[str, Any], file: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    ids = _token_ids(content, tokenizer, tokenizer.pad_id)
    tower = content.get("eva_args")
    if tower is None:
        return {"family": "llama", **ids}
    size, patch_size = _required(tower, "image_size", file), _required(tower, "patch_size", file)
    size = size[0] if isinstance(size, list) else size
    cross = content.get("cross_image_pix")
    return {
        "family": "sat",
        # The repository's table: cogagent-chat is "chat", the CogVLM chat models are "chat_old".
        "template": content.get("text_processor_version", "chat" if cross else "chat_old"),
        "image_size": size,
        "patch_size": patch_size,
        "num_image_tokens": content.get("image_length"),
        "cross_image_size": cross,
        "placeholder_id": 0,
        **ids,
    }


def _required(content: dict[str, Any], name: str, file: Path) -> Any:
    if name not in content:
        raise ValueError(f"{file} lacks {name!r} of the vision tower: is it the file of a CogVLM or CogAgent?")
    return content[name]


def _pad(values: list[int], fill: int, width: int, side: str) -> list[int]:
    filling = [fill] * (width - len(values))
    return filling + values if side == "left" else values + filling


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
    if prompt[-1].get("role") == "assistant":
        return dataclasses.replace(sample, prompt=prompt[:-1], answer=prompt[-1]["content"])
    return sample
