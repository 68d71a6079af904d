"""Biases of q and v without one for k, as EVA and BEiT have them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn as nn

from mixformer.context import Context
from mixformer.hooks import wrap
from mixformer.mixin import BaseMixin
from mixformer.transformer import Layer, qkv_parts


class QVBiasMixin(BaseMixin):
    """Add learned biases to q and v."""

    def build_layer(self, layer: Layer) -> nn.ParameterDict:
        widths = qkv_parts(layer.config)
        return nn.ParameterDict({part: nn.Parameter(torch.zeros(widths[part])) for part in ("q", "v")})

    @wrap
    def qkv_forward(
        self, hidden_states: torch.Tensor, layer: Layer, ctx: Context,
        old_impl: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = old_impl(hidden_states)
        biases = layer.mixins[self.name]
        return q + biases["q"], k, v + biases["v"]
