"""Pixel shuffle: the features of a small square side by side in one token (arXiv:2404.16821, section 3.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

VERSIONS = ("v1", "v2")


def pixel_shuffle(grid: torch.Tensor, factor: int, version: str = "v2") -> torch.Tensor:
    """Merge squares of factor x factor features, in row-major order, each with all its channels.

    `torch.pixel_unshuffle` orders channel by channel instead.

    Args:
        grid: [m, y, x, c].
        factor: f, a divisor of y and x.
        version: `v2` [m, y/f, x/f, f*f*c] (InternVL-Chat 1.5, VILA 1.5); `v1`, the same transposed
            [m, x/f, y/f, f*f*c] (InternVL-Chat 1.2).
    """
    squares = grid.unflatten(2, (-1, factor)).unflatten(1, (-1, factor))
    order = (0, 1, 3, 2, 4, 5) if version == "v2" else (0, 3, 1, 2, 4, 5)
    return squares.permute(order).flatten(3)


def pad_grid(grid: torch.Tensor, factor: int) -> torch.Tensor:
    """[m, y, x, c] with rows of zeros at the bottom and columns at the right, up to multiples of `factor`."""
    return F.pad(grid, (0, 0, 0, -grid.shape[2] % factor, 0, -grid.shape[1] % factor))
