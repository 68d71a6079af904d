"""Segment embeddings (arXiv:1810.04805, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from mixformer.context import Context
from mixformer.hooks import wrap
from mixformer.mixin import BaseMixin
from mixformer.sites import normal


class TokenTypeMixin(BaseMixin):
    """Add a learned vector for the kind of each token, told by `segment_ids` [b, s]; all are of kind 0 without them.

    BERT's own name for this input, `token_type_ids`, marks the places of pictures here (see `ImageTokensMixin`), and a
    model may need both.

    Args:
        num_types: how many kinds there are.

    Raises:
        ValueError: less than one kind.
    """

    inputs = ("segment_ids",)

    def __init__(self, num_types: int = 2) -> None:
        super().__init__()
        if num_types < 1:
            raise ValueError(f"TokenTypeMixin: num_types is {num_types}; there must be one kind at least.")
        self.num_types = num_types

    def build(self, model: Any) -> None:
        self.table = nn.Parameter(normal(self.num_types, model.config.hidden_size, std=model.config.init_std))

    def plan(self, ctx: Context) -> None:
        ids = ctx.inputs.get("segment_ids")
        if ids is None or ctx.input_ids is None:
            return
        if ids.shape != ctx.input_ids.shape:
            raise ValueError(
                f"segment_ids {tuple(ids.shape)} must have the shape of input_ids {tuple(ctx.input_ids.shape)}."
            )
        if not ctx.dynamic and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_types:
            raise ValueError(
                f"segment_ids go from {int(ids.min())} to {int(ids.max())}; this model knows 0 to {self.num_types - 1}."
            )

    @wrap
    def word_embedding_forward(
        self, input_ids: torch.Tensor, ctx: Context, old_impl: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        ids = ctx.inputs.get("segment_ids")
        return old_impl(input_ids) + (self.table[0] if ids is None else F.embedding(ids, self.table))
