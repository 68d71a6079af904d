"""External encoder with cross attention in every layer (CogAgent, arXiv:2312.08914, section 2.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from mixformer.config import TransformerConfig
from mixformer.context import Context
from mixformer.hooks import wrap
from mixformer.mixin import BaseMixin
from mixformer.routes import items_by_row
from mixformer.sites import Linear, make_norm
from mixformer.transformer import Layer, residual_std


class CrossAttention(nn.Module):
    """One layer's weights: `norm`, `query`, `key_value` (parts k and v) and `dense`."""

    def __init__(self, layer: Layer, feature_size: int, compute_size: int) -> None:
        super().__init__()
        config = layer.config
        self.norm = make_norm(config)
        self.query = Linear(config.hidden_size, compute_size, bias=False, init_std=config.init_std)
        parts = {"k": compute_size, "v": compute_size}
        self.key_value = Linear(feature_size, 2 * compute_size, False, parts, config.init_std)
        self.dense = Linear(compute_size, config.hidden_size, bias=False, init_std=residual_std(config))


class CrossAttentionMixin(BaseMixin):
    """Let every token attend to the features of its row's high-resolution pictures.

    A row attends to all of its own pictures. Rows without one get exact zeros, and a batch without any pays nothing.
    With a cache, keys and values are computed once and kept in `cache.memo`; pictures that come with a later chunk
    are seen from that chunk on.

    Args:
        tower: config of the encoder, a model that turns `images` into features [m, patches, c].
        compute_size: width of the cross attention; None for the tower's.
        num_heads: heads of the cross attention; None for the language model's.
    """

    inputs = ("cross_images",)

    def __init__(self, tower: TransformerConfig, compute_size: int | None = None, num_heads: int | None = None) -> None:
        super().__init__()
        self.tower_config, self.compute_size = tower, compute_size or tower.hidden_size
        self.num_heads = num_heads

    def build(self, model: Any) -> None:
        self.heads: int = self.num_heads or model.config.num_heads
        if self.compute_size % self.heads:
            sizes = f"width {self.compute_size} does not divide into {self.heads} heads"
            raise ValueError(f"Cross attention of {sizes}. Change compute_size or num_heads.")
        tower = self.tower_config
        self.tower = tower.build()
        self.position_embedding = nn.Parameter(torch.zeros(tower.max_positions - 1, tower.hidden_size))

    def build_layer(self, layer: Layer) -> CrossAttention:
        return CrossAttention(layer, self.tower_config.hidden_size, self.compute_size)

    def plan(self, ctx: Context) -> None:
        images = ctx.inputs.get("cross_images")
        num_images = 0 if images is None else len(images)
        rows = ctx.shared.get("image_rows")
        if rows is None and num_images == 0:
            return
        assert ctx.input_ids is not None
        num_rows = len(ctx.input_ids)
        if rows is None:
            rows = torch.arange(num_rows, device=ctx.input_ids.device)
        ctx.require("cross_images")
        if num_images != len(rows):
            given = f"{num_images} cross_images were given for {len(rows)} image place(s)"
            raise ValueError(f"{given}. Pass one for each image, in the same order.")
        if not ctx.dynamic and torch.equal(rows, torch.arange(num_rows, device=rows.device)):
            ctx.shared[f"{self.name}.rows"] = None
            return
        ctx.shared[f"{self.name}.rows"] = items_by_row(rows, num_rows)

    def before_forward(self, ctx: Context) -> None:
        memo: dict[str, Any] = {} if ctx.cache is None else ctx.cache.memo
        key, whole, earlier = f"{self.name}.valid", f"{self.name}.all", memo.get(f"{self.name}.valid")
        if f"{self.name}.rows" not in ctx.shared:
            ctx.shared[key], ctx.shared[whole] = earlier, memo.get(whole, False)
            return
        features, places = self.encode(ctx.require("cross_images")), ctx.shared[f"{self.name}.rows"]
        if places is None:
            valid = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        else:
            torch._check(places.shape[1] > 0)
            valid = (places >= 0).repeat_interleave(features.shape[1], dim=1)
            features = features[places.clamp_min(0)].flatten(1, 2)
        ctx.shared[f"{self.name}.features"] = features
        ctx.shared[whole] = memo[whole] = places is None and (earlier is None or memo[whole])
        ctx.shared[key] = memo[key] = valid if earlier is None else torch.cat([earlier, valid], dim=1)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """[m, 3, y, x] -> [m, patches, c], positions added."""
        return self.tower(images=images.to(self.position_embedding.dtype)) + self.position_embedding

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
        if ctx.cache is not None:
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
        has_image = None if ctx.shared[f"{self.name}.all"] else valid.any(1)[:, None, None]
        mask = None if has_image is None else (valid[:, None] | ~has_image)[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        out = weights.dense(out, ctx)
        out = out if has_image is None else torch.where(has_image, out, 0)
        return out if below is None else below + out
