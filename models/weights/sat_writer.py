"""SwissArmyTransformer's files written tensor by tensor.

`torch.save` wants all tensors in memory, and a rank's file holds the whole model. The files are plain ZIP archives of a
layout that is fixed since torch 1.6: a pickle in which tensors refer to storages by number, and one uncompressed record
per storage. Shapes are enough to write the pickle, and the records follow one by one.
"""

from __future__ import annotations

import collections
import io
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from mixformer.shard_writer import bytes_of
from models.weights.sat_folder import pieces_of

STORAGES = {
    torch.float64: torch.DoubleStorage, torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage, torch.int64: torch.LongStorage, torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage, torch.int8: torch.CharStorage, torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}
_ALIGNMENT = 64  # torch's own, so that files can be mapped into memory
_LOCAL_HEADER, _ZIP64_EXTRA = 30, 20  # bytes of a ZIP entry's header beside its name and further extra fields


def write_ranks(
    home: Path,
    tensors: Mapping[str, torch.Tensor],
    read: Callable[[str], torch.Tensor],
    config: dict[str, Any],
    shared: Mapping[str, str],
    progress: Callable[[int], Any] = lambda count: None,
) -> None:
    """Write `mp_rank_*_model_states.pt` for model-parallel ranks.

    Args:
        home: folder of the iteration; it is made.
        tensors: shapes and dtypes, whole, by SAT's names.
        read: gives the tensor of a name, whole; it is let go of once written.
        config: content of model_config.json; it has the number of ranks.
        shared: {name: name of an equal tensor before it, whose bytes it shares}.
        progress: told the number of bytes written after each tensor.

    Raises:
        ValueError: a tensor that does not divide among the ranks, or is of a dtype that SAT has not.
    """
    num_ranks = config["model_parallel_size"]
    shapes = {name: pieces_of(tensor, name, num_ranks, config) for name, tensor in tensors.items()}
    home.mkdir()
    with ExitStack() as stack:
        files = []
        for rank in range(num_ranks):
            mine = {name: pieces[rank] for name, pieces in shapes.items()}
            files.append(stack.enter_context(_RankFile(home / f"mp_rank_{rank:02d}_model_states.pt", mine, shared)))
        for name, pieces in shapes.items():
            if name in shared:
                continue
            whole = read(name)
            for file, piece in zip(files, pieces_of(whole, name, num_ranks, config), strict=True):
                file.write(name, piece)
            del whole, piece
            progress(sum(piece.nbytes for piece in pieces))


class _RankFile:
    def __init__(self, path: Path, tensors: Mapping[str, torch.Tensor], shared: Mapping[str, str]) -> None:
        own = [name for name in tensors if name not in shared]
        self._keys = {name: str(number) for number, name in enumerate(own)}
        self._path, self._tensors = path, tensors
        self._pickle = _pickled({name: _Stored(t, self._keys[shared.get(name, name)]) for name, t in tensors.items()})

    def __enter__(self) -> _RankFile:
        self._file = self._path.open("wb")
        self._archive = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED, allowZip64=True)
        self._record("data.pkl", self._pickle)
        self._record("byteorder", sys.byteorder.encode())
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        expected = self._tensors[name]
        assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype), (name, tensor.shape, tensor.dtype)
        self._record(f"data/{self._keys[name]}", bytes_of(tensor))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._record("version", b"3\n")
                self._archive.close()
        finally:
            self._file.close()

    def _record(self, name: str, content: bytes | memoryview) -> None:
        entry = zipfile.ZipInfo(f"archive/{name}")
        place = self._file.tell() + _LOCAL_HEADER + len(entry.filename) + _ZIP64_EXTRA + 4
        padding = -place % _ALIGNMENT
        entry.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        with self._archive.open(entry, "w", force_zip64=True) as record:
            record.write(content)


class _Storage:
    def __init__(self, kind: Any, key: str, size: int) -> None:
        self.kind, self.key, self.size = kind, key, size


class _Stored:
    """What stands for a tensor in the pickle; it is read as torch's own are."""

    def __init__(self, tensor: torch.Tensor, key: str) -> None:
        if tensor.dtype not in STORAGES:
            raise ValueError(f"SAT's files hold no {tensor.dtype}. Convert with another dtype.")
        self._storage = _Storage(STORAGES[tensor.dtype], key, tensor.numel())
        self._shape = tuple(tensor.shape)

    def __reduce__(self) -> tuple[Any, ...]:
        strides = torch.empty(self._shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (
            self._storage, 0, self._shape, tuple(strides), False, collections.OrderedDict(),
        )


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return ("storage", value.kind, value.key, "cpu", value.size) if isinstance(value, _Storage) else None


def _pickled(module: dict[str, _Stored]) -> bytes:
    written = io.BytesIO()
    _Pickler(written, protocol=2).dump({"module": module})
    return written.getvalue()
