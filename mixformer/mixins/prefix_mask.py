"""Prefix-LM attention: the prefix sees itself whole, the rest is causal (arXiv:2108.10904, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mixformer.context import Context
from mixformer.hooks import wrap
from mixformer.masks import Mask, Prefix
from mixformer.mixin import BaseMixin


class PrefixMaskMixin(BaseMixin):
    """Let the tokens of each row's prefix attend to one another in both directions.

    With a cache, a prefix must come as a whole in the first chunk of its row; lengths count from the row's first token.

    Args:
        prefix: `images`: the prefix ends with the row's last image token (GIT); `given`: it has as many real tokens as
            the forward input `prefix_lengths` [b] says (SimVLM), or ends with the last image token where that input is
            left out.

    Raises:
        ValueError: another kind of prefix.
    """

    def __init__(self, prefix: str = "images") -> None:
        super().__init__()
        if prefix not in ("images", "given"):
            raise ValueError(f"PrefixMaskMixin: prefix is 'images' or 'given', not {prefix!r}.")
        self.prefix = prefix
        self.inputs = ("prefix_lengths",) if prefix == "given" else ()

    def plan(self, ctx: Context) -> None:
        lengths = ctx.inputs.get("prefix_lengths") if self.inputs else None
        if lengths is None:
            return
        assert ctx.input_ids is not None
        rows, num_tokens = ctx.input_ids.shape
        if lengths.shape != (rows,):
            raise ValueError(f"prefix_lengths must be [b], one number a row; got shape {tuple(lengths.shape)}.")
        earlier = 0 if ctx.cache is None else ctx.cache.offset
        real = torch.ones_like(ctx.input_ids) if ctx.valid is None else ctx.valid[:, : earlier + num_tokens]
        counted = real.cumsum(1) + (earlier if ctx.valid is None else 0)
        before = counted[:, -num_tokens] - real[:, -num_tokens].long()
        if bool(((lengths > counted[:, -1]) | ((before > 0) & (lengths > before))).any()):
            raise ValueError(
                f"prefix_lengths {lengths.tolist()} do not fit rows of {counted[:, -1].tolist()} tokens, of which "
                f"{before.tolist()} were there before: a prefix comes as a whole, in the first chunk of its row."
            )
        ctx.shared[f"{self.name}.within"] = counted[:, -num_tokens:] <= lengths[:, None]

    @wrap
    def attention_mask_forward(self, mask: Mask, ctx: Context, old_impl: Callable[[Mask], Mask]) -> Mask:
        within, earlier = ctx.shared.get(f"{self.name}.within"), 0 if ctx.cache is None else ctx.cache.offset
        if within is not None:
            return old_impl(mask) | Prefix(within.sum(1) + earlier)
        if "image_rows" not in ctx.shared:
            return old_impl(mask)
        if isinstance(earlier, int) and earlier:
            raise ValueError("Pictures came after tokens that should see them whole: give a prefix in the first chunk.")
        assert ctx.input_ids is not None
        rows, ends = ctx.shared["image_rows"], ctx.shared["image_ends"] + 1
        return old_impl(mask) | Prefix(torch.zeros_like(ctx.input_ids[:, 0]).scatter_reduce(0, rows, ends, "amax"))
