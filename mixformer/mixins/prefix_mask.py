"""Prefix-LM attention: the prefix sees itself whole, the rest is causal (arXiv:2108.10904, section 3.1)."""

from __future__ import annotations

import torch

from mixformer.context import Context
from mixformer.masks import Prefix
from mixformer.mixin import BaseMixin


class PrefixMaskMixin(BaseMixin):
    """Let the tokens of each row's prefix attend to one another in both directions.

    With a cache, a prefix must come in one chunk.

    Args:
        prefix: `images`: the prefix ends with the row's last image token (GIT), put there by a mixin added before;
            `given`: it has as many real tokens as the forward input `prefix_lengths` [b] says (SimVLM).

    Raises:
        ValueError: another kind of prefix.
    """

    inputs = ("prefix_lengths",)

    def __init__(self, prefix: str = "images") -> None:
        super().__init__()
        if prefix not in ("images", "given"):
            raise ValueError(f"PrefixMaskMixin: prefix is 'images' or 'given', not {prefix!r}.")
        self.prefix = prefix

    def plan(self, ctx: Context) -> None:
        assert ctx.input_ids is not None
        earlier = 0 if ctx.cache is None else ctx.cache.offset
        if self.prefix == "given":
            lengths = ctx.inputs.get("prefix_lengths")
            if lengths is None:
                return
            if lengths.shape != ctx.input_ids.shape[:1]:
                raise ValueError(f"prefix_lengths must be [b], one number a row; got shape {tuple(lengths.shape)}.")
            if ctx.attention_mask is not None:  # tokens are counted from each row's first real one
                lengths = lengths + (ctx.attention_mask.cumsum(1) == 0).sum(1)
        elif "image_rows" in ctx.shared:
            ends = ctx.shared["image_ends"] + 1
            lengths = torch.zeros(len(ctx.input_ids), dtype=ends.dtype, device=ends.device)
            lengths = lengths.scatter_reduce(0, ctx.shared["image_rows"], ends, "amax")
        else:
            return
        assert ctx.mask is not None
        ctx.mask = ctx.mask | Prefix(lengths + earlier)  # type: ignore[operator]
