"""Safetensors folders: checked while they are opened, read tensor by tensor."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, Protocol

import torch
from safetensors import SafetensorError, safe_open

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PRODUCER = {"format": "pt", "producer": "mixformer"}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu, "C64": torch.complex64, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64,
}
Shape = tuple[int, ...]
MOST_THREADS = 4
MAPPED_FROM = 2**20


class TensorSource(Protocol):
    """Named tensors somewhere on disk.

    Attributes:
        shapes: {name: shape}, in the order in which reading is cheapest.
        dtypes: {name: dtype}.
        num_bytes: of all of them.
        where: the place, for messages.
        gives_own: what `read` returns is memory of its own, neither a view of the file nor kept here.
    """

    shapes: dict[str, Shape]
    dtypes: dict[str, torch.dtype]
    num_bytes: int
    where: str
    gives_own: bool

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in its stored dtype."""
        ...

    def close(self) -> None:
        """Let go of the files."""
        ...


class SafetensorsFolder:
    """The tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` lists.

    Args:
        folder: where they are.
        verify: hash every shard whose SHA-256 the index records, so that a flipped bit is found; `verifying` does it
            while tensors are read.

    Attributes:
        files: {name: file that holds it}.

    Raises:
        ValueError: no weights, a missing, truncated or damaged file, an index that does not match its files, or a
            tensor that is there twice.
    """

    gives_own = True

    def __init__(self, folder: Path, verify: bool = True) -> None:
        self.where = str(folder)
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.files: dict[str, str] = {}
        self.num_bytes = 0
        self._folder = folder
        self._places: dict[str, tuple[_File, int]] = {}
        index_path, single = folder / INDEX, folder / SINGLE
        shards = sorted(path.name for path in folder.glob("model-*-of-*.safetensors"))
        if index_path.is_file():
            index = read_json(index_path)
            weight_map, metadata = index.get("weight_map"), index.get("metadata") or {}
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"{index_path} has no 'weight_map'. Fetch the file again.")
            names = sorted(set(map(str, weight_map.values())))
        elif shards:
            raise ValueError(f"{folder} has shards, such as {shards[0]}, and no {INDEX} that lists them. Fetch it.")
        elif single.is_file():
            weight_map, metadata, names = None, {}, [SINGLE]
        else:
            raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}.{_other_weights(folder)}")
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise ValueError(f"{index_path} names '{outside[0]}', which is outside its folder; it is refused.")
        others = [name for name in (SINGLE, *shards) if name not in names and (folder / name).is_file()]
        if others:
            raise ValueError(
                f"{folder} holds {others[0]}, which {INDEX} does not list: the weights of two downloads may have been "
                f"mixed. Remove what does not belong, or fetch the folder again."
            )
        recorded = metadata.get("sha256") or {}
        self._digests: dict[str, str] = {name: recorded[name] for name in names if name in recorded}
        with ExitStack() as stack:
            for name in names:
                self._open(folder / name, stack)
            if weight_map is not None:
                self._check_index(index_path, weight_map)
            if verify:
                with self.verifying():
                    pass
            self._stack = stack.pop_all()

    def _open(self, path: Path, stack: ExitStack) -> None:
        header, start = check_safetensors(path)
        try:
            file = _File(stack.enter_context(path.open("rb", buffering=0)))
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error}). Fetch or copy it again.") from error
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
            if name in self.files:
                raise ValueError(
                    f"The tensor '{name}' is in two files of {self.where}, {self.files[name]} and {path.name}. Files "
                    f"of two downloads may have been mixed: fetch the folder again."
                )
            self.shapes[name], self.dtypes[name] = tuple(entry["shape"]), DTYPES[entry["dtype"]]
            self.files[name] = path.name
            self._places[name] = file, start + entry["data_offsets"][0]
        self.num_bytes += path.stat().st_size

    def _check_index(self, path: Path, weight_map: dict[str, str]) -> None:
        absent = [name for name, file in weight_map.items() if self.files.get(name) != file]
        if absent:
            raise ValueError(
                f"{path} lists {len(absent)} tensor(s) that its files do not have, such as '{absent[0]}' "
                f"in {weight_map[absent[0]]}. The index and the files do not belong together: fetch both again."
            )
        unlisted = [name for name in self.shapes if name not in weight_map]
        if unlisted:
            raise ValueError(
                f"The files of {self.where} have {len(unlisted)} tensor(s) that {path.name} does not list, such as "
                f"'{unlisted[0]}' in {self.files[unlisted[0]]}. The index and the files do not belong together: fetch "
                f"both again."
            )

    @contextmanager
    def verifying(self) -> Iterator[None]:
        """While entered, the shards are hashed by threads of their own; left when all are.

        Raises:
            ValueError: a SHA-256 is not the recorded one; also in place of an error that came up inside.
        """
        with ThreadPoolExecutor(num_threads()) as pool:
            made = {name: pool.submit(sha256, self._folder / name) for name in self._digests}
            try:
                yield
            except ValueError as error:
                self._compare(made, error)
                raise
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            self._compare(made)

    def _compare(self, made: Mapping[str, Future[str]], cause: BaseException | None = None) -> None:
        for name, digest in made.items():
            if digest.result() != self._digests[name]:
                raise ValueError(
                    f"{self._folder / name} is damaged: its SHA-256 is not the one that {INDEX} recorded when it was "
                    f"written. Copy it again from where it is intact."
                ) from cause

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in its stored dtype; several threads may read at once.

        It is read rather than mapped: pages of a mapped file count as the process's memory beside the copy.

        Raises:
            ValueError: the file ends before the tensor does.
        """
        file, place = self._places[name]
        tensor = _empty(self.shapes[name], self.dtypes[name])
        if not file.read_into(tensor.view(-1).view(torch.uint8).numpy().data, place):
            raise ValueError(f"{file.name} ended while '{name}' was read; it was changed meanwhile. Load it again.")
        return tensor

    def close(self) -> None:
        """Let go of the files."""
        self._places.clear()
        self._stack.close()


class _File:
    """An open file that several threads read at places of their own."""

    def __init__(self, file: BinaryIO) -> None:
        self.name, self._file, self._lock = file.name, file, Lock()

    def read_into(self, room: memoryview, place: int) -> bool:
        """Fill `room` from a place on; False if the file ends before."""
        while room:
            count = self._read_some(room, place)
            if not count:
                return False
            room, place = room[count:], place + count
        return True

    def _read_some(self, room: memoryview, place: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [room], place)
        with self._lock:
            self._file.seek(place)
            return int(self._file.readinto(room))  # type: ignore[attr-defined]


def _empty(shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    """A tensor that goes back to the system as soon as it is let go of.

    The C library keeps the memory of large tensors for the next ones, which would double a model that is converted
    while it is read.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < MAPPED_FROM or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)


