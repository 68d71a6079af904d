"""Fixed sine and cosine positions added to the embeddings (arXiv:1706.03762, section 3.5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mixformer.context import Context
from mixformer.hooks import wrap
from mixformer.mixin import BaseMixin


class SinusoidalPositionMixin(BaseMixin):
    """Sines in the first half of the channels and cosines in the second, as fairseq's language models have them.

    The wavelengths go from 2 pi to 10000 * 2 pi, both included, where the paper leaves the last one out. They are
    computed in fp32 and added, in the precision of the embeddings, before the embedding norm.

    Args:
        offset: added to every position; fairseq counts from 2.
    """

    def __init__(self, offset: int = 2) -> None:
        super().__init__()
        self.offset = offset

    def build(self, model: Any) -> None:
        size = model.config.hidden_size
        if size % 2 or size < 4:
            raise ValueError(f"Sine and cosine positions need an even hidden size from 4 on; this model's is {size}.")

    @wrap
    def embedding_norm_forward(
        self, hidden_states: torch.Tensor, ctx: Context, old_impl: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        assert ctx.position_ids is not None
        half, device = hidden_states.shape[-1] // 2, hidden_states.device
        wavelengths = 10000.0 ** (torch.arange(half, dtype=torch.float32, device=device) / (half - 1))
        angles = (ctx.position_ids + self.offset)[..., None] / wavelengths
        return old_impl(hidden_states + torch.cat([angles.sin(), angles.cos()], dim=-1).to(hidden_states.dtype))
