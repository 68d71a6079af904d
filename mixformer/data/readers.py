"""Readers: files of samples as sequences of records that are read when they are asked for.

What is kept of a file is where its samples begin, never the samples. Formats:

    jsonl        canonical JSON lines (see `mixformer.data.records`); also lines with LLaVA's fields
    llava        a JSON list of {"id", "image", "conversations": [{"from", "value"}, ...]}
    cogvlm-sft   a folder with `images` and `labels` (`labels_en`, `labels_zh`), a JSON file for each picture, or a
                 folder of such folders
    tar          an uncompressed tar file with the members of a sample side by side: 0001.json (or .txt, a caption, or
                 both, the JSON with further fields) and 0001.png (or .jpg, ...; 0001.0.png, 0001.1.png for several)
    text         plain text: every line that is not empty is a `text`, and empty lines part documents

Tar files behind URLs, such as ``https://host/shard-{000000..000009}.tar``, are read through webdataset
(`mixformer.data.remote`).

Sources: the data of haotian-liu/LLaVA; the card of THUDM/CogVLM-SFT-311K; the naming of webdataset's shards; the
members that rom1504/img2dataset writes.
"""

from __future__ import annotations

import glob
import json
import math
import os
import re
import tarfile
import threading
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, overload

from tqdm import tqdm

from mixformer.data.records import CAPTION_QUESTION, Record, RecordError, canonical

FORMATS = ("jsonl", "llava", "cogvlm-sft", "tar", "text")
"""Names of the formats."""

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
"""Ends of the names of pictures in folders and tar files."""

_CHUNK = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".7z", ".tgz")
_TABLES = (".parquet", ".arrow", ".feather", ".csv", ".tsv", ".xlsx", ".pkl", ".npz", ".db", ".sqlite")
_NOT_THERE = -1  # where the content of a member begins that has none of its own
_SLOW = 2.0  # seconds after which a progress bar is shown


class ChangedFileError(OSError):
    """A file is no longer what it was when it was opened, so that its samples are not where they were."""


@dataclass(frozen=True)
class Source:
    """A file or folder to read samples from.

    Attributes:
        file: its path, relative to where the command runs; with ``*``, all that match, in order. Or the URL of a tar
            file, or ``pipe:`` and a command that writes one, with ``{000000..000009}`` for many.
        weight: how often its samples come, relative to those of the other sources; either all sources have one or
            none has. Without weights every sample of every source comes once a round.
        format: one of `FORMATS`; None to follow from the name.
        images: folder that pictures are named relative to; None for that of the file.
        labels: name of the folder of labels (cogvlm-sft); None for `labels`, or the one that there is.
        question: what is asked where there are captions only.
        keep: folder that fetched tar files stay in, for later rounds, runs and other processes of this machine; None
            for a temporary one, from which they go when they have been read.
    """

    file: str
    weight: float | None = None
    format: str | None = None
    images: str | None = None
    labels: str | None = None
    question: str = CAPTION_QUESTION
    keep: str | None = None

    def __post_init__(self) -> None:
        if self.weight is not None and not 0 < self.weight < math.inf:
            raise ValueError(f"Source.weight of {self.file} is {self.weight}; it must be above 0 and finite.")
        if self.format not in (None, *FORMATS):
            raise ValueError(f"Source.format of {self.file} is {self.format!r}; choose one of {', '.join(FORMATS)}.")


