"""Residual dropout (arXiv:1706.03762, section 5.4)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from mixformer.context import Context
from mixformer.hooks import wrap
from mixformer.mixin import BaseMixin
from mixformer.transformer import Layer

OldImpl = Callable[[torch.Tensor], torch.Tensor]


class DropoutMixin(BaseMixin):
    """While training, drop a share of what attention and MLP add to the residual stream, and scale up the rest.

    Args:
        rate: the share.

    Raises:
        ValueError: a rate outside of 0 <= rate < 1.
    """

    def __init__(self, rate: float = 0.1) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"The dropout rate is {rate}; it must be in 0 <= rate < 1.")
        self.rate = rate

    @wrap
    def attention_output_forward(
        self, hidden_states: torch.Tensor, layer: Layer, ctx: Context, old_impl: OldImpl
    ) -> torch.Tensor:
        return F.dropout(old_impl(hidden_states), self.rate, self.training)

    @wrap
    def cross_attention_forward(
        self, hidden_states: torch.Tensor, layer: Layer, ctx: Context,
        old_impl: Callable[[torch.Tensor], torch.Tensor | None],
    ) -> torch.Tensor | None:
        added = old_impl(hidden_states)
        return None if added is None else F.dropout(added, self.rate, self.training)

    @wrap
    def mlp_forward(
        self, hidden_states: torch.Tensor, layer: Layer, ctx: Context, old_impl: OldImpl
    ) -> torch.Tensor:
        return F.dropout(old_impl(hidden_states), self.rate, self.training)
