"""Gate for a backbone whose MLP has none (arXiv:2002.05202)."""

from __future__ import annotations

import torch

from mixformer.context import Context
from mixformer.hooks import replace
from mixformer.mixin import BaseMixin
from mixformer.sites import ACTIVATIONS, Linear
from mixformer.transformer import Layer


class GatedMLPMixin(BaseMixin):
    """down(act(gate(x)) * up(x)), with the backbone's own `up` and `down`.

    Args:
        activation: of the gate.

    Raises:
        ValueError: the MLP is gated already.
    """

    def __init__(self, activation: str = "silu") -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"GatedMLPMixin activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}.")
        self.activation = activation

    def build_layer(self, layer: Layer) -> Linear:
        if layer.mlp.gate is not None:
            raise ValueError("The backbone's MLP is gated already (config.gated_mlp). Leave this mixin out.")
        config = layer.config
        return Linear(config.hidden_size, config.inner_size, layer.mlp.up.bias is not None, init_std=config.init_std)

    @replace
    def mlp_forward(self, hidden_states: torch.Tensor, layer: Layer, ctx: Context) -> torch.Tensor:
        gate = ACTIVATIONS[self.activation](layer.mixins[self.name](hidden_states, ctx))
        return layer.mlp.down(gate * layer.mlp.up(hidden_states, ctx), ctx)
