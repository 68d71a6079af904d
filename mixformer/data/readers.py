"""Readers: files of samples as sequences of records that are read when they are asked for.

What is kept of a file is where its samples begin, never the samples. Formats:

    jsonl        canonical JSON lines (see `mixformer.data.records`); also lines with LLaVA's fields
    llava        a JSON list of {"id", "image", "conversations": [{"from", "value"}, ...]}
    cogvlm-sft   a folder with `images` and `labels` (`labels_en`, `labels_zh`), a JSON file for each picture, or a
                 folder of such folders
    tar          an uncompressed tar file with the members of a sample side by side: 0001.json (or .txt, a caption) and
                 0001.png (or .jpg, ...; 0001.0.png, 0001.1.png for several)
    text         plain text: every line that is not empty is a `text`, and empty lines part documents

Sources: the data of haotian-liu/LLaVA; the card of THUDM/CogVLM-SFT-311K; the naming of webdataset's shards.
"""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

from mixformer.data.records import CAPTION_QUESTION, Record, RecordError, canonical

FORMATS = ("jsonl", "llava", "cogvlm-sft", "tar", "text")
"""Names of the formats."""

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
"""Ends of the names of pictures in folders and tar files."""

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Source:
    """A file or folder to read samples from.

    Attributes:
        file: its path, relative to where the command runs; with ``*``, all that match, in order.
        weight: how often its samples come, relative to those of the other sources; either all sources have one or
            none has. Without weights every sample of every source comes once a round.
        format: one of `FORMATS`; None to follow from the name.
        images: folder that pictures are named relative to; None for that of the file.
        labels: name of the folder of labels (cogvlm-sft); None for `labels`, or the one that there is.
        question: what is asked where there are captions only.
    """

    file: str
    weight: float | None = None
    format: str | None = None
    images: str | None = None
    labels: str | None = None
    question: str = CAPTION_QUESTION

    def __post_init__(self) -> None:
        if self.weight is not None and not self.weight > 0:
            raise ValueError(f"Source.weight of {self.file} is {self.weight}; it must be above 0.")
        if self.format not in (None, *FORMATS):
            raise ValueError(f"Source.format of {self.file} is {self.format!r}; choose one of {', '.join(FORMATS)}.")


class Records(Sequence[Record]):
    """A sequence of records; subclasses say how many there are and read one."""

    def __len__(self) -> int:
        raise TypeError(f"{type(self).__name__} must define __len__().")

    def read(self, index: int) -> Record:
        """Read one.

        Raises:
            ValueError: it cannot be read; the message names file and line.
        """
        raise TypeError(f"{type(self).__name__} must define read(index).")

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self.read(number) for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.read(index % len(self))


