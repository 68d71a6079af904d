"""mPLUG-Owl2's visual abstractor (arXiv:2311.04257, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from mixformer.connectors.attention import MultiHeadAttention
from mixformer.connectors.connector import ConnectorConfig, grid_side
from mixformer.connectors.sincos import sincos_1d, sincos_2d
from mixformer.sites import LayerNorm, Linear, normal


@dataclass
class VisualAbstractorConfig(ConnectorConfig):
    """Options of `VisualAbstractor`.

    Attributes:
        num_queries: learned queries; one more token comes out, which marks the end.
        depth: layers.
        num_heads: n.
        inner_hidden_size: of the MLPs.
    """

    takes_mask: ClassVar[bool] = True

    num_queries: int = 64
    depth: int = 6
    num_heads: int = 16
    inner_hidden_size: int = 2816

    def num_tokens(self, num_features: int) -> int:
        """`num_queries` + 1; features are a cls token and a square grid."""
        grid_side(num_features - 1)
        return self.num_queries + 1

    def build(self, in_size: int, out_size: int, inner_size: int, num_features: int) -> VisualAbstractor:
        """As of `ConnectorConfig`.

        Raises:
            ValueError: heads that do not divide.
        """
        return VisualAbstractor(self, in_size, out_size)


class AbstractorMLP(nn.Module):
    """Gated MLP with a norm before its last Linear: sites `gate`, `up`, `norm` and `down`.

    Args:
        size: c.
        inner_size: between the Linears.
    """

    def __init__(self, size: int, inner_size: int) -> None:
        super().__init__()
        self.gate = Linear(size, inner_size)
        self.up = Linear(size, inner_size)
        self.norm = LayerNorm(inner_size, 1e-6)
        self.down = Linear(inner_size, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., c] -> [..., c]."""
        return self.down(self.norm(F.silu(self.gate(x)) * self.up(x)))


class AbstractorLayer(nn.Module):
    """Queries look at themselves and the features, then go through an MLP.

    The first residual starts from the normalised queries.

    Args:
        config: its options.
        size: c.
    """

    def __init__(self, config: VisualAbstractorConfig, size: int) -> None:
        super().__init__()
        self.queries_norm = LayerNorm(size)
        self.features_norm = LayerNorm(size)
        self.attention = MultiHeadAttention(size, config.num_heads)
        self.mlp_norm = LayerNorm(size)
        self.mlp = AbstractorMLP(size, config.inner_hidden_size)

    def forward(
        self, queries: torch.Tensor, features: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Run the layer.

        Args:
            queries: [m, Q, c].
            features: [m, N, c].
            positions: [Q + N, c] of queries and features; values get none.
            mask: [m, Q + N], true where queries may look; None for everywhere.

        Returns:
            [m, Q, c].
        """
        queries = self.queries_norm(queries)
        values = torch.cat([queries, self.features_norm(features)], dim=1)
        placed = queries + positions[: queries.shape[1]]
        queries = queries + self.attention(placed, values + positions, values, mask)
        return queries + self.mlp(self.mlp_norm(queries))


class VisualAbstractor(nn.Module):
    """[m, 1 + N, c] -> [m, Q + 1, h]: layers, a Linear, and a learned last token.

    Args:
        config: its options.
        in_size: c.
        out_size: h.
    """

    def __init__(self, config: VisualAbstractorConfig, in_size: int, out_size: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(normal(config.num_queries, in_size, std=1.0))
        self.layers = nn.ModuleList(AbstractorLayer(config, in_size) for _ in range(config.depth))
        self.linear = Linear(in_size, out_size)
        self.end = nn.Parameter(normal(out_size, std=1.0))

    def forward(self, features: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Resample.

        Args:
            features: [m, 1 + N, c], the cls token first.
            mask: [m, 1 + N], true where a feature is real; None for all.

        Returns:
            [m, Q + 1, h].
        """
        queries = self.queries.expand(len(features), -1, -1)
        if mask is not None:
            mask = torch.cat([mask.new_ones(queries.shape[:2], dtype=torch.bool), mask.bool()], dim=1)
        positions = self.positions(features.shape[1], features.device).to(features.dtype)
        for layer in self.layers:
            queries = layer(queries, features, positions, mask)
        return torch.cat([self.linear(queries), self.end.expand(len(features), 1, -1)], dim=1)

    def positions(self, num_features: int, device: torch.device | None = None) -> torch.Tensor:
        """[Q + 1 + N, c] fixed positions in fp32: of the queries in a line, none of cls, of the grid."""
        num_queries, size = self.queries.shape
        line = sincos_1d(torch.arange(num_queries, device=device), size)
        grid = sincos_2d(grid_side(num_features - 1), size, device)
        return torch.cat([line, grid.new_zeros(1, size), grid])
