"""Rotary position embedding (arXiv:2104.09864), half-split: dimension i turns with dimension i + d/2."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from mixformer.context import Context
from mixformer.hooks import replace
from mixformer.mixin import BaseMixin
from mixformer.transformer import Layer


class RotaryMixin(BaseMixin):
    """Rotate queries and keys by their position.

    Args:
        base: wavelength base.
        tables: `fp32` computes angles in fp32 whatever the model's dtype. `released` keeps the frequencies as a
            buffer in the model's dtype and multiplies positions in that dtype, as the released CogVLM and CogAgent
            code does: in bf16 the angles are coarse, and the weights were trained with them.

    Raises:
        ValueError: another kind of tables; an odd head size, when added.
    """

    inv_freq: torch.Tensor

    def __init__(self, base: float = 10000.0, tables: str = "fp32") -> None:
        super().__init__()
        if tables not in ("fp32", "released"):
            raise ValueError(f"RotaryMixin tables are 'fp32' or 'released', not {tables!r}.")
        self.base, self.tables = base, tables

    def build(self, model: Any) -> None:
        self.head_width: int = model.config.head_width
        if self.head_width % 2:
            raise ValueError(f"Rotary positions need an even head size; this model's is {self.head_width}.")
        if self.tables == "released":
            made = torch.empty(self.head_width // 2)
            self.register_buffer("inv_freq", made if made.is_meta else self.frequencies(None).to(made.dtype))

    def frequencies(self, device: torch.device | None) -> torch.Tensor:
        """[d / 2] angle per position, fp32."""
        kept = device is not None and not torch.compiler.is_compiling()
        return (_kept_frequencies if kept else _frequencies)(self.base, self.head_width, device)

    def angles(self, position_ids: torch.Tensor) -> torch.Tensor:
        """[b, s] -> [b, s, d], in the precision of the tables."""
        frequencies = self.inv_freq if self.tables == "released" else self.frequencies(position_ids.device)
        return _angles(position_ids, frequencies)

    def before_forward(self, ctx: Context) -> None:
        positions = ctx.position_ids
        if positions is None:
            raise ValueError("Rotary positions need position_ids; give input_ids or position_ids.")
        bound, counted = self._kept(ctx, positions)
        if bound is not None:
            table = _kept_table(self.base, self.head_width, max(256, 1 << (bound - 1).bit_length()), positions.device)
            rows = table[:bound] if counted else F.embedding(positions, table)[:, None]
            cos, sin = rows.chunk(2, -1)
        else:
            cos, sin = _cos_sin(self.angles(positions)[:, None])
        ctx.shared[f"{self.name}.cos_sin"] = cos, sin

    def _kept(self, ctx: Context, positions: torch.Tensor) -> tuple[int | None, bool]:
        """How many rows of the kept table are needed, or None to compute anew; whether they are those from 0 on."""
        known = None if self.tables == "released" or torch.compiler.is_compiling() else ctx.known_positions
        if known is None or known[0] is not positions or type(positions) is not torch.Tensor:
            return None, False
        return known[1], known[2] and ctx.cache is None

    @replace
    def position_fn(
        self, q: torch.Tensor, k: torch.Tensor, layer: Layer, ctx: Context
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = ctx.shared[f"{self.name}.cos_sin"]
        if cos.dtype != q.dtype:
            cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _frequencies(base: float, head_width: int, device: torch.device | None) -> torch.Tensor:
    exponents = torch.arange(0, head_width, 2, dtype=torch.float32, device=device) / head_width
    return 1.0 / (base**exponents)


@functools.lru_cache(maxsize=32)
def _kept_frequencies(base: float, head_width: int, device: torch.device | None) -> torch.Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return _frequencies(base, head_width, device)


def _angles(position_ids: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    half = position_ids[..., None].to(frequencies.dtype) * frequencies
    return torch.cat([half, half], dim=-1)


def _cos_sin(angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine, and sine with the sign of the first half turned, so that rotating needs no negation."""
    sin = angles.sin()
    sin[..., : angles.shape[-1] // 2].neg_()
    return angles.cos(), sin


@functools.lru_cache(maxsize=8)
def _kept_table(base: float, head_width: int, num_rows: int, device: torch.device) -> torch.Tensor:
    """[positions, 2 * d], cosine beside sine; the same numbers as computed anew, kept between forwards."""
    with torch.inference_mode(False), torch.no_grad():
        angles = _angles(torch.arange(num_rows, device=device), _frequencies(base, head_width, device))
        return torch.cat(_cos_sin(angles), dim=-1)


def _rotate(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    if torch.compiler.is_compiling():  # roll looks at sizes that a graph for every batch does not know
        halves = x.chunk(2, dim=-1)
        return x * cos + torch.cat([halves[1], halves[0]], dim=-1) * signed_sin
    turned = x.roll(x.shape[-1] // 2, -1)
    if x.dtype == torch.float32:
        return torch.addcmul(x * cos, turned, signed_sin)
    return (x * cos).add_(turned * signed_sin)
