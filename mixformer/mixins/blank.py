"""Blank pictures: what towers run on in training where a process has no picture but others have.

A mixin with a tower has two attributes for it. While `synchronised`, it encodes a blank picture where a batch has none,
so that every process runs the tower; `encoded` tells whether there were real ones since it was last set to False.
"""

from __future__ import annotations

from typing import Any

import torch


def blank_picture(tower: Any) -> torch.Tensor:
    """[1, 3, y, x] zeros of the size that a tower takes."""
    config = tower.config
    return torch.zeros(1, config.in_channels, config.image_size, config.image_size, device=tower.device)


def nothing_of(features: torch.Tensor) -> torch.Tensor:
    """A zero [] that all of the features are part of, so that gradients (zeros) flow through what made them."""
    return torch.where(torch.zeros_like(features, dtype=torch.bool), features, 0).sum()
