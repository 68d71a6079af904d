"""MobileVLM's lightweight downsample projectors, V1 (arXiv:2312.16886, section 3.3) and V2 (arXiv:2402.03766)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from mixformer.connectors.connector import ConnectorConfig, convolve, grid_side, to_grid
from mixformer.connectors.projector import ProjectorConfig
from mixformer.sites import LayerNorm, Linear


@dataclass
class LDPConfig(ConnectorConfig):
    """MobileVLM V1's projector, which has no options."""

    def num_tokens(self, num_features: int) -> int:
        """A quarter of the grid's, odd sides rounded up."""
        return ((grid_side(num_features) + 1) // 2) ** 2

    def build(self, in_size: int, out_size: int, inner_size: int, num_features: int) -> LDP:
        """As of `ConnectorConfig`."""
        return LDP(in_size, out_size)


@dataclass
class LDPv2Config(ConnectorConfig):
    """Options of `LDPv2`.

    Attributes:
        output_grid: side of the grid that comes out.
    """

    output_grid: int = 12

    def num_tokens(self, num_features: int) -> int:
        """`output_grid` squared."""
        grid_side(num_features)
        return self.output_grid**2

    def build(self, in_size: int, out_size: int, inner_size: int, num_features: int) -> LDPv2:
        """As of `ConnectorConfig`."""
        return LDPv2(in_size, out_size, self.output_grid)


class InvertedResidual(nn.Module):
    """MobileNetV3's block without expansion (arXiv:1905.02244), on [m, y, x, size], with norms over channels.

    Args:
        size: channels.
        stride: 2 halves the grid, and leaves the residual out.
    """

    def __init__(self, size: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        squeezed = _divisible(size // 4)
        self.depthwise = nn.Conv2d(size, size, 3, stride, 1, groups=size, bias=False)
        self.depthwise_norm = LayerNorm(size)
        self.squeeze = Linear(size, squeezed)
        self.excite = Linear(squeezed, size)
        self.pointwise = Linear(size, size, bias=False)
        self.pointwise_norm = LayerNorm(size)

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        """[m, y, x, size] -> [m, y / stride, x / stride, size]."""
        x = F.hardswish(self.depthwise_norm(convolve(self.depthwise, grid)))
        scale = F.hardsigmoid(self.excite(F.relu(self.squeeze(x.mean((1, 2), keepdim=True)))))
        x = self.pointwise_norm(self.pointwise(x * scale))
        return grid + x if self.stride == 1 else x


class LDP(nn.Module):
    """[m, N, c] -> [m, N/4, h]: an MLP and two convolutional blocks, the second of stride 2.

    Args:
        in_size: c.
        out_size: h.
    """

    def __init__(self, in_size: int, out_size: int) -> None:
        super().__init__()
        self.projector = ProjectorConfig(depth=2).build(in_size, out_size, out_size, 0)
        self.blocks = nn.Sequential(InvertedResidual(out_size, 1), InvertedResidual(out_size, 2))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[m, N, c] -> [m, K, h]."""
        grid: torch.Tensor = self.blocks(to_grid(self.projector(features)))
        return grid.flatten(1, 2)


class LDPv2(nn.Module):
    """[m, N, c] -> [m, side * side, h]: an MLP, average pooling, and a convolution that tells positions apart.

    Args:
        in_size: c.
        out_size: h.
        side: of the grid that comes out.
    """

    def __init__(self, in_size: int, out_size: int, side: int) -> None:
        super().__init__()
        self.projector = ProjectorConfig(depth=2).build(in_size, out_size, out_size, 0)
        self.pool = nn.AdaptiveAvgPool2d(side)
        self.positions = nn.Conv2d(out_size, out_size, 3, 1, 1, groups=out_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[m, N, c] -> [m, K, h]."""
        grid = convolve(self.pool, to_grid(self.projector(features)))
        return (grid + convolve(self.positions, grid)).flatten(1, 2)


def _divisible(size: int) -> int:
    """The nearest multiple of 8, at least 8 and at least 9 tenths of the size."""
    nearest = max(8, (size + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * size else nearest
