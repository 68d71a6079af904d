"""Learned positions of one grid, resized to another (arXiv:2010.11929, section 3.2)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

from mixformer.connectors.attention_pooler import resize_grid
from mixformer.connectors.connector import grid_side
from mixformer.context import Context
from mixformer.hooks import replace
from mixformer.mixin import BaseMixin
from mixformer.sites import normal


class ResizedPositionsMixin(BaseMixin):
    """A table of a square grid, resized bicubically to the patches in every forward, so that any image size fits it.

    Args:
        grid: side of the stored grid.
    """

    def __init__(self, grid: int) -> None:
        super().__init__()
        self.grid = grid

    def build(self, model: Any) -> None:
        config = model.config
        if config.positions != "none":
            raise ValueError(f"ResizedPositionsMixin has a table: set positions to 'none', not '{config.positions}'.")
        self.table = nn.Parameter(normal(self.grid**2, config.hidden_size, std=config.init_std))

    @replace
    def position_embedding_forward(self, position_ids: torch.Tensor, ctx: Context) -> torch.Tensor:
        resized = resize_grid(self.table.float(), grid_side(position_ids.shape[-1]))
        return resized.to(self.table.dtype)[None]
