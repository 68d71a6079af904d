"""Fixed sine and cosine positions (arXiv:1706.03762, section 3.5), also of a grid (arXiv:2111.06377)."""

from __future__ import annotations

import torch


def sincos_1d(positions: torch.Tensor, size: int) -> torch.Tensor:
    """Sines in the first half of the channels, cosines in the second; wavelengths from 2 pi to 10000 * 2 pi.

    Args:
        positions: [p].
        size: channels.

    Returns:
        [p, size] in fp32.

    Raises:
        ValueError: an odd size.
    """
    if size % 2:
        raise ValueError(f"Sine and cosine positions need an even number of channels; it is {size}.")
    exponents = torch.arange(size // 2, dtype=torch.float32, device=positions.device) / (size // 2)
    angles = positions.float()[:, None] / 10000.0**exponents
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def sincos_2d(side: int, size: int, device: torch.device | None = None) -> torch.Tensor:
    """Positions of a square grid: the column in the first half of the channels, the row in the second.

    Args:
        side: of the grid.
        size: channels.
        device: where to make them.

    Returns:
        [side * side, size] in fp32, row-major.

    Raises:
        ValueError: a size that 4 does not divide.
    """
    if size % 4:
        raise ValueError(f"Positions of a grid need a number of channels that 4 divides; it is {size}.")
    axis = sincos_1d(torch.arange(side, device=device), size // 2)
    columns, rows = axis[None].expand(side, -1, -1), axis[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)
