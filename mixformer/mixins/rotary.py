"""Rotary position embedding (arXiv:2104.09864), half-split: dimension i turns with dimension i + d/2."""

from __future__ import annotations

from dataclasses import astuple
from dataclasses import replace as changed
from typing import Any

import torch
import torch.nn.functional as F

from mixformer.context import Context
from mixformer.hooks import replace
from mixformer.mixin import BaseMixin
from mixformer.rope import (
    RotaryScaling,
    angles_of,
    cos_sin,
    dynamic_frequencies,
    frequencies,
    kept_frequencies,
    kept_table,
)
from mixformer.transformer import Layer


class RotaryMixin(BaseMixin):
    """Rotate queries and keys by their position.

    Args:
        base: wavelength base.
        tables: `fp32` computes angles in fp32 whatever the model's dtype. `released` keeps the frequencies as a
            buffer in the model's dtype and multiplies positions in that dtype, as the released CogVLM and CogAgent
            code does: in bf16 the angles are coarse, and the weights were trained with them.
        scaling: how positions are stretched; None for not at all. Those of kind `dynamic` depend on the length of the
            row, its last position + 1: keys in a cache stay as they were turned when they came, so that beyond
            `original_positions` steps with a cache give other numbers than one forward over the whole row.

    Raises:
        ValueError: another kind of tables, tables that cannot be stretched; an odd head size, when added.
    """

    inv_freq: torch.Tensor

    def __init__(self, base: float = 10000.0, tables: str = "fp32", scaling: RotaryScaling | None = None) -> None:
        super().__init__()
        if tables not in ("fp32", "released"):
            raise ValueError(f"RotaryMixin tables are 'fp32' or 'released', not {tables!r}.")
        if scaling is not None and scaling.kind == "dynamic" and tables == "released":
            raise ValueError("RotaryMixin: 'released' tables are made once and cannot be stretched row by row.")
        self.base, self.tables, self.scaling = base, tables, scaling

    def build(self, model: Any) -> None:
        self.head_width: int = model.config.head_width
        if self.head_width % 2:
            raise ValueError(f"Rotary positions need an even head size; this model's is {self.head_width}.")
        self._scaling: RotaryScaling | None = None
        if self.scaling is not None and self.scaling.kind != "none":
            self._scaling = self._resolved(self.scaling, model.config.max_positions)
        self._key = None if self._scaling is None else astuple(self._scaling)
        if self.tables == "released":
            made = torch.empty(self.head_width // 2)
            self.register_buffer("inv_freq", made if made.is_meta else self.frequencies(None).to(made.dtype))

    def _resolved(self, scaling: RotaryScaling, max_positions: int) -> RotaryScaling:
        original = scaling.original_positions or max_positions
        if original < 1 and scaling.kind != "linear":
            raise ValueError(f"Scaling '{scaling.kind}' needs original_positions, or the model's max_positions.")
        if self.head_width == 2 and scaling.kind == "dynamic":
            raise ValueError("Rotary scaling 'dynamic' needs a head size above 2.")
        return changed(scaling, original_positions=original)

    def frequencies(self, device: torch.device | None) -> torch.Tensor:
        """[d / 2] angle per position, fp32."""
        if device is not None and not torch.compiler.is_compiling():
            return kept_frequencies(self.base, self.head_width, device, self._key)
        return frequencies(self.base, self.head_width, device, self._scaling)

    def angles(self, position_ids: torch.Tensor) -> torch.Tensor:
        """[b, s] -> [b, s, d], in the precision of the tables."""
        if self._scaling is not None and self._scaling.kind == "dynamic":
            lengths = position_ids.amax(-1) + 1
            stretched = dynamic_frequencies(self.base, self.head_width, lengths, self._scaling)
            return angles_of(position_ids, stretched[:, None])
        made = self.inv_freq if self.tables == "released" else self.frequencies(position_ids.device)
        return angles_of(position_ids, made)

    def before_forward(self, ctx: Context) -> None:
        positions = ctx.position_ids
        if positions is None:
            raise ValueError("Rotary positions need position_ids; give input_ids or position_ids.")
        bound, counted = self._kept(ctx, positions)
        if bound is not None:
            num_rows = max(256, 1 << (bound - 1).bit_length())
            table = kept_table(self.base, self.head_width, num_rows, positions.device, self._key)
            rows = table[:bound] if counted else F.embedding(positions, table)[:, None]
            cos, sin = rows.chunk(2, -1)
        else:
            cos, sin = cos_sin(self.angles(positions)[:, None], self._scaling)
        ctx.shared[f"{self.name}.cos_sin"] = cos, sin

    def _kept(self, ctx: Context, positions: torch.Tensor) -> tuple[int | None, bool]:
        """How many rows of the kept table are needed, or None to compute anew; whether they are those from 0 on."""
        known = None if self.tables == "released" or torch.compiler.is_compiling() else ctx.known_positions
        if known is None or known[0] is not positions or type(positions) is not torch.Tensor:
            return None, False
        bound, scaling = known[1], self._scaling
        if bound is not None and scaling is not None and scaling.kind == "dynamic":
            bound = bound if bound <= (scaling.original_positions or 0) else None
        return bound, known[2] and ctx.cache is None

    @replace
    def position_fn(
        self, q: torch.Tensor, k: torch.Tensor, layer: Layer, ctx: Context
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = ctx.shared[f"{self.name}.cos_sin"]
        if cos.dtype != q.dtype:
            cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    if torch.compiler.is_compiling():  # roll looks at sizes that a graph for every batch does not know
        halves = x.chunk(2, dim=-1)
        return x * cos + torch.cat([halves[1], halves[0]], dim=-1) * signed_sin
    turned = x.roll(x.shape[-1] // 2, -1)
    if x.dtype == torch.float32:
        return torch.addcmul(x * cos, turned, signed_sin)
    return (x * cos).add_(turned * signed_sin)
