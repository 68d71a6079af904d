"""Head that predicts masked words (arXiv:1810.04805, section 3.1; layout of the released code)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from mixformer.context import Context
from mixformer.hooks import wrap
from mixformer.mixin import BaseMixin
from mixformer.sites import ACTIVATIONS, Linear, make_norm


class MLMHeadMixin(BaseMixin):
    """Dense, the model's activation and norm before the output projection (the tied one by default), a bias after it.

    Raises:
        ValueError: when added: nothing below projects to the vocabulary.
    """

    def build(self, model: Any) -> None:
        config = model.config
        if not config.vocab_size:
            raise ValueError("MLMHeadMixin needs a model with a vocabulary; towers have none.")
        self.activation: str = config.activation
        self.dense = Linear(config.hidden_size, config.hidden_size, init_std=config.init_std)
        self.norm = make_norm(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    @wrap
    def final_forward(
        self, hidden_states: torch.Tensor, ctx: Context, old_impl: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        x = ACTIVATIONS[self.activation](self.dense(hidden_states, ctx))
        return old_impl(self.norm(x, ctx)) + self.bias
