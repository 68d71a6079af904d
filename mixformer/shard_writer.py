"""Safetensors files written tensor by tensor, so that one tensor is in memory and never a whole shard.

The layout is the one of the safetensors package: eight bytes with the header's length, a JSON header with every
tensor's dtype, shape and place, and the tensors' bytes. Sizes are known before a byte is read, so the header comes
first and the bytes follow as they are made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mixformer.shards import DTYPES, INDEX, PRODUCER, SINGLE, parse_size

NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


def plan_shards(tensors: Mapping[str, torch.Tensor], max_shard_size: int | str = "5GB") -> dict[str, list[str]]:
    """{file: names of its tensors}: a file is closed before it would grow beyond `max_shard_size`.

    Raises:
        ValueError: it is no size.
    """
    limit, shards, filled = parse_size(max_shard_size), [[]], 0  # type: ignore[var-annotated]
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    count = len(shards)
    files = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    return dict(zip(files, shards, strict=True))


def write_shards(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    max_shard_size: int | str = "5GB",
    always_index: bool = False,
    read: Callable[[str], torch.Tensor] | None = None,
    progress: Callable[[int], Any] = lambda count: None,
) -> None:
    """Write tensors as `model.safetensors`, or in shards with an index.

    Args:
        folder: an existing folder.
        tensors: to write, or with `read` only their shapes and dtypes (on the meta device).
        max_shard_size: a shard is closed before it would grow beyond this.
        always_index: write the index, with the SHA-256 of every shard, even for one file.
        read: gives the tensor of a name when its turn comes; it is let go of once written.
        progress: told the number of bytes written after each tensor.
    """
    weight_map: dict[str, str] = {}
    digests: dict[str, str] = {}
    shards = plan_shards(tensors, max_shard_size)
    for file, names in shards.items():
        shard = {name: tensors[name] for name in names}
        digest = write_file(folder / file, shard, read or shard.__getitem__, progress, always_index)
        if digest is not None:
            digests[file] = digest
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1 or always_index:
        metadata: dict[str, Any] = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
        if always_index:
            metadata["sha256"] = digests
        (folder / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=1) + "\n")


def write_file(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    read: Callable[[str], torch.Tensor],
    progress: Callable[[int], Any] = lambda count: None,
    hashed: bool = False,
) -> str | None:
    """Write one safetensors file, marked as ours.

    Args:
        path: a new file.
        tensors: shapes and dtypes.
        read: gives the tensor of a name.
        progress: told the number of bytes written after each tensor.
        hashed: whether to compute its SHA-256 on the way, which is returned then.
    """
    header: dict[str, Any] = {"__metadata__": PRODUCER}
    ordered = sorted(tensors, key=lambda name: -tensors[name].element_size())  # wide ones first: all are aligned then
    end = 0
    for name in ordered:
        start, end = end, end + tensors[name].nbytes
        shape, kind = list(tensors[name].shape), NAMES[tensors[name].dtype]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    digest = hashlib.sha256() if hashed else None
    with path.open("wb") as file:

        def put(block: bytes | memoryview) -> None:
            file.write(block)
            if digest is not None:
                digest.update(block)

        put(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            tensor, expected = read(name), tensors[name]
            assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype), (name, tensor.shape, tensor.dtype)
            put(bytes_of(tensor))
            progress(tensor.nbytes)
            del tensor
    return None if digest is None else digest.hexdigest()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, as a file stores them; a view where the tensor lies in one piece on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
    return flat.numpy().data