class Records(Sequence[Record]):
    """A sequence of records; subclasses say how many there are and read one.

    Attributes:
        name: for messages.
        num_bytes: of the files; None where that says nothing.
    """

    name: str = "The data"
    num_bytes: int | None = None

    def files(self) -> Iterator[Records]:
        """The files that it is made of, one after the other."""
        yield self

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

    def __init__(self, parts: Sequence[Sequence[Record]], name: str = "The data") -> None:
        self.parts, self.name = list(parts), name
        self._ends = list(accumulate(len(part) for part in self.parts))
        sizes = [getattr(part, "num_bytes", None) for part in self.parts]
        self.num_bytes = None if None in sizes else sum(filter(None, sizes))

    def files(self) -> Iterator[Records]:
        for part in self.parts:
            yield from part.files() if isinstance(part, Records) else [JoinedRecords([part])]

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
    if is_remote(source.file):
        from mixformer.data.remote import RemoteRecords

        return RemoteRecords(source)
    if glob.has_magic(source.file) and not Path(source.file).exists():
        names = sorted(glob.glob(source.file))
        if not names:
            raise ValueError(f"No file matches {source.file}. Files are relative to where the command runs.")
        return JoinedRecords([_open_one(Path(name), source) for name in names], source.file)
    return _open_one(Path(source.file), source)


def is_remote(file: str) -> bool:
    """Whether a name is that of something that must be fetched."""
    return re.match(r"pipe:|[A-Za-z][A-Za-z0-9+.-]+://", file) is not None


def _open_one(path: Path, source: Source) -> Records:
    if not path.exists():
        hint = " For several files write * in the name." if "{" in path.name else ""
        raise ValueError(f"There is no file {path} to learn from. Files are relative to where the command runs.{hint}")
    if path.is_file() and (path.suffix in _PACKED or is_packed(path)):
        raise ValueError(
            f"{path} is compressed, so no sample of it can be reached alone: unpack it to a plain file, such as "
            f".jsonl, .json or .tar."
        )
    records = _READERS[source.format or _format_of(path)](path, source)
    if not len(records):
        raise ValueError(f"{path} is empty: it takes one sample a line.")
    return records


def _format_of(path: Path) -> str:
    if path.is_dir():
        return "cogvlm-sft"
    if path.suffix in _TABLES:
        raise ValueError(
            f"{path} is a table, which is not read: write its rows as JSON lines (`mixformer.data.records`), or set "
            f"format: text to learn its lines as they are."
        )
    return {".jsonl": "jsonl", ".json": "llava", ".tar": "tar"}.get(path.suffix, "text")


def is_packed(path: Path) -> bool:
    """Whether a file is compressed, by its first bytes."""
    with path.open("rb") as file:
        return file.read(4).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd", b"PK\x03\x04"))


def _decoded(data: bytes, name: str, line: int) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        why = "the file is UTF-16: save it as UTF-8" if wide else error.reason
        raise RecordError(name, line, f" is not valid UTF-8 ({why}).") from error


class NoBar:
    """In place of a progress bar."""

    n = 0

    def update(self, amount: int) -> None:
        """Nothing."""


@contextmanager
def byte_bar(name: str, total: int | None = None) -> Iterator[Any]:
    """A progress bar over bytes, shown if it takes long.

    Only the main thread of a program may show one: tqdm has locks, and a worker that is forked off while another thread
    holds one waits for it without end.
    """
    if threading.current_thread() is not threading.main_thread() or parent_process() is not None:
        yield NoBar()
        return
    with tqdm(total=total, desc=name, unit="B", unit_scale=True, delay=_SLOW, leave=False) as bar:
        yield bar


