"""Attention of connectors: queries of their own look at features."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from mixformer.sites import Linear


class MultiHeadAttention(nn.Module):
    """Sites `query`, `key`, `value` and `dense`.

    Args:
        size: width of the queries and of what comes out.
        num_heads: n.
        head_size: d; None for size / n.
        num_kv_heads: g, a divisor of n; None for n.
        bias: whether q, k and v have one.
        output_bias: whether the output projection has one.
        feature_size: width of what is looked at; None for `size`.

    Raises:
        ValueError: heads that do not divide.
    """

    def __init__(
        self, size: int, num_heads: int, head_size: int | None = None, num_kv_heads: int | None = None,
        bias: bool = True, output_bias: bool = True, feature_size: int | None = None,
    ) -> None:
        super().__init__()
        kv_heads, feature_size = num_kv_heads or num_heads, feature_size or size
        if head_size is None and size % num_heads:
            raise ValueError(f"Width {size} does not divide into {num_heads} heads. Change num_heads.")
        if num_heads % kv_heads:
            raise ValueError(f"num_heads {num_heads} is not a multiple of num_kv_heads {kv_heads}.")
        self.head_size = head_size or size // num_heads
        self.query = Linear(size, num_heads * self.head_size, bias)
        self.key = Linear(feature_size, kv_heads * self.head_size, bias)
        self.value = Linear(feature_size, kv_heads * self.head_size, bias)
        self.dense = Linear(num_heads * self.head_size, size, output_bias)

    def forward(
        self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            x: [m, Q, size] before the projection of q.
            keys: [m, N, feature_size] before that of k.
            values: the same before that of v; None for `keys`.
            mask: [m, N], true where x may look; None for everywhere.

        Returns:
            [m, Q, size].
        """
        projected = self.query(x), self.key(keys), self.value(keys if values is None else values)
        q, k, v = (y.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for y in projected)
        allowed = None if mask is None else mask[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=q.shape[1] != k.shape[1])
        return self.dense(out.transpose(1, 2).flatten(2))
