"""What a cache holds: keys and values of tokens, and what mixins keep of pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mixformer.cache import KVCache


@dataclass(frozen=True)
class CacheBytes:
    """Bytes in a cache.

    Attributes:
        per_token: keys and values of one token, all layers together.
        per_image: what mixins keep of one picture, such as keys and values of cross attention, all layers together.
        dtype: of keys and values.
    """

    per_token: int
    per_image: int
    dtype: str


def is_cached(model: Any) -> bool:
    """Whether a model runs token by token with a cache."""
    return bool(model.config.vocab_size and model.config.causal and not model.whole_sequence)


def token_bytes(model: Any) -> int:
    """Bytes of the keys and values of one token."""
    cache = KVCache(model, 1, 1)
    return sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))


def kept_bytes(cache: KVCache) -> int:
    """Bytes of what mixins keep in a cache."""
    return sum(value.nbytes for value in cache.memo.values() if isinstance(value, torch.Tensor))
