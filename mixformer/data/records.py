"""Records: what one sample of any file says, in one form.

The canonical file ends with ``.jsonl`` and has one JSON object a line:

    {"messages": [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "A dog."}],
     "images": ["0001.png"], "objects": [{"label": "dog", "box": [12, 34, 560, 789], "image": 0}]}

`messages` alternate, the user's first, and end with the assistant's. `images` are named relative to the file;
``<image>`` in a message marks the place of one where it matters, else they come first. `objects`, which may be left
out, are boxes in thousandths of a picture's width and height, with the number of the picture where there are several.
Other fields (`text`, `label`, `features`, ...) are kept for tasks that learn from them.

Conversations of LLaVA (`conversations` of `from` and `value`, with `image`) and of CogVLM-SFT (`conversations` of
`role` and `content`, or `captions`) are brought to this form.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mixformer.data.grounding import Box
from mixformer.data.processor import ProcessorConfig, TrainingSample, UnusableSampleError

IMAGE_MARK = "<image>"
"""What marks the place of a picture in a message."""

CAPTION_QUESTION = "Describe this image."
"""What is asked where a file has captions and no questions."""

_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_MARKS = rf"(?:{IMAGE_MARK}\s*)+"
_MARKED_ANSWER = f"message {{number}} is an answer with {IMAGE_MARK} in it; pictures stand in what the user says"
_Kind = TypeVar("_Kind")


class RecordError(ValueError):
    """A row that cannot be read.

    Args:
        file: where it is.
        line: its number, from 1; 0 for the file as a whole.
        reason: what is wrong, as the end of a sentence that begins with the place.
    """

    def __init__(self, file: str, line: int, reason: str) -> None:
        super().__init__(f"{file}, line {line}{reason}" if line else f"{file}{reason}")
        self.file, self.line, self.reason = file, line, reason

    @property
    def where(self) -> str:
        """Its name, `file:line`."""
        return f"{self.file}:{self.line}" if self.line else self.file

    def __reduce__(self) -> Any:
        return type(self), (self.file, self.line, self.reason)


@dataclass(frozen=True)
class Record:
    """One sample.

    Attributes:
        file: the file that it stands in (of a tar file, with the member's name).
        line: the line there, from 1.
        content: its fields, in the canonical form; `images` are paths that exist, or the bytes of pictures.
        document: number of the document that it belongs to; every line of JSON is one by itself.
    """

    file: str
    line: int
    content: dict[str, Any]
    document: int = 0

    @property
    def where(self) -> str:
        """Its name, `file:line`."""
        return f"{self.file}:{self.line}"

    @property
    def place(self) -> str:
        """Its place, for sentences."""
        return f"{self.file}, line {self.line}"

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation; empty if there is none."""
        return list(self.content.get("messages") or [])

    @property
    def images(self) -> list[Path | bytes]:
        """The pictures."""
        return list(self.content.get("images") or [])

    @property
    def objects(self) -> list[dict[str, Any]]:
        """The boxes: `label`, `box` in thousandths, `image`."""
        return list(self.content.get("objects") or [])

    def get(self, name: str, kind: type[_Kind]) -> _Kind:
        """A field.

        Raises:
            ValueError: it is missing, or of another type.
        """
        if name not in self.content:
            names = ", ".join(self.content) or "nothing"
            raise ValueError(f"{self.place} has no '{name}', only {names}. This task learns from it.")
        value = self.content[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{self.place}: '{name}' must be of type {kind.__name__}, not {value!r}.")
        return value

    def picture(self) -> Path | bytes:
        """The one picture.

        Raises:
            ValueError: none, or several.
        """
        images = self.get("images", list)
        if len(images) != 1:
            raise ValueError(f"{self.place} has {len(images)} images; this task learns from one picture a line.")
        picture: Path | bytes = images[0]
        return picture


def canonical(content: Mapping[str, Any], question: str = CAPTION_QUESTION) -> dict[str, Any]:
    """Bring the fields of a sample to the canonical form; those that are in it are returned as they are.

    A run of ``<image>`` at either end of the first message that marks all pictures says what holds anyway, that they
    come first, and is taken out.

    Args:
        content: `messages`, `conversations` or `captions`, and others.
        question: what is asked where there are `captions` only.

    Raises:
        ValueError: turns without speaker or text, unknown speakers, several captions, a field under two names.
    """
    fields = dict(content)
    for names in (("messages", "conversations"), ("images", "image")):
        if all(name in fields for name in names):
            if all(fields[name] is not None for name in names):
                raise ValueError(f"it has '{names[0]}' and '{names[1]}', which say the same: keep one of them.")
            fields.pop(next(name for name in names if fields[name] is None))
    if "image" in fields:
        image = fields.pop("image")
        fields["images"] = image if isinstance(image, list) else [] if image is None else [image]
    if "messages" in fields:
        return fields
    if "captions" in fields:
        captions = fields.pop("captions")
        texts = [entry.get("content") if isinstance(entry, dict) else entry for entry in _list(captions, "captions")]
        if len(texts) != 1 or not isinstance(texts[0], str):
            raise ValueError(f"'captions' must hold one text, as 'content', not {captions!r}; write a file for each.")
        turns = (("user", question), ("assistant", texts[0]))
        fields["messages"] = [{"role": role, "content": text} for role, text in turns]
    elif "conversations" in fields:
        turns_given = _list(fields.pop("conversations"), "conversations")
        fields["messages"] = [_message(turn, number) for number, turn in enumerate(turns_given)]
        _drop_leading_marks(fields)
    return fields


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"'{name}' must be a list, not {value!r}.")
    return value


def _message(turn: Any, number: int) -> dict[str, str]:
    speaker, text = ("from", "value") if isinstance(turn, dict) and "from" in turn else ("role", "content")
    if not isinstance(turn, dict) or not isinstance(turn.get(text), str):
        raise ValueError(f"turn {number} must be {{'{speaker}': ..., '{text}': text}}, not {turn!r}.")
    role = _ROLES.get(str(turn.get(speaker)))
    if role is None:
        raise ValueError(f"turn {number} is said by {turn.get(speaker)!r}; speakers are {', '.join(_ROLES)}.")
    return {"role": role, "content": turn[text]}


def _drop_leading_marks(fields: dict[str, Any]) -> None:
    messages, count = fields["messages"], len(fields.get("images") or [])
    if not count or not messages or sum(m["content"].count(IMAGE_MARK) for m in messages) != count:
        return
    text = messages[0]["content"]
    stripped = re.sub(rf"^{_MARKS}|\s*{_MARKS}$", "", text)
    if IMAGE_MARK not in stripped and text.count(IMAGE_MARK) == count:
        messages[0] = {**messages[0], "content": stripped}


def place_images(messages: Sequence[Mapping[str, str]], slot: str | None) -> list[dict[str, str]]:
    """Write the places of pictures as a model's prompts have them.

    Args:
        messages: a conversation, with ``<image>`` where pictures stand.
        slot: what marks pictures in the model's prompts; None for a model that reads pictures elsewhere, whose
            messages lose the marks.
    """
    placed = []
    for message in messages:
        text = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(text, str) and slot != IMAGE_MARK and IMAGE_MARK in text:
            text = re.sub(rf"{IMAGE_MARK}\n?", "", text) if slot is None else text.replace(IMAGE_MARK, slot)
            message = {**message, "content": text}
        placed.append(message)
    return placed  # type: ignore[return-value]


def training_sample(record: Record, config: ProcessorConfig, supervise: str = "last") -> TrainingSample:
    """What a processor makes a row of.

    Args:
        record: with `messages`; without, its `text` is learnt whole.
        config: the processor's.
        supervise: see `TrainingSample`.

    Raises:
        ValueError: neither of them, or an answer with a picture in it.
        UnusableSampleError: an answer to learn that is empty.
    """
    if "messages" not in record.content and "text" in record.content:
        return TrainingSample("", record.get("text", str), record.images)
    slot = config.spelling.image_slot if config.place == "slot" else None
    said = record.get("messages", list)
    for number, message in enumerate(said):
        text = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(text, str) or message.get("role") != "assistant":
            continue
        if not text.strip() and (supervise == "all" or number == len(said) - 1):
            raise UnusableSampleError(f"{record.place}: message {number} is an empty answer: nothing to learn.")
        if IMAGE_MARK in text:
            raise ValueError(f"{record.place}: {_MARKED_ANSWER.format(number=number)}.")
    messages = place_images(said, slot)
    return TrainingSample(messages, images=record.images, supervise=supervise)


def mistakes(content: Mapping[str, Any]) -> list[str]:
    """All that is wrong with a sample in the canonical form, apart from its picture files."""
    found = []
    images = content.get("images") or []
    if "messages" in content:
        found += _mistakes_in_messages(content["messages"], len(images))
    elif not {"text", "label", "features"} & set(content):
        names = ", ".join(content) or "nothing"
        found.append(f"has no 'messages' (nor 'text', 'label' or 'features'), only {names}")
    objects = content.get("objects")
    if objects is not None and not isinstance(objects, list):
        found.append(f"'objects' must be a list, not {objects!r}")
    for number, entry in enumerate(objects if isinstance(objects, list) else []):
        found += [f"object {number}: {reason}" for reason in _mistakes_in_object(entry, len(images))]
    return found


def _mistakes_in_messages(messages: Any, num_images: int) -> list[str]:
    if not isinstance(messages, list) or not messages:
        return [f"'messages' must be a list of messages, not {messages!r}"]
    found, marks, before = [], 0, "assistant"
    for number, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        text = message.get("content") if isinstance(message, dict) else None
        if role not in ("user", "assistant") or not isinstance(text, str):
            found.append(f"message {number} must have a role (user or assistant) and content (text), not {message!r}")
            before = ""
            continue
        marks += text.count(IMAGE_MARK)
        if role == before:
            found.append(f"message {number} is the {role}'s; messages alternate, the user's first")
        if role == "assistant" and not text.strip():
            found.append(f"message {number} is an empty answer: nothing to learn")
        if role == "assistant" and IMAGE_MARK in text:
            found.append(_MARKED_ANSWER.format(number=number))
        before = role
    if not found and messages[-1]["role"] != "assistant":
        found.append("the last message is the user's: nothing to learn")
    if marks and marks != num_images:
        found.append(f"the messages mark {marks} place(s) with {IMAGE_MARK} but there are {num_images} image(s)")
    return found


def _mistakes_in_object(entry: Any, num_images: int) -> list[str]:
    if not isinstance(entry, dict) or "box" not in entry:
        return [f"must be {{'label': text, 'box': [x0, y0, x1, y1]}}, not {entry!r}"]
    found = []
    if not isinstance(entry.get("label", ""), str):
        found.append(f"'label' must be text, not {entry['label']!r}")
    try:
        object_box(entry)
    except ValueError as error:
        found.append(str(error))
    image = entry.get("image", 0)
    if isinstance(image, bool) or not isinstance(image, int) or not 0 <= image < num_images:
        found.append(f"is in picture {image!r}, but there are {num_images}, counted from 0")
    return found


def object_box(entry: Mapping[str, Any]) -> Box:
    """The box of an object.

    Raises:
        ValueError: not four whole thousandths from the upper left to the lower right corner.
    """
    box = entry["box"]
    if not isinstance(box, list) or len(box) != 4:
        raise ValueError(f"'box' must be [x0, y0, x1, y1] in thousandths, not {box!r}")
    return Box(*box)
