"""Positions of pictures apart from those of the text (SimVLM, arXiv:2108.10904, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from mixformer.context import Context
from mixformer.hooks import wrap
from mixformer.mixin import BaseMixin
from mixformer.sites import normal


def places_of(image: str, num_tokens: int, ctx: Context) -> torch.Tensor | None:
    """[m * num_tokens] where the pictures' tokens stand among those of all rows, or None without pictures.

    Args:
        image: name of the mixin that puts pictures into the sequence.
        num_tokens: of a picture.
        ctx: of the forward.

    Raises:
        ValueError: pictures have another number of tokens.
    """
    places: torch.Tensor | None = ctx.shared.get(f"{image}.places")
    if places is None or torch.compiler.is_compiling():
        return places
    found = len(places) // len(ctx.shared["image_rows"])
    if found != num_tokens:
        raise ValueError(f"Pictures of mixin '{image}' have {found} tokens each, not {num_tokens}: change the options.")
    return places


class ImagePositionsMixin(BaseMixin):
    """A learned vector for each place in a picture, instead of the position that the text has there.

    Args:
        num_tokens: of a picture.
        image: name of the mixin that puts pictures into the sequence. Its `position_ids: none` lets the text be counted
            as if there were no pictures.
    """

    def __init__(self, num_tokens: int, image: str = "image") -> None:
        super().__init__()
        self.num_tokens, self.image = num_tokens, image

    def build(self, model: Any) -> None:
        config = model.config
        self.table = nn.Parameter(normal(self.num_tokens, config.hidden_size, std=config.init_std))

    @wrap
    def position_embedding_forward(
        self, position_ids: torch.Tensor, ctx: Context, old_impl: Callable[[torch.Tensor], torch.Tensor | None]
    ) -> torch.Tensor | None:
        places, text = places_of(self.image, self.num_tokens, ctx), old_impl(position_ids)
        if places is None:
            return text
        assert ctx.input_ids is not None
        (rows, tokens), size = ctx.input_ids.shape, self.table.shape[1]
        text = self.table.new_zeros(1, tokens, size) if text is None else text
        flat, pictures = text.expand(rows, -1, -1).flatten(0, 1), self.table.repeat(len(places) // len(self.table), 1)
        return flat.index_copy(0, places, pictures.to(flat.dtype)).view(rows, tokens, size)