def num_threads() -> int:
    """How many threads read or hash at once: as many as there are processors for this process, within limits."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(available, MOST_THREADS))


def _other_weights(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if pickles:
        return (
            f" It has {pickles[0]}, a pickle; convert it to safetensors (in the environment it came from: "
            f"model.save_pretrained(folder, safe_serialization=True))."
        )
    return " The weights are missing: fetch the folder again."


def check_safetensors(path: Path) -> tuple[dict[str, Any], int]:
    """Check that a safetensors file is there, and that its size and tensors are those its header promises.

    Returns:
        What its header says of each tensor, and where the tensors start, in bytes.

    Raises:
        ValueError: it is missing, a Git LFS pointer, truncated, or its header is damaged.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; {INDEX} or the folder's layout asks for it. Fetch this shard.")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start.startswith(b"version "):
            raise ValueError(f"{path} is a Git LFS pointer, not the weights. Run: git lfs pull.")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise ValueError(f"{path} is truncated or no safetensors file ({size} bytes). Fetch it again.")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_doubles)
        header.pop("__metadata__", None)
        expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{path}: its header is damaged ({error}). Fetch or copy the file again.") from error
    if expected != size:
        raise ValueError(
            f"{path} has {size} bytes, but its header promises {expected}: it is truncated or damaged. Fetch or copy "
            f"it again."
        )
    _check_entries(path, header)
    return header, 8 + length


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{next(name for name in names if names.count(name) > 1)}' is there twice")
    return found


def _check_entries(path: Path, header: Mapping[str, Any]) -> None:
    """Check that tensors lie side by side, each as large as its shape and dtype say."""
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        kind, shape, (first, last) = entry.get("dtype"), entry.get("shape"), entry["data_offsets"]
        if kind not in DTYPES:
            raise ValueError(f"{path}: '{name}' is stored as {kind}, which is not read. Known: {', '.join(DTYPES)}.")
        sizes = isinstance(shape, list) and all(isinstance(size, int) and size >= 0 for size in shape)
        if first != end or not sizes or last - first != math.prod(shape) * DTYPES[kind].itemsize:
            raise ValueError(
                f"{path}: its header is damaged: '{name}', {kind} {shape}, cannot lie at bytes {first} to {last}. "
                f"Fetch or copy the file again."
            )
        end = last


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(2**22):
        digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: it cannot be read as one.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}). Fetch it again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object. Fetch it again.")
    return value


def parse_size(size: int | str) -> int:
    """Bytes of `5GB`, `200MiB`, or a plain number.

    Raises:
        ValueError: it is no size.
    """
    if isinstance(size, int):
        number, unit = float(size), ""
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
        if match is None or match[2].upper() not in _UNITS:
            raise ValueError(f"'{size}' is no size. Write a number of bytes, or such as '5GB' or '200MiB'.")
        number, unit = float(match[1]), match[2].upper()
    if number <= 0:
        raise ValueError(f"A shard size of {size} is too small.")
    return int(number * _UNITS[unit])


def written_here(folder: Path) -> bool:
    """Whether the safetensors files of a folder were written by this package."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        return False
    try:
        with safe_open(files[0], framework="pt") as file:
            return (file.metadata() or {}).get("producer") == PRODUCER["producer"]
    except (SafetensorError, OSError):
        return False


def in_reading_order(source: TensorSource, wanted: Sequence[str]) -> Iterator[str]:
    """`wanted` names in the order in which the source is cheapest to read."""
    rank = {name: place for place, name in enumerate(source.shapes)}
    yield from sorted(wanted, key=lambda name: rank.get(name, len(rank)))
