"""Files that lie beside the weights of a checkpoint and go along when it is converted."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from mixformer.checkpoint import CONFIG
from mixformer.data.folders import PROCESSOR_FILE
from mixformer.data.processor import Processor, load_processor

PROCESSING = (
    "tokenizer*", "*.model", "vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "preprocessor_config.json", "processor_config.json", PROCESSOR_FILE,
)
"""Files of tokenizers and processors."""

OTHERS = ("generation_config.json", "*.py", "README*", "LICENSE*", "NOTICE*")
"""Further files that go along: defaults of generation, released code, licences."""


def files_beside(folder: Path, patterns: Sequence[str] = PROCESSING + OTHERS) -> list[Path]:
    """The files of a folder that go along."""
    return [
        path for path in sorted(folder.iterdir())
        if path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in patterns)
    ]


def write_beside(
    folder: Path, new: Path, files: Sequence[Path], processor: str | os.PathLike[str] | None, kind: str
) -> list[str]:
    """Copy files, and write the settings of a processor where one is asked for or the own format needs them.

    Args:
        folder: the source.
        new: where they go.
        files: of the source.
        processor: a tokenizer, a folder with one, or one with a whole processor; None for what the source has.
        kind: of the target: `own`, `hf` or `sat`.

    Returns:
        What is to be said of it: why there is no processor.

    Raises:
        ValueError: the processor that was asked for cannot be made.
    """
    place = folder if processor is None else Path(processor)
    if processor is not None:
        if not place.exists():
            raise ValueError(f"There is no processor at {place}. Name a tokenizer, or the folder of one.")
        files = [*files, *(files_beside(place, PROCESSING) if place.is_dir() else [place])]
    for path in files:
        shutil.copyfile(path, new / path.name)
    if processor is None and (kind != "own" or (new / PROCESSOR_FILE).is_file()):
        return []
    advice = "Name one with --processor, or later in load_processor."
    if processor is None and (folder / CONFIG).is_file():
        return [f"No processor goes with the weights, for {folder} has none. {advice}"]
    whole = (place / PROCESSOR_FILE).is_file()
    if not whole and kind != "own" and (folder / CONFIG).is_file():
        return []  # the source says nothing of prompts; the target's config file does
    try:
        made = load_processor(place) if whole else load_processor(folder, tokenizer=place)
    except (ValueError, ImportError) as error:
        if processor is not None:
            raise ValueError(f"The processor cannot be made: {error}") from error
        return [f"No processor goes with the weights: {error}. {advice}"]
    with tempfile.TemporaryDirectory() as temporary:
        made.save(temporary)
        shutil.copyfile(Path(temporary) / PROCESSOR_FILE, new / PROCESSOR_FILE)
    if not _makes_the_same(new, made):
        made.save(new)  # the released tokenizer's files say less without the config file that lay beside them
    return []


def _makes_the_same(folder: Path, made: Processor) -> bool:
    try:
        again = load_processor(folder)
    except (ValueError, ImportError):
        return False
    ids = [
        [getattr(each.tokenizer, name) for name in ("bos_id", "eos_id", "pad_id", "vocab_size")]
        for each in (again, made)
    ]
    return again.config == made.config and ids[0] == ids[1]
