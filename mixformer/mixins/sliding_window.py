"""Sliding window attention (arXiv:2310.06825, section 2): every token sees only the latest ones."""

from __future__ import annotations

import torch

from mixformer.context import Context
from mixformer.masks import Mask
from mixformer.mixin import BaseMixin


class Window(Mask):
    """Nobody attends to what lies `size` or more tokens before it.

    Args:
        size: of the window.
        valid: [b, t] bool, True on real tokens, the only ones that count; None where all are.
    """

    def __init__(self, size: int, valid: torch.Tensor | None) -> None:
        self.size = size
        self.counts = None if valid is None else valid.cumsum(1)

    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        if self.counts is None:
            return (key[None, :] > query[:, None] - self.size)[None]
        return self.counts[:, key][:, None, :] > self.counts[:, query][:, :, None] - self.size


class SlidingWindowMixin(BaseMixin):
    """Let every token attend to itself and the `size - 1` tokens before it, in all layers.

    The cache keeps all keys. Sequences within the window cost nothing.

    Args:
        size: of the window, in tokens.

    Raises:
        ValueError: a window without any token.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"SlidingWindowMixin: size is {size}; a token sees at least itself.")
        self.size = size

    def plan(self, ctx: Context) -> None:
        if ctx.input_ids is None:
            raise ValueError(f"Mixin '{self.name}' counts the tokens of input_ids; there are none (in a tower, say).")
        num_tokens = ctx.input_ids.shape[1]
        num_keys = num_tokens if ctx.cache is None else ctx.cache.num_keys(num_tokens)
        valid = ctx.valid
        if valid is None and ctx.dynamic:  # a mask for all rows would be another graph than one for each
            valid = torch.ones_like(ctx.input_ids, dtype=torch.bool)
        if num_keys > self.size or ctx.dynamic:
            ctx.mask = ctx.mask & Window(self.size, valid)  # type: ignore[operator]
