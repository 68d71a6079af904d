"""Attention within a picture that knows how far apart two places are (arXiv:2106.04803, section 2.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from mixformer.context import Context
from mixformer.hooks import wrap
from mixformer.masks import LoweredMask
from mixformer.mixin import BaseMixin
from mixformer.mixins.image_positions import places_of
from mixformer.sites import normal
from mixformer.transformer import Layer


class ImageRelativeBiasMixin(BaseMixin):
    """Add a learned number, one for each head and offset in rows and columns, to scores between features of a picture.

    Args:
        side: rows, and columns, of the grid that the features of a picture are.
        image: name of the mixin that puts pictures into the sequence, without marks around them.
    """

    offsets: torch.Tensor

    def __init__(self, side: int, image: str = "image") -> None:
        super().__init__()
        self.side, self.image = side, image

    def build(self, model: Any) -> None:
        place = torch.arange(self.side**2)
        rows, columns = (x[:, None] - x + self.side - 1 for x in (place // self.side, place % self.side))
        self.register_buffer("offsets", rows * (2 * self.side - 1) + columns, persistent=False)

    def build_layer(self, layer: Layer) -> nn.Module:
        shape = ((2 * self.side - 1) ** 2, layer.config.num_heads)
        return nn.ParameterDict({"table": nn.Parameter(normal(*shape, std=layer.config.init_std))})

    def before_forward(self, ctx: Context) -> None:
        places = places_of(self.image, self.side**2, ctx)
        if places is not None:
            assert ctx.input_ids is not None
            spans, num_tokens = places.view(-1, self.side**2), ctx.input_ids.shape[1]
            ctx.shared[f"{self.name}.of_row"] = (spans // num_tokens)[:, :, None]
            ctx.shared[f"{self.name}.in_row"] = spans % num_tokens

    @wrap
    def attention_fn(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: LoweredMask, layer: Layer, ctx: Context,
        old_impl: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        rows = ctx.shared.get(f"{self.name}.of_row")
        if rows is None:
            return old_impl(q, k, v, mask)
        cache, slots, num_tokens = ctx.cache, ctx.shared[f"{self.name}.in_row"], q.shape[2]
        num_keys, earlier = (num_tokens, 0) if cache is None else (cache.num_keys(num_tokens), cache.offset)
        first = k.shape[2] - num_keys + earlier  # others may have put keys before those of the row
        pairs = rows, slots[:, :, None], (slots + first)[:, None, :]
        table = layer.mixins[self.name]["table"][self.offsets].to(q.dtype)
        bias = q.new_zeros(q.shape[0], q.shape[2], k.shape[2], q.shape[1])
        bias = bias.index_put(pairs, table.expand(len(slots), -1, -1, -1)).permute(0, 3, 1, 2)
        below = mask.prepend(0, q, k).tensor
        if below is not None:
            bias = bias.masked_fill(~below, float("-inf")) if below.dtype == torch.bool else bias + below
        return old_impl(q, k, v, LoweredMask(bias))
