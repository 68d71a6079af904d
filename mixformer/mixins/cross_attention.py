"""External encoder with cross attention in every layer (CogAgent, arXiv:2312.08914, section 2.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from mixformer.config import VisionTowerConfig
from mixformer.context import Context
from mixformer.hooks import wrap
from mixformer.mixins.blank import blank_picture, nothing_of
from mixformer.mixins.feature_attention import FeatureAttentionMixin
from mixformer.ready_features import ready_features
from mixformer.routes import items_by_row
from mixformer.transformer import Layer


class CrossAttentionMixin(FeatureAttentionMixin):
    """Let every token attend to the features of its row's high-resolution pictures.

    A row attends to all of its own pictures. Rows without one get exact zeros, and a batch without any pays nothing.
    With a cache, keys and values are computed once and kept in `cache.memo`; pictures that come with a later chunk
    are seen from that chunk on. `cross_images` [m, patches, c] are features that a frozen tower gave before.

    Args:
        tower: config of the encoder, a model that turns `images` into features [m, patches, c].
        compute_size: width of the cross attention; None for the features'.
        num_heads: heads of the cross attention; None for the language model's.
        synchronised, encoded (attributes): see `mixformer.mixins.blank`.
    """

    inputs = ("cross_images",)
    synchronised = encoded = False

    def __init__(self, tower: VisionTowerConfig, compute_size: int | None = None, num_heads: int | None = None) -> None:
        super().__init__(tower.feature_size, compute_size or tower.feature_size, num_heads, bias=False)
        self.tower_config = tower

    def build(self, model: Any) -> None:
        super().build(model)
        config = self.tower_config
        self.tower = config.build()
        self.position_embedding = nn.Parameter(torch.zeros(config.num_features, config.feature_size))

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
        if f"{self.name}.rows" not in ctx.shared:
            self.give(None, None, ctx)
            if self.synchronised:
                ctx.shared[f"{self.name}.nothing"] = nothing_of(self.encode(blank_picture(self.tower)))
            return
        if self.synchronised:
            self.encoded = True
        features, places = self.encode(ctx.require("cross_images")), ctx.shared[f"{self.name}.rows"]
        if places is None:
            self.give(features, None, ctx)
            return
        torch._check(places.shape[1] > 0)
        valid = (places >= 0).repeat_interleave(features.shape[1], dim=1)
        self.give(features[places.clamp_min(0)].flatten(1, 2), valid, ctx)

    @wrap
    def cross_attention_forward(
        self, hidden_states: torch.Tensor, layer: Layer, ctx: Context,
        old_impl: Callable[[torch.Tensor], torch.Tensor | None],
    ) -> torch.Tensor | None:
        found = super().cross_attention_forward(hidden_states, layer, ctx, old_impl)
        nothing = ctx.shared.get(f"{self.name}.nothing")
        if nothing is None:
            return found
        return nothing.to(hidden_states.dtype).expand_as(hidden_states) if found is None else found + nothing

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """[m, 3, y, x] -> [m, patches, c], positions added."""
        if images.dim() == 3:
            return ready_features(images, self.tower, self.name) + self.position_embedding
        return self.tower(images=images.to(self.position_embedding.dtype)) + self.position_embedding
