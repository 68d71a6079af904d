"""xPos (arXiv:2212.10554): rotary positions whose amplitude falls with the distance, interleaved."""

from __future__ import annotations

import torch

from mixformer.context import Context
from mixformer.hooks import replace
from mixformer.mixins.rotary import RotaryMixin
from mixformer.transformer import Layer


class XPosMixin(RotaryMixin):
    """Rotate q and k by their position p; scale q by zeta^(p / scale_base) and k by its inverse.

    Dimensions 2i and 2i + 1 turn together, with zeta_i = (2i + 0.4 d) / (1.4 d). Scores depend on differences of
    positions only, so keys are cached scaled.

    Args:
        base: wavelength base.
        scale_base: positions over which the amplitude falls by zeta.
        centre: the position that is not scaled. It cancels out, but keeps the factors near one where it lies in the
            middle of the positions: they leave the range of fp32 about 70 scale_base away from it, that of fp16
            about 8.
    """

    def __init__(self, base: float = 10000.0, scale_base: float = 512.0, centre: int = 0) -> None:
        super().__init__(base)
        if scale_base <= 0:
            raise ValueError(f"XPosMixin: scale_base is {scale_base}; it must be above 0.")
        self.scale_base, self.centre = scale_base, centre

    def before_forward(self, ctx: Context) -> None:
        positions = ctx.position_ids
        if positions is None:
            raise ValueError("xPos needs position_ids; give input_ids or position_ids.")
        size = self.head_width
        angles = positions[:, None, :, None].float() * self.frequencies(positions.device)
        zeta = (torch.arange(0, size, 2, device=positions.device) + 0.4 * size) / (1.4 * size)
        scale = zeta ** ((positions[:, None, :, None] - self.centre) / self.scale_base)
        cos, sin = angles.cos(), angles.sin()
        ctx.shared[f"{self.name}.q"] = cos * scale, sin * scale
        ctx.shared[f"{self.name}.k"] = cos / scale, sin / scale

    @replace
    def position_fn(
        self, q: torch.Tensor, k: torch.Tensor, layer: Layer, ctx: Context
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _turn(q, *ctx.shared[f"{self.name}.q"]), _turn(k, *ctx.shared[f"{self.name}.k"])


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
