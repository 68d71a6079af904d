"""Cross attention in every layer (arXiv:1706.03762, section 3.2.3), wherever the features come from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from mixformer.context import Context
from mixformer.hooks import wrap
from mixformer.mixin import BaseMixin
from mixformer.sites import Linear, make_norm
from mixformer.transformer import Layer, residual_std


class CrossAttention(nn.Module):
    """One layer's weights: `norm`, `query`, `key_value` (parts k and v) and `dense`."""

    def __init__(self, layer: Layer, feature_size: int, compute_size: int, bias: bool) -> None:
        super().__init__()
        config = layer.config
        self.norm = make_norm(config)
        self.query = Linear(config.hidden_size, compute_size, bias, init_std=config.init_std)
        parts = {"k": compute_size, "v": compute_size}
        self.key_value = Linear(feature_size, 2 * compute_size, bias, parts, config.init_std)
        self.dense = Linear(compute_size, config.hidden_size, bias, init_std=residual_std(config))


class FeatureAttentionMixin(BaseMixin):
    """Let every token attend to features between self attention and MLP; subclasses `give` them before each forward.

    Rows without any get exact zeros, and a batch without any pays nothing. With a cache, keys and values are computed
    once and kept in `cache.memo`; features that come with a later chunk are seen from that chunk on.

    Args:
        feature_size: width of the features; None for h.
        compute_size: width of the cross attention; None for h.
        num_heads: heads of the cross attention; None for the model's.
        bias: whether its Linears have one.

    Raises:
        ValueError: when added: a width that the heads do not divide.
    """

    def __init__(
        self, feature_size: int | None = None, compute_size: int | None = None, num_heads: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.feature_size, self.compute_size, self.num_heads, self.bias = feature_size, compute_size, num_heads, bias

    def build(self, model: Any) -> None:
        width = self.compute_size or model.config.hidden_size
        self.heads: int = self.num_heads or model.config.num_heads
        if width % self.heads:
            sizes = f"width {width} does not divide into {self.heads} heads"
            raise ValueError(f"Cross attention of {sizes}. Change compute_size or num_heads.")

    def build_layer(self, layer: Layer) -> CrossAttention:
        size = layer.config.hidden_size
        return CrossAttention(layer, self.feature_size or size, self.compute_size or size, self.bias)

    def give(self, features: torch.Tensor | None, valid: torch.Tensor | None, ctx: Context) -> None:
        """Tell the layers what to attend to, beside what a cache has; once in `before_forward`.

        Args:
            features: [b, N, c], or None where nothing comes new.
            valid: [b, N] bool, True on real ones, or None where all are.
            ctx: of this forward.
        """
        memo: dict[str, Any] = {} if ctx.cache is None else ctx.cache.memo
        key, whole, earlier = f"{self.name}.valid", f"{self.name}.all", memo.get(f"{self.name}.valid")
        if features is None:
            ctx.shared[key], ctx.shared[whole] = earlier, memo.get(whole, False)
            return
        ctx.shared[f"{self.name}.features"] = features
        ctx.shared[whole] = memo[whole] = valid is None and (earlier is None or memo[whole])
        if valid is None:
            valid = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        ctx.shared[key] = memo[key] = valid if earlier is None else torch.cat([earlier, valid], dim=1)

    def _keys_values(self, weights: Any, layer: Layer, ctx: Context) -> tuple[torch.Tensor, torch.Tensor]:
        keys = [f"{self.name}.{part}.{layer.index}" for part in ("k", "v")]
        features = ctx.shared.get(f"{self.name}.features")
        memo = {} if ctx.cache is None else ctx.cache.memo
        if features is None:
            return memo[keys[0]], memo[keys[1]]
        fused = weights.key_value(features, ctx)
        k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in fused.chunk(2, dim=-1))
        if keys[0] in memo:
            k, v = (torch.cat([memo[key], x], dim=2) for key, x in zip(keys, (k, v), strict=True))
        if ctx.cache is not None:  # head by head: every step of one token reads them as they lie
            k, v = k.contiguous(), v.contiguous()
            memo[keys[0]], memo[keys[1]] = k, v
        return k, v

    @wrap
    def cross_attention_forward(
        self, hidden_states: torch.Tensor, layer: Layer, ctx: Context,
        old_impl: Callable[[torch.Tensor], torch.Tensor | None],
    ) -> torch.Tensor | None:
        below = old_impl(hidden_states)
        valid = ctx.shared.get(f"{self.name}.valid")
        if valid is None:
            return below
        weights = layer.mixins[self.name]
        q = weights.query(weights.norm(hidden_states, ctx), ctx)
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self._keys_values(weights, layer, ctx)
        has_any = None if ctx.shared[f"{self.name}.all"] else valid.any(1)[:, None, None]
        mask = None if has_any is None else (valid[:, None] | ~has_any)[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        out = weights.dense(out, ctx)
        out = out if has_any is None else torch.where(has_any, out, 0)
        return out if below is None else below + out
