"""ClipCap's transformer mapper: one feature becomes a prefix (arXiv:2111.09734, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn

from mixformer.connectors.attention import MultiHeadAttention
from mixformer.connectors.connector import ConnectorConfig
from mixformer.connectors.projector import ProjectorConfig
from mixformer.sites import MLP, LayerNorm, normal


@dataclass
class PrefixMapperConfig(ConnectorConfig):
    """Options of `PrefixMapper`.

    Attributes:
        num_prefix: K.
        tokens_per_feature: tokens that each feature becomes before the layers.
        depth: layers.
        num_heads: n.
        inner_hidden_size: of the MLPs; None for 2 h.
    """

    num_prefix: int = 10
    tokens_per_feature: int = 10
    depth: int = 8
    num_heads: int = 8
    inner_hidden_size: int | None = None

    def num_tokens(self, num_features: int) -> int:
        """`num_prefix`."""
        return self.num_prefix

    def build(self, in_size: int, out_size: int, inner_size: int, num_features: int) -> PrefixMapper:
        """As of `ConnectorConfig`.

        Raises:
            ValueError: heads that do not divide.
        """
        return PrefixMapper(self, in_size, out_size)


class PrefixMapperLayer(nn.Module):
    """[m, s, h] -> [m, s, h]: self attention and an MLP, norms before both.

    Args:
        config: its options.
        size: h.
    """

    def __init__(self, config: PrefixMapperConfig, size: int) -> None:
        super().__init__()
        inner_size = config.inner_hidden_size or 2 * size
        self.attention_norm = LayerNorm(size)
        self.attention = MultiHeadAttention(size, config.num_heads, bias=False)
        self.mlp_norm = LayerNorm(size)
        self.mlp = MLP(size, inner_size, gated=False, bias=True, activation="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[m, s, h] -> [m, s, h]."""
        y = self.attention_norm(x)
        x = x + self.attention(y, y)
        return x + self.mlp(self.mlp_norm(x))


class PrefixMapper(nn.Module):
    """[m, N, c] -> [m, K, h]: layers over the projected features and learned constants; the constants come out.

    Args:
        config: its options.
        in_size: c.
        out_size: h.
    """

    def __init__(self, config: PrefixMapperConfig, in_size: int, out_size: int) -> None:
        super().__init__()
        projector = ProjectorConfig(tokens_per_feature=config.tokens_per_feature)
        self.projector = projector.build(in_size, out_size, out_size, 1)
        self.constants = nn.Parameter(normal(config.num_prefix, out_size, std=1.0))
        self.layers = nn.ModuleList(PrefixMapperLayer(config, out_size) for _ in range(config.depth))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[m, N, c] -> [m, K, h]."""
        x = torch.cat([self.projector(features), self.constants.expand(len(features), -1, -1)], dim=1)
        for layer in self.layers:
            x = layer(x)
        return x[:, -len(self.constants) :]
