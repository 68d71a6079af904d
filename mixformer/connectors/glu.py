"""CogVLM's adapter between tower and language model (arXiv:2311.03079, section 2.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from mixformer.connectors.connector import ConnectorConfig, convolve, grid_side, to_grid
from mixformer.sites import MLP, LayerNorm, Linear


@dataclass
class GLUAdapterConfig(ConnectorConfig):
    """Options of `GLUAdapter`.

    Attributes:
        inner_hidden_size: of its gated MLP; None for the language model's.
        downsample: side of a strided convolution before it: 1 for none (CogVLM), 2 to quarter the tokens (CogVLM2).
        position_table: a learned table added to the tower's output (CogAgent), zeros at first.
    """

    inner_hidden_size: int | None = None
    downsample: int = 1
    position_table: bool = False

    def num_tokens(self, num_features: int) -> int:
        """Tokens that come out for a square grid of patches.

        Raises:
            ValueError: the grid does not divide.
        """
        return (grid_side(num_features, self.downsample, "downsample") // self.downsample) ** 2

    def build(self, in_size: int, out_size: int, inner_size: int, num_features: int) -> GLUAdapter:
        """The adapter from a tower of width `in_size` to a language model of `out_size` and `inner_size`."""
        return GLUAdapter(self, in_size, out_size, self.inner_hidden_size or inner_size, num_features)


class GLUAdapter(nn.Module):
    """[m, patches, c] -> [m, tokens, h]: (convolution), Linear, LayerNorm, GELU, gated MLP."""

    def __init__(
        self, config: GLUAdapterConfig, in_size: int, out_size: int, inner_size: int, num_patches: int
    ) -> None:
        super().__init__()
        self.downsample = config.downsample
        strided = config.downsample > 1
        side = config.downsample
        self.conv = nn.Conv2d(in_size, in_size, side, side) if strided else None
        table = nn.Parameter(torch.zeros(num_patches, in_size)) if config.position_table else None
        self.position_embedding = table
        self.linear = Linear(in_size, out_size, bias=False)
        self.norm = LayerNorm(out_size)
        self.mlp = MLP(out_size, inner_size, gated=True, bias=False, activation="silu")

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[m, patches, c] -> [m, tokens, h]."""
        if self.position_embedding is not None:
            features = features + self.position_embedding
        if self.conv is not None:
            features = convolve(self.conv, to_grid(features)).flatten(1, 2)
        return self.mlp(F.gelu(self.norm(self.linear(features))))
