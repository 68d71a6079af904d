"""Two-dimensional rotary positions of EVA-02 towers (arXiv:2303.11331), interleaved pairs."""

from __future__ import annotations

import torch

from mixformer.context import Context
from mixformer.hooks import replace
from mixformer.mixin import BaseMixin
from mixformer.transformer import Layer


class Rotary2DMixin(BaseMixin):
    """Rotate patch queries and keys by row (first half of each head) and column (second half); pairs (2i, 2i + 1).

    Args:
        grid: patches per side.
        pretraining_grid: positions are stretched to this grid (EVA-CLIP's `intp_freq`).
        num_skipped: leading tokens that are not rotated (cls).
        base: wavelength base.
    """

    def __init__(self, grid: int, pretraining_grid: int = 16, num_skipped: int = 1, base: float = 10000.0) -> None:
        super().__init__()
        self.grid, self.pretraining_grid, self.num_skipped, self.base = grid, pretraining_grid, num_skipped, base

    def angles(self, head_width: int, device: torch.device | None = None) -> torch.Tensor:
        """[patches, d] angles in fp32, row-major."""
        half = head_width // 2
        exponents = torch.arange(0, half, 2, dtype=torch.float32, device=device) / half
        positions = torch.arange(self.grid, dtype=torch.float32, device=device) / self.grid * self.pretraining_grid
        axis = (positions[:, None] / self.base**exponents).repeat_interleave(2, dim=-1)
        rows = axis[:, None].expand(-1, self.grid, -1)
        return torch.cat([rows, axis[None].expand(self.grid, -1, -1)], dim=-1).flatten(0, 1)

    @replace
    def position_fn(
        self, q: torch.Tensor, k: torch.Tensor, layer: Layer, ctx: Context
    ) -> tuple[torch.Tensor, torch.Tensor]:
        key = f"{self.name}.tables"
        cos, sin = ctx.shared[key]
        return self._rotate(q, cos, sin), self._rotate(k, cos, sin)

    def before_forward(self, ctx: Context) -> None:
        images = ctx.require("images")
        angles = self.angles(self.head_width, images.device)
        ctx.shared[f"{self.name}.tables"] = (angles.cos(), angles.sin())

    def build(self, model: object) -> None:
        self.head_width: int = model.config.head_width  # type: ignore[attr-defined]
        if self.head_width % 4:
            raise ValueError(f"2-D rotary positions need a head size that 4 divides; it is {self.head_width}.")

    def _rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        skipped, patches = x[:, :, : self.num_skipped], x[:, :, self.num_skipped :]
        even, odd = patches.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-odd, even], dim=-1).flatten(-2)
        return torch.cat([skipped, patches * cos.to(x.dtype) + turned * sin.to(x.dtype)], dim=2)
