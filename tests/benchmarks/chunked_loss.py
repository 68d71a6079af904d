"""Memory of the loss in chunks against all logits at once, counted on the CPU: bytes of tensors that live together."""

from __future__ import annotations

import json
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mixformer.objectives import LanguageObjective
from models.llama import LLaMA, LLaMAConfig


class LiveBytes(TorchDispatchMode):
    """While entered, follows the storages that operations make until they are freed.

    Attributes:
        peak: most bytes that lived at once.
        largest: bytes of the largest one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor):
                self._follow(value.untyped_storage())
        return out

    def _follow(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live += size
        self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def measure(
    vocab_size: int = 32000, rows: int = 4, tokens: int = 512, supervised: float = 0.5, chunks: tuple[int, ...] = (256,)
) -> list[dict[str, Any]]:
    """Peak and largest MiB of forward and backward, for all logits (chunk None) and for each chunk size."""
    config = LLaMAConfig(vocab_size=vocab_size, hidden_size=64, num_layers=2, num_heads=4, inner_hidden_size=128)
    ids = torch.randint(vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(1))
    learnt = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < supervised
    batch = {"input_ids": ids, "labels": ids.masked_fill(~learnt, -100)}
    results = []
    for chunk in (None, *chunks):
        model = LLaMA(config, generator=torch.Generator().manual_seed(3))
        with LiveBytes() as seen:
            loss = LanguageObjective(chunk=chunk)(model, batch)["language"]
            loss.backward()
        sizes = {"peak_mib": round(seen.peak / 2**20, 1), "largest_mib": round(seen.largest / 2**20, 1)}
        results.append({"chunk": chunk, **sizes, "loss": loss.item()})
    return results


if __name__ == "__main__":
    print(json.dumps(measure(chunks=(64, 256, 1024)), indent=2))
