"""Language-model head of its own (not tied to the word embedding)."""

from __future__ import annotations

from typing import Any

import torch

from mixformer.context import Context
from mixformer.hooks import replace
from mixformer.mixin import BaseMixin
from mixformer.sites import Linear


class LMHeadMixin(BaseMixin):
    """Project [..., h] to vocabulary logits [..., v]; its site has the mixin's own name.

    Args:
        bias: whether the projection has one.
    """

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.bias = bias

    def build(self, model: Any) -> None:
        config = model.config
        self.linear = Linear(config.hidden_size, config.vocab_size, self.bias, init_std=config.init_std)

    @replace
    def final_forward(self, hidden_states: torch.Tensor, ctx: Context) -> torch.Tensor:
        return self.linear(hidden_states, ctx)