def _read_span(path: Path, start: int, stop: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(stop - start)


# ---------------------------------------------------------------- lines


class LineRecords(Records):
    """Lines of JSON or of plain text; what is kept is where each begins, and its number."""

    def __init__(self, path: Path, source: Source, as_json: bool) -> None:
        self.path, self.source, self.as_json = path, source, as_json
        self.name, self._starts, self._numbers = str(path), array("q"), array("q")
        position, shown = 0, 0
        with path.open("rb") as file, byte_bar(path.name, path.stat().st_size) as bar:
            for number, line in enumerate(file, start=1):
                if (line if number > 1 else line.removeprefix(_BYTE_ORDER_MARK)).strip():
                    self._starts.append(position)
                    self._numbers.append(number)
                position += len(line)
                if position - shown >= _CHUNK:
                    bar.update(position - shown)
                    shown = position
        self.num_bytes = position

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, index: int) -> Record:
        start, name, number = self._starts[index], self.name, self._numbers[index]
        with self.path.open("rb") as file:
            file.seek(max(start - 1, 0))
            before = file.read(1) if start else b"\n"
            line = file.readline()
        if before != b"\n" or not line:
            raise ChangedFileError(
                f"{name} has changed since it was opened: line {number} is not where it was. Start again."
            )
        text = _decoded(line, name, number).strip()
        if not self.as_json:
            return Record(name, number, {"text": text}, number - index - 1)
        hint = " Write one object a line; the name of a JSON list ends with .json." if text.startswith("[") else (
            " Write one object a line."
        )
        content = _parsed(text, name, number, f" is not valid JSON ({{error}}).{hint}")
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
    if "\\ud" in text.lower():
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise RecordError(name, line, r" has half of a pair of surrogates (\ud800 to \udfff): no text.") from error
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
        try:
            why = "" if entry and (folder / entry).is_file() else f"which is not in {folder}."
        except OSError as error:
            why = f"which cannot be looked up ({error.strerror})."
        if not entry:
            raise RecordError(name, line, ": 'images' has an empty name: leave it out.")
        if why and "://" in entry:
            why = "which would have to be downloaded: do so, and give its path."
        if why:
            raise RecordError(name, line, f" names the picture {entry}, {why}")
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
    with path.open("rb") as file, byte_bar(path.name, path.stat().st_size) as bar:
        while True:
            piece = file.read(_CHUNK)
            bar.update(len(piece))
            if not base and not held and piece.startswith(_BYTE_ORDER_MARK):
                piece = b"   " + piece[3:]  # so that places stay
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
        self.path, self.source, self.name, self.num_bytes = path, source, str(path), path.stat().st_size
        self._places = array("q")
        for place in _elements(path):
            self._places.extend(place)

    def __len__(self) -> int:
        return len(self._places) // 3

    def read(self, index: int) -> Record:
        start, stop, line = self._places[3 * index : 3 * index + 3]
        name = self.name
        if self.path.stat().st_size < stop:
            raise ChangedFileError(f"{name} has become shorter since it was opened. Start again.")
        text = _decoded(_read_span(self.path, start, stop), name, line)
        content = _parsed(text, name, line, " is not valid JSON ({error}).")
        return _finished(content, name, line, self.source, self.path.parent, index)


# ---------------------------------------------------------------- folders


class FolderRecords(Records):
    """A folder of pictures and one of labels, a JSON file for each picture of the same name."""

    def __init__(self, path: Path, source: Source) -> None:
        self.path, self.source, self.name = path, source, str(path)
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
        text = _decoded(file.read_bytes(), str(file), 1)
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
    return JoinedRecords([FolderRecords(entry, source) for entry in inner], str(path))


# ---------------------------------------------------------------- tar files


