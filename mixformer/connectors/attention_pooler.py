"""Attention pooler: learned queries look at the features once (arXiv:2308.12966, section 2.1; arXiv:2205.01917)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from mixformer.connectors.attention import MultiHeadAttention
from mixformer.connectors.connector import ConnectorConfig, grid_side
from mixformer.connectors.sincos import sincos_2d
from mixformer.sites import LayerNorm, Linear, normal


@dataclass
class AttentionPoolerConfig(ConnectorConfig):
    """Options of `AttentionPooler`; the defaults are Qwen-VL's.

    Attributes:
        num_queries: K; a square number if `positions`.
        num_heads: n; None for one per 128 channels.
        norm_eps: added to the variance.
        project_features: a Linear without bias takes the features to h before their norm; CoCa has none.
        positions: fixed 2-D sine and cosine positions on queries and keys; CoCa has none.
        output_projection: a LayerNorm and a Linear without bias at the end; CoCa has none.
    """

    num_queries: int = 256
    num_heads: int | None = None
    norm_eps: float = 1e-6
    project_features: bool = True
    positions: bool = True
    output_projection: bool = True

    def __post_init__(self) -> None:
        if self.positions and round(self.num_queries**0.5) ** 2 != self.num_queries:
            raise ValueError(
                f"AttentionPoolerConfig.num_queries {self.num_queries} is no square number, which positions on a grid "
                f"need. Change it, or set positions to false."
            )

    def num_tokens(self, num_features: int) -> int:
        """`num_queries`; with positions, the features must be a square grid."""
        if self.positions:
            grid_side(num_features)
        return self.num_queries

    def build(self, in_size: int, out_size: int, inner_size: int, num_features: int) -> AttentionPooler:
        """As of `ConnectorConfig`.

        Raises:
            ValueError: heads that do not divide.
        """
        if self.num_heads is None and out_size % 128:
            raise ValueError(f"AttentionPoolerConfig: width {out_size} has no heads of 128 channels. Set num_heads.")
        return AttentionPooler(self, in_size, out_size)


class AttentionPooler(nn.Module):
    """[m, N, c] -> [m, K, h], without residual.

    Args:
        config: its options.
        in_size: c.
        out_size: h.
    """

    def __init__(self, config: AttentionPoolerConfig, in_size: int, out_size: int) -> None:
        super().__init__()
        self.config = config
        size = out_size if config.project_features else in_size
        self.queries = nn.Parameter(normal(config.num_queries, out_size, std=0.02))
        self.features_projection = Linear(in_size, out_size, bias=False) if config.project_features else None
        self.queries_norm = LayerNorm(out_size, config.norm_eps)
        self.features_norm = LayerNorm(size, config.norm_eps)
        self.attention = MultiHeadAttention(out_size, config.num_heads or out_size // 128, feature_size=size)
        self.output_norm = LayerNorm(out_size, config.norm_eps) if config.output_projection else None
        self.output = Linear(out_size, out_size, bias=False) if config.output_projection else None

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[m, N, c] -> [m, K, h]."""
        pooled = self.pool(features)
        if self.output is None or self.output_norm is None:
            return pooled
        return self.output(self.output_norm(pooled))

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        """[m, N, c] -> [m, K, h] before the output's norm and projection."""
        x = features if self.features_projection is None else self.features_projection(features)
        queries, values = self.queries_norm(self.queries), self.features_norm(x)
        keys = values
        if self.config.positions:
            table = sincos_2d(round(len(queries) ** 0.5), queries.shape[-1], queries.device)
            queries = queries + table.to(queries.dtype)
            keys = values + resize_grid(table, grid_side(values.shape[1])).to(values.dtype)
        return self.attention(queries.expand(len(values), -1, -1), keys, values)


def resize_grid(table: torch.Tensor, side: int) -> torch.Tensor:
    """[s * s, c] -> [side * side, c], bicubic."""
    old = round(len(table) ** 0.5)
    if old == side:
        return table
    square = table.T.unflatten(1, (old, old))[None]
    return F.interpolate(square, size=(side, side), mode="bicubic", align_corners=False)[0].flatten(1).T
