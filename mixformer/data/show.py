"""Samples as a model learns them, and their pictures with boxes: `mixformer data show FILE`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path

from mixformer.data.check import add_source_arguments, given_sources
from mixformer.data.grounding import Box, draw_boxes, parse_boxes
from mixformer.data.processor import Processor
from mixformer.data.readers import Source, open_records
from mixformer.data.records import Record, object_box, training_sample
from mixformer.objectives import IGNORED_LABEL

OPEN, CLOSE = "⟦", "⟧"
"""What stands around supervised tokens."""


def show(
    files: Sequence[Source | str | Path], number: int = 4, processor: Processor | None = None,
    max_length: int | None = None, supervise: str = "last", output: str | Path | None = None, first: int = 0,
) -> Iterator[str]:
    """Write samples down as lines for people.

    Args:
        files: what `open_records` opens.
        number: how many samples.
        processor: makes rows of them, whose supervised tokens are marked; None to mark the answers' text.
        max_length: most tokens in a row, with a processor.
        supervise: see `TrainingSample`.
        output: folder that their pictures are saved to, with boxes drawn; None for nowhere.
        first: how many samples are left out before.

    Yields:
        for each sample its name, its text with what is learnt between ``⟦`` and ``⟧``, and its pictures.
    """
    samples = ((part, place) for file in files for part in open_records(file).files() for place in range(len(part)))
    for index, (part, place) in islice(enumerate(samples), first, first + number):
        try:
            record = part[place]
            text = marked_text(record, supervise) if processor is None else marked_tokens(
                record, processor, max_length, supervise
            )
            saved = [] if output is None else save_pictures(record, Path(output), index)
        except (ValueError, OSError) as error:
            yield f"sample {index} cannot be used: {error}"
            continue
        yield f"{record.where}\n{text}"
        yield from (f"saved {path}" for path in saved)


def marked_text(record: Record, supervise: str = "last") -> str:
    """The messages of a sample, the answers to learn marked; or its text, which is learnt whole."""
    if not record.messages:
        return f"{OPEN}{record.get('text', str)}{CLOSE}" if "text" in record.content else str(record.content)
    lines = []
    for number, message in enumerate(record.messages):
        last = number == len(record.messages) - 1
        learnt = message["role"] == "assistant" and (last or supervise == "all")
        text = f"{OPEN}{message['content']}{CLOSE}" if learnt else message["content"]
        lines.append(f"{message['role']}: {text}")
    return "\n".join(lines)


def marked_tokens(
    record: Record, processor: Processor, max_length: int | None = None, supervise: str = "last"
) -> str:
    """The tokens of a sample as text, the supervised ones marked, images as `<image: N tokens>`.

    Where eos is learnt but other text stands there, ``⟦</s>⟧`` comes before it.

    Raises:
        ValueError: a sample that makes no row.
    """
    batch = processor.training_batch([training_sample(record, processor.config, supervise)], max_length)
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    types = batch["token_type_ids"][0].tolist() if "token_type_ids" in batch else [0] * len(ids)
    kinds = []
    for token, label, kind in zip(ids, labels, types, strict=True):
        kinds.append("image" if kind else "text" if label == IGNORED_LABEL else "learnt" if label == token else "end")
    parts, supervised = [], sum(label != IGNORED_LABEL for label in labels)
    place = 0
    for kind, run in groupby(kinds):
        length = len(list(run))
        text = _spelled(processor, ids[place : place + length])
        if kind == "image":
            text = f"<image: {length} tokens>"
        elif kind == "learnt":
            text = f"{OPEN}{text}{CLOSE}"
        elif kind == "end":
            text = f"{OPEN}{_spelled(processor, labels[place : place + 1])}{CLOSE}{text}"
        parts.append(text)
        place += length
    return f"{''.join(parts)}\n{len(ids)} tokens, {supervised} supervised"


def _spelled(processor: Processor, ids: list[int]) -> str:
    """Tokens as text, special ones included, with the space that a word begins with."""
    config, tokenizer = processor.config, processor.tokenizer
    names = {config.bos_id: "<s>", config.eos_id: "</s>"}
    text = ""
    for special, run in groupby(ids, key=lambda token: token in names):
        tokens = list(run)
        before = tokenizer.encode("a")  # so that the space before the first word stays
        decoded = tokenizer.decode([*before, *tokens]).removeprefix("a")
        text += "".join(names[token] for token in tokens) if special else decoded
    return text


def save_pictures(record: Record, folder: Path, index: int) -> list[Path]:
    """Save the pictures of a sample with its boxes: those of `objects`, and those in its messages.

    Boxes in messages are drawn on every picture, since they do not say which one they mean.

    Raises:
        ValueError: a picture that cannot be read, or an object that is no box.
    """
    said = [box for message in record.messages for box in parse_boxes(message["content"])]
    saved = []
    for number, image in enumerate(record.images):
        objects = [entry for entry in record.objects if entry.get("image", 0) == number]
        boxes: list[Box] = [*map(object_box, objects), *said]
        labels = [*(entry.get("label", "") for entry in objects), *[""] * len(said)]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{index:06d}-{number}.png"
        draw_boxes(image, boxes, labels).save(path)
        saved.append(path)
    return saved


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `mixformer data show`."""
    add_source_arguments(parser)
    parser.add_argument("--number", type=int, default=4, help="how many samples (default: 4)")
    parser.add_argument("--first", type=int, default=0, help="how many samples to leave out before (default: 0)")
    parser.add_argument("--output", metavar="FOLDER", help="save the pictures there, with boxes drawn")


def show_command(options: argparse.Namespace) -> None:
    """Print samples.

    Raises:
        ValueError: files that cannot be opened, options that do not go together.
    """
    files, processor = given_sources(options)
    shown = show(
        files, options.number, processor, options.max_length, options.supervise, options.output, options.first
    )
    for text in shown:
        print(text, end="\n\n", flush=True)
