"""Prefix tuning (arXiv:2101.00190): learned keys and values before those of the tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn as nn

from mixformer.context import Context
from mixformer.hooks import wrap
from mixformer.masks import LoweredMask
from mixformer.mixin import BaseMixin
from mixformer.transformer import Layer


class PrefixTuningMixin(BaseMixin):
    """Let every token attend to `num_prefix` learned keys and values; they stay outside the cache.

    Args:
        num_prefix: learned keys per layer.

    Raises:
        ValueError: fewer than one.
    """

    def __init__(self, num_prefix: int = 16) -> None:
        super().__init__()
        if num_prefix < 1:
            raise ValueError(f"num_prefix is {num_prefix}; a prefix needs at least one key.")
        self.num_prefix = num_prefix

    def build_layer(self, layer: Layer) -> nn.ParameterDict:
        config = layer.config
        shape = (config.kv_heads, self.num_prefix, config.head_width)
        return nn.ParameterDict({part: nn.Parameter(torch.randn(shape) * config.init_std) for part in ("k", "v")})

    @wrap
    def attention_fn(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: LoweredMask, layer: Layer, ctx: Context,
        old_impl: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        prefix = layer.mixins[self.name]
        before = {part: prefix[part].to(k.dtype).expand(len(k), -1, -1, -1) for part in ("k", "v")}
        longer = torch.cat([before["k"], k], dim=2), torch.cat([before["v"], v], dim=2)
        return old_impl(q, *longer, mask.prepend(self.num_prefix, q, k))
