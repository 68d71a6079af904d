"""A learned query that pools by attention (SigLIP, arXiv:2303.15343; from arXiv:2106.04560, section 2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from mixformer.context import Context
from mixformer.hooks import wrap
from mixformer.mixin import BaseMixin
from mixformer.sites import Linear, make_norm, normal
from mixformer.transformer import make_mlp, qkv_parts, split_qkv


class AttentionPoolHeadMixin(BaseMixin):
    """Pool [m, N, c] to [m, c]: y is what a learned query finds among the features, and y + MLP(norm(y)) comes out.

    Heads, MLP and norm are those of the backbone. What is returned takes the place of the features.
    """

    whole_sequence = True

    def build(self, model: Any) -> None:
        self.config = config = model.config
        parts, size, std = qkv_parts(config), config.hidden_size, config.init_std
        self.query = nn.Parameter(normal(size, std=std))
        self.qkv = Linear(size, sum(parts.values()), parts=parts, init_std=std)
        self.dense = Linear(parts["q"], size, init_std=std)
        self.norm = make_norm(config)
        self.mlp = make_mlp(config)

    @wrap
    def final_forward(
        self, hidden_states: torch.Tensor, ctx: Context, old_impl: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        features, size = old_impl(hidden_states), self.config.head_width
        tokens = torch.cat([self.query.expand(len(features), 1, -1), features], dim=1)
        projected = split_qkv(self.qkv(tokens, ctx), self.config)
        q, k, v = (x.unflatten(-1, (-1, size)).transpose(1, 2) for x in projected)
        allowed = None if ctx.valid is None else ctx.valid[:, None, None]
        found = F.scaled_dot_product_attention(
            q[:, :, :1], k[:, :, 1:], v[:, :, 1:], attn_mask=allowed, enable_gqa=q.shape[1] != k.shape[1]
        )
        pooled = self.dense(found.transpose(1, 2).flatten(2)[:, 0], ctx)
        return pooled + self.mlp(self.norm(pooled, ctx), ctx)
