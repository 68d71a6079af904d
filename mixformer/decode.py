"""Decode steps as one compiled graph over a static cache, replayed as a CUDA graph on a GPU."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from mixformer.cache import KVCache
from mixformer.model import BaseModel

_WARMUPS = 3
_GRAPHS = 64  # torch counts those of all models together, and 8 of them would be the end


def roomy_capacity(num_tokens: int) -> int:
    """The power of two, 64 or more, that holds so many tokens: few sizes, so few graphs."""
    return max(64, 1 << (num_tokens - 1).bit_length())


class CompiledSteps:
    """One token per row and step, with fixed shapes.

    The first step compiles (seconds to a minute); every further one, of this or another cache with the same shapes,
    runs the same graph. On a GPU the graph is recorded once per cache and replayed without a launch per kernel.

    Args:
        model: a language model.
        cache: a static one that holds the prompt.

    Raises:
        ValueError: the cache is not static.
    """

    def __init__(self, model: BaseModel, cache: KVCache) -> None:
        if not cache.static:
            raise ValueError("Compiled steps need a cache of fixed shapes: KVCache(model, b, capacity, static=True).")
        if cache.valid is None:  # so that batches with and without padding share a graph
            cache.valid = torch.ones(cache.batch_size, cache.capacity, dtype=torch.bool, device=cache.cursor.device)
        self.model, self.cache = model, cache
        self.compiled: Any = torch.compile(model, fullgraph=True)
        self.token = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=cache.cursor.device)
        self.ready, self.left = False, 0
        self.graph: Any = None
        self.logits: torch.Tensor | None = None

    @torch.no_grad()
    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        """[b] the newest token of each row -> [b, v] logits of the next one; a further step may overwrite them.

        Raises:
            ValueError: the cache is full.
        """
        if not self.left:  # counted here, since asking a GPU would wait for it
            self.cache.reserve(len(token), 1)
            self.left = self.cache.capacity - self.cache.length
        self.left -= 1
        if self.token.device.type != "cuda":
            return self._step(token[:, None])
        self.token.copy_(token[:, None])
        if self.graph is None:
            self._record()
        self.graph.replay()
        assert self.logits is not None
        return self.logits

    def _step(self, token: torch.Tensor) -> torch.Tensor:
        with nullcontext() if self.ready else torch._dynamo.config.patch(recompile_limit=_GRAPHS):
            logits: torch.Tensor = self.compiled(token, cache=self.cache, last_only=True)
        self.ready = True
        return logits[:, -1]

    def _record(self) -> None:
        cache = self.cache
        before = cache.cursor.clone(), cache.next_position.clone()

        def rewind() -> None:
            cache.cursor.copy_(before[0])
            cache.next_position.copy_(before[1])

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARMUPS):
                self._step(self.token)
                rewind()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self._step(self.token)