class JoinedRecords(Records):
    """Several sequences, one behind the other."""

    def __init__(self, parts: Sequence[Sequence[Record]]) -> None:
        self.parts = list(parts)
        self._ends = list(accumulate(len(part) for part in self.parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, index: int) -> Record:
        part = bisect_right(self._ends, index)
        return self.parts[part][index - (self._ends[part - 1] if part else 0)]


def open_records(source: Source | str | Path) -> Records:
    """Open a file or folder of samples.

    Raises:
        ValueError: nothing there, nothing in it, or a format that cannot be told or read.
    """
    if not isinstance(source, Source):
        source = Source(str(source))
    if glob.has_magic(source.file) and not Path(source.file).exists():
        names = sorted(glob.glob(source.file))
        if not names:
            raise ValueError(f"No file matches {source.file}. Files are relative to where the command runs.")
        return JoinedRecords([_open_one(Path(name), source) for name in names])
    return _open_one(Path(source.file), source)


def _open_one(path: Path, source: Source) -> Records:
    if not path.exists():
        raise ValueError(f"There is no file {path} to learn from. Files are relative to where the command runs.")
    records = _READERS[source.format or _format_of(path)](path, source)
    if not len(records):
        raise ValueError(f"{path} is empty: it takes one sample a line.")
    return records


def _format_of(path: Path) -> str:
    if path.is_dir():
        return "cogvlm-sft"
    if re.search(r"\.(tar\.\w+|tgz)$", path.name):
        raise ValueError(f"{path} is compressed, so no sample of it can be reached alone: unpack it to a plain .tar.")
    return {".jsonl": "jsonl", ".json": "llava", ".tar": "tar"}.get(path.suffix, "text")


def _read_span(path: Path, start: int, stop: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(stop - start)


# ---------------------------------------------------------------- lines


class LineRecords(Records):
    """Lines of JSON or of plain text; what is kept is where each begins, and its number."""

    def __init__(self, path: Path, source: Source, as_json: bool) -> None:
        self.path, self.source, self.as_json = path, source, as_json
        self._starts, self._numbers = array("q"), array("q")
        position = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self._starts.append(position)
                    self._numbers.append(number)
                position += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, index: int) -> Record:
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            line = file.readline()
        name, number = str(self.path), self._numbers[index]
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise RecordError(name, number, f" is not valid UTF-8 ({error.reason}).") from error
        if not self.as_json:
            return Record(name, number, {"text": text}, number - index - 1)
        content = _parsed(text, name, number, " is not valid JSON ({error}). Write one object a line.")
        return _finished(content, name, number, self.source, self.path.parent, number)


def _parsed(text: str, name: str, line: int, reason: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        at, why = line, str(error)
        if isinstance(error, json.JSONDecodeError):
            at, why = line + error.lineno - 1, f"{error.msg}, column {error.colno}"
        raise RecordError(name, at, reason.format(error=why)) from error
    except RecursionError as error:
        raise RecordError(name, line, " is nested too deeply to be read.") from error
    if not isinstance(content, dict):
        raise RecordError(name, line, " is no JSON object: write {...} with the fields of a sample.")
    return content


def _canonical(content: dict[str, Any], name: str, line: int, question: str) -> dict[str, Any]:
    try:
        return canonical(content, question)
    except ValueError as error:
        raise RecordError(name, line, f": {error}") from error


def _finished(
    content: dict[str, Any], name: str, line: int, source: Source, folder: Path, document: int
) -> Record:
    """A record of canonical fields, its pictures found."""
    content = _canonical(content, name, line, source.question)
    names = content.get("images")
    if names is None:
        return Record(name, line, content, document)
    if not isinstance(names, list) or not all(isinstance(entry, str) for entry in names):
        raise RecordError(name, line, f": 'images' must be a list of file names, not {names!r}.")
    folder = folder if source.images is None else Path(source.images)
    for entry in names:
        if not (folder / entry).is_file():
            raise RecordError(name, line, f" names the picture {entry}, which is not in {folder}.")
    return Record(name, line, {**content, "images": [folder / entry for entry in names]}, document)


# ---------------------------------------------------------------- a JSON list

_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(")?|[\[\]{}]|[^\s\[\]{},:"]+', re.DOTALL)


def _elements(path: Path) -> Iterator[tuple[int, int, int]]:
    """Where the elements of a JSON list begin and end, in bytes, and the line that each begins in.

    The file is read in pieces; what stands in an element is not looked at, so that one broken element does not hide
    those behind it.

    Raises:
        RecordError: no list, or one that does not end.
    """
    depth, begin, begin_line, closed = 0, -1, 1, False
    base, line, held = 0, 1, b""  # base: place in the file of the first byte of `held`; line: the number of its line
    with path.open("rb") as file:
        while True:
            piece = file.read(_CHUNK)
            held, last = held + piece, not piece
            done, counted = 0, 0
            for token in _TOKEN.finditer(held):
                text, open_string = token.group(), token.group().startswith(b'"') and token.group(1) is None
                if not last and (open_string or (token.end() == len(held) and text not in b"[]{}")):
                    done = token.start()
                    break
                done = token.end()
                at = line + held.count(b"\n", counted, token.start())
                if open_string:
                    raise RecordError(str(path), at, ": a text begins here and does not end.")
                if depth == 0 and (text != b"[" or closed):
                    kind = "goes on after the end of the list" if closed else "is not the start of a JSON list"
                    raise RecordError(str(path), at, f" {kind}. Write [{{...}}, {{...}}], or name the file .jsonl.")
                if depth == 1 and text not in (b"]", b"}"):
                    line, counted = at, token.start()
                    begin, begin_line = base + token.start(), line
                depth += (text in (b"[", b"{")) - (text in (b"]", b"}"))
                if depth == 1 and begin >= 0:
                    yield begin, base + token.end(), begin_line
                    begin = -1
                closed = closed or depth == 0
            else:
                done = len(held)
            line += held.count(b"\n", counted, done)
            base, held = base + done, held[done:]
            if last:
                break
    if depth or not closed:
        raise RecordError(str(path), line, ": the list does not end; brackets do not match, or the file was cut off.")


class ListRecords(Records):
    """A JSON list of objects; what is kept is where each begins and ends, and its line."""

    def __init__(self, path: Path, source: Source) -> None:
        self.path, self.source = path, source
        self._places = array("q")
        for place in _elements(path):
            self._places.extend(place)

    def __len__(self) -> int:
        return len(self._places) // 3

    def read(self, index: int) -> Record:
        start, stop, line = self._places[3 * index : 3 * index + 3]
        name = str(self.path)
        try:
            text = _read_span(self.path, start, stop).decode("utf-8")
        except UnicodeDecodeError as error:
            raise RecordError(name, line, f" is not valid UTF-8 ({error.reason}).") from error
        content = _parsed(text, name, line, " is not valid JSON ({error}).")
        return _finished(content, name, line, self.source, self.path.parent, index)


# ---------------------------------------------------------------- folders


class FolderRecords(Records):
    """A folder of pictures and one of labels, a JSON file for each picture of the same name."""

    def __init__(self, path: Path, source: Source) -> None:
        self.path, self.source = path, source
        self.labels = _labels_folder(path, source.labels)
        self.images = path / "images" if source.images is None else Path(source.images)
        if not self.images.is_dir():
            raise ValueError(f"{path} has labels but no folder {self.images} of pictures. Name it in Source.images.")
        with os.scandir(self.labels) as entries:
            self._names = sorted(entry.name for entry in entries if entry.name.endswith(".json"))

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> Record:
        file = self.labels / self._names[index]
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RecordError(str(file), 1, f" is not valid UTF-8 ({error.reason}).") from error
        content = _canonical(_parsed(text, str(file), 1, " is not valid JSON ({error})."), str(file), 1,
                             self.source.question)  # fmt: skip
        if not isinstance(content.get("messages"), list):
            raise RecordError(str(file), 1, " has neither 'conversations' nor 'captions'.")
        candidates = (self.images / f"{file.stem}{suffix}" for suffix in PICTURE_SUFFIXES)
        picture = next((candidate for candidate in candidates if candidate.is_file()), None)
        if picture is None:
            raise RecordError(str(file), 1, f" has no picture {file.stem}.jpg (or .png, ...) in {self.images}.")
        return Record(str(file), 1, {**content, "images": [picture]}, index)


def _labels_folder(path: Path, wanted: str | None) -> Path:
    if wanted is not None:
        if not (path / wanted).is_dir():
            raise ValueError(f"{path} has no folder {wanted} of labels.")
        return path / wanted
    found = sorted(entry for entry in path.glob("labels*") if entry.is_dir())
    if path / "labels" in found:
        return path / "labels"
    if len(found) != 1:
        names = ", ".join(entry.name for entry in found)
        raise ValueError(f"{path} has labels in {names}: name one of them in Source.labels.")
    return found[0]


def _has_labels(path: Path, wanted: str | None) -> bool:
    return any(entry.is_dir() for entry in [*path.glob("labels*"), *([path / wanted] if wanted else [])])


def _folder_records(path: Path, source: Source) -> Records:
    if _has_labels(path, source.labels):
        return FolderRecords(path, source)
    inner = sorted(entry for entry in path.iterdir() if _has_labels(entry, source.labels))
    if not inner:
        raise ValueError(f"{path} has no `images` and `labels` folders, nor have the folders in it. Name a file of it.")
    return JoinedRecords([FolderRecords(entry, source) for entry in inner])


# ---------------------------------------------------------------- tar files


class TarRecords(Records):
    """An uncompressed tar file; what is kept is where the members of each sample lie."""

    def __init__(self, path: Path, source: Source) -> None:
        self.path, self.source = path, source
        self._stems: dict[str, list[tuple[str, int, int]]] = {}
        try:
            with tarfile.open(path, "r:") as shard:
                for member in shard:
                    if member.isfile() and not os.path.basename(member.name).startswith("."):
                        folder, _, name = member.name.rpartition("/")
                        stem, _, suffix = name.partition(".")
                        place = (f".{suffix.lower()}", member.offset_data, member.size)
                        self._stems.setdefault(f"{folder}/{stem}" if folder else stem, []).append(place)
                    shard.members = []  # type: ignore[attr-defined]  # it would remember them all
        except tarfile.TarError as error:
            raise ValueError(f"{path} is no plain tar file, or cut off: {error}.") from error
        size = path.stat().st_size
        for stem, members in self._stems.items():
            if any(start + length > size for _, start, length in members):
                raise ValueError(f"{path} is cut off within {stem}: copy it again.")
        self._order = list(self._stems)

    def __len__(self) -> int:
        return len(self._order)

    def read(self, index: int) -> Record:
        stem = self._order[index]
        name, members = f"{self.path}/{stem}", self._stems[stem]
        texts = [member for member in members if member[0].endswith((".json", ".txt"))]
        if len(texts) != 1:
            raise RecordError(name, 1, f" has {len(texts)} members .json or .txt; a sample has one.")
        (suffix, start, length) = texts[0]
        name += suffix
        try:
            text = _read_span(self.path, start, start + length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise RecordError(name, 1, f" is not valid UTF-8 ({error.reason}).") from error
        if suffix.endswith(".json"):
            content = _parsed(text, name, 1, " is not valid JSON ({error}).")
        else:
            content = {"captions": [text.strip()], "text": text.strip()}
        pictures = sorted(member for member in members if member[0].endswith(PICTURE_SUFFIXES))
        for field in ("image", "images"):
            named = content.pop(field, None)
            count = len(named) if isinstance(named, list) else 0 if named is None else 1
            if named is not None and count != len(pictures):
                raise RecordError(name, 1, f" names {count} picture(s), but {len(pictures)} lie beside it.")
        if pictures:
            content["images"] = [_read_span(self.path, begin, begin + size) for _, begin, size in pictures]
        return Record(name, 1, _canonical(content, name, 1, self.source.question), index)


_READERS: dict[str, Callable[[Path, Source], Records]] = {
    "jsonl": lambda path, source: LineRecords(path, source, as_json=True),
    "text": lambda path, source: LineRecords(path, source, as_json=False),
    "llava": ListRecords,
    "cogvlm-sft": _folder_records,
    "tar": TarRecords,
}
