"""A mixin of one's own: a learned gate on what the MLP adds."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mixformer import BaseMixin, Context, Linear, wrap
from mixformer.transformer import Layer


class GateMixin(BaseMixin):
    """Scale what the MLP adds by a sigmoid of its input."""

    def build_layer(self, layer: Layer) -> Linear:
        return Linear(layer.config.hidden_size, layer.config.hidden_size)

    @wrap
    def mlp_forward(
        self, hidden_states: torch.Tensor, layer: Layer, ctx: Context, old_impl: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        return old_impl(hidden_states) * layer.mixins[self.name](hidden_states, ctx).sigmoid()