class TarRecords(Records):
    """An uncompressed tar file; what is kept is where the members of each sample lie.

    Args:
        path: the file.
        source: options.
        name: what it is called in names of samples and messages; None for its path.

    Raises:
        ValueError: no tar file, or one that is not whole.
    """

    def __init__(self, path: Path, source: Source, name: str | None = None) -> None:
        self.path, self.source, self.name = path, source, str(path) if name is None else name
        self._stems: dict[str, list[tuple[str, int, int]]] = {}
        self.num_bytes = path.stat().st_size
        end, last = 0, ""
        try:
            with tarfile.open(path, "r:") as shard, byte_bar(path.name, self.num_bytes) as bar:
                for member in shard:
                    if not member.isdir() and not os.path.basename(member.name).startswith("."):
                        folder, _, file = member.name.rpartition("/")
                        stem, _, suffix = file.partition(".")
                        begin = member.offset_data if member.isreg() and not member.issparse() else _NOT_THERE
                        place = (f".{suffix.lower()}", begin, member.size)
                        self._stems.setdefault(f"{folder}/{stem}" if folder else stem, []).append(place)
                    last = member.name
                    shard.members = []  # type: ignore[attr-defined]  # it would remember them all
                    bar.update(shard.offset - bar.n)
                end = shard.offset
        except tarfile.TarError as error:
            raise ValueError(f"{self.name} is no plain tar file, or cut off: {error}. Copy it again.") from error
        self._check_end(end, last)
        self._order = list(self._stems)

    def _check_end(self, end: int, last: str) -> None:
        """What tarfile does not look at: members after damage, or after a cut between two of them, are left out."""
        with self.path.open("rb") as file:
            file.seek(end)
            block = file.read(tarfile.BLOCKSIZE)
            if len(block) < tarfile.BLOCKSIZE or block.strip(b"\0"):
                raise ValueError(
                    f"{self.name} is cut off or damaged behind its member {last} (byte {end}), since tar files end "
                    f"with empty blocks. Copy it again."
                )
            while piece := file.read(_CHUNK):
                if piece.strip(b"\0"):
                    raise ValueError(
                        f"{self.name} goes on behind its end (byte {end}), like several tar files in one. Give each a "
                        f"file of its own, or join them with `tar --concatenate`."
                    )

    def __len__(self) -> int:
        return len(self._order)

    def read(self, index: int) -> Record:
        stem = self._order[index]
        name, members = f"{self.name}/{stem}", self._stems[stem]
        objects = [member for member in members if member[0].endswith(".json")]
        captions = [member for member in members if member[0].endswith(".txt")]
        if len(objects) > 1 or len(captions) > 1 or not (objects or captions):
            count = len(objects) + len(captions)
            raise RecordError(
                name, 1, f" has {count} members .json or .txt; a sample has one of each at most, and its members have "
                f"the same name up to the first dot."
            )  # fmt: skip
        name += (objects or captions)[0][0]
        for suffix, begin, _ in members:
            if begin == _NOT_THERE and suffix.endswith((".json", ".txt", *PICTURE_SUFFIXES)):
                raise RecordError(name, 1, f": {stem}{suffix} is no plain file but a link. Write the file itself.")
        content: dict[str, Any] = {}
        if objects:
            content = _parsed(_decoded(self._content(objects[0]), name, 1), name, 1, " is not valid JSON ({error}).")
        if captions:
            for field in ("messages", "conversations", "captions", "text"):
                if field in content:
                    raise RecordError(name, 1, f" has '{field}' and a .txt beside it: keep one of them.")
            text = _decoded(self._content(captions[0]), name, 1).strip()
            content |= {"captions": [text], "text": text}
        pictures = sorted((member for member in members if member[0].endswith(PICTURE_SUFFIXES)), key=_by_number)
        for field in ("image", "images"):
            named = content.pop(field, None)
            count = len(named) if isinstance(named, list) else 0 if named is None else 1
            if named is not None and count != len(pictures):
                raise RecordError(name, 1, f" names {count} picture(s), but {len(pictures)} lie beside it.")
        if pictures:
            content["images"] = [self._content(member) for member in pictures]
        return Record(name, 1, _canonical(content, name, 1, self.source.question), index)

    def _content(self, member: tuple[str, int, int]) -> bytes:
        _, begin, size = member
        content = _read_span(self.path, begin, begin + size)
        if len(content) < size:
            raise ChangedFileError(f"{self.name} has become shorter since it was opened. Start again.")
        return content


def _by_number(member: tuple[str, int, int]) -> list[tuple[int, str]]:
    """What pictures are sorted by: .2.png comes before .10.png."""
    return [(int(part) if part.isdecimal() else -1, part) for part in re.findall(r"\d+|\D+", member[0])]


_READERS: dict[str, Callable[[Path, Source], Records]] = {
    "jsonl": lambda path, source: LineRecords(path, source, as_json=True),
    "text": lambda path, source: LineRecords(path, source, as_json=False),
    "llava": ListRecords,
    "cogvlm-sft": _folder_records,
    "tar": lambda path, source: TarRecords(path, source),
}
