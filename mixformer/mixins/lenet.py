"""The convolutions of LeNet-5 (LeCun et al., Proceedings of the IEEE 86(11), 1998, section II-B)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from mixformer.mixins.conv_stem import ConvStemMixin

C3_TABLE: tuple[tuple[int, ...], ...] = (
    (0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (0, 4, 5), (0, 1, 5),
    (0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (0, 3, 4, 5), (0, 1, 4, 5), (0, 1, 2, 5),
    (0, 1, 3, 4), (1, 2, 4, 5), (0, 2, 3, 5), (0, 1, 2, 3, 4, 5),
)  # fmt: skip
"""Maps of S2 that each map of C3 sees (table I)."""


def squash(x: torch.Tensor) -> torch.Tensor:
    """1.7159 tanh(2/3 x): the nonlinearity of all units up to F6 (appendix A)."""
    return 1.7159 * torch.tanh(x * (2 / 3))


def uniform(*shape: int, fan_in: int) -> torch.Tensor:
    """Fresh weights of units with that many inputs, within 2.4 / fan_in of zero; on the meta device, shapes only."""
    made = torch.empty(shape)
    return made if made.is_meta else made.uniform_(-2.4 / fan_in, 2.4 / fan_in)


class TableConvolution(nn.Module):
    """[m, c, y, x] -> [m, maps, y - 4, x - 4]: 5x5 convolutions, each of the input maps that a table names.

    Only the connections of the table have weights [connections, 5, 5], map by map.

    Args:
        table: for each map that goes out, the maps it sees.
        in_channels: c.
    """

    places: torch.Tensor

    def __init__(self, table: Sequence[Sequence[int]], in_channels: int) -> None:
        super().__init__()
        self.shape = (len(table), in_channels, 5, 5)
        self.weight = nn.Parameter(torch.cat([uniform(len(seen), 5, 5, fan_in=25 * len(seen)) for seen in table]))
        self.bias = nn.Parameter(torch.cat([uniform(1, fan_in=25 * len(seen)) for seen in table]))
        places = [index * in_channels + seen for index, row in enumerate(table) for seen in row]
        self.register_buffer("places", torch.tensor(places), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dense = self.weight.new_zeros(math.prod(self.shape[:2]), 5, 5).index_copy(0, self.places, self.weight)
        return F.conv2d(x, dense.view(self.shape), self.bias)


class Subsampling(nn.Module):
    """[m, c, y, x] -> [m, c, y/2, x/2]: sums of 2x2 squares, times a coefficient of the map, plus a bias of the map.

    Args:
        num_maps: c.
    """

    def __init__(self, num_maps: int) -> None:
        super().__init__()
        self.coefficient = nn.Parameter(uniform(num_maps, 1, 1, fan_in=4))
        self.bias = nn.Parameter(uniform(num_maps, 1, 1, fan_in=4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(x, 2, divisor_override=1) * self.coefficient + self.bias


class LeNetMixin(ConvStemMixin):
    """Grey pictures of 32 x 32 to one token of 120 features: C1, S2, C3, S4 and C5, squashed each.

    The original has dark strokes at 1.175 on a bright ground at -0.1: `image_mean` 0.9216 and `image_std` -0.7843.
    """

    def __init__(self) -> None:
        super().__init__(image_size=32, in_channels=1)

    def build(self, model: Any) -> None:
        self.c1 = TableConvolution([[0]] * 6, 1)
        self.s2 = Subsampling(6)
        self.c3 = TableConvolution(C3_TABLE, 6)
        self.s4 = Subsampling(16)
        self.c5 = TableConvolution([range(16)] * 120, 16)

    def feature_map(self, images: torch.Tensor) -> torch.Tensor:
        """[m, 1, 32, 32] -> [m, 120, 1, 1]."""
        x = images
        for part in (self.c1, self.s2, self.c3, self.s4, self.c5):
            x = squash(part(x))
        return x
