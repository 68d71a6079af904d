"""ImageMixin: picture features in the places that token_type_ids mark (arXiv:2311.03079, section 2.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from mixformer.config import TransformerConfig
from mixformer.connectors.glu import GLUAdapterConfig
from mixformer.context import Context
from mixformer.hooks import wrap
from mixformer.mixin import BaseMixin
from mixformer.sites import normal


class ImageMixin(BaseMixin):
    """Encode pictures with a tower, project them, and put boi + features + eoi where `token_type_ids` is 1.

    A span is N + 2 tokens: boi, N features, eoi. All features share one position id. boi and the features are routed
    as `image`; eoi counts as text. Adjacent spans stay two, since spans are cut every N + 2 tokens.

    Args:
        tower: config of the vision tower, a model that turns `images` into features [m, patches, c].
        adapter: config of the projector.
    """

    inputs = ("token_type_ids", "images")

    def __init__(self, tower: TransformerConfig, adapter: GLUAdapterConfig | None = None) -> None:
        super().__init__()
        self.tower_config, self.adapter_config = tower, adapter or GLUAdapterConfig()
        self.num_features = self.adapter_config.num_tokens(tower.max_positions - 1)

    def build(self, model: Any) -> None:
        config, tower = model.config, self.tower_config
        self.tower = tower.build()
        self.projector = self.adapter_config.build(
            tower.hidden_size, config.hidden_size, config.inner_size, tower.max_positions - 1
        )
        self.boi = nn.Parameter(normal(config.hidden_size, std=config.init_std))
        self.eoi = nn.Parameter(normal(config.hidden_size, std=config.init_std))

    def plan(self, ctx: Context) -> None:
        types, images = ctx.inputs.get("token_type_ids"), ctx.inputs.get("images")
        num_images = 0 if images is None else images.shape[0]
        places = None if types is None else (types.flatten() != 0).nonzero().flatten()
        if places is None or places.numel() == 0:
            if num_images:
                raise ValueError(
                    f"{num_images} image(s) were given, but token_type_ids mark no place for them. Put 1 on the "
                    f"{self.num_features + 2} tokens of each image (boi, {self.num_features} features, eoi)."
                )
            return
        assert types is not None and ctx.input_ids is not None
        if types.shape != ctx.input_ids.shape:
            raise ValueError(
                f"token_type_ids {tuple(types.shape)} must have the shape of input_ids {tuple(ctx.input_ids.shape)}."
            )
        spans = self._spans(types, places)
        images = ctx.require("images")
        if num_images != len(spans):
            raise ValueError(
                f"token_type_ids have room for {len(spans)} image(s) ({self.num_features + 2} tokens each), but "
                f"{num_images} were given. Images follow the order of their places, row by row."
            )
        if ctx.position_steps is not None:
            steps = ctx.position_steps.flatten().scatter(0, spans[:, 2:-1].flatten(), 0)
            ctx.position_steps = steps.view_as(types)
        ctx.routes.add("image", spans[:, :-1].flatten(), types.numel())
        ctx.shared["image_rows"] = spans[:, 0] // types.shape[1]
        ctx.shared[f"{self.name}.places"] = spans.flatten()

    def _spans(self, types: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        size, length = self.num_features + 2, types.shape[1]
        counts = (types != 0).sum(1)
        wrong = (counts % size).nonzero().flatten()
        if wrong.numel():
            row = int(wrong[0])
            raise ValueError(
                f"Row {row} marks {int(counts[row])} image tokens in token_type_ids; each image takes {size} (boi, "
                f"{self.num_features} features, eoi), so the count must be a multiple of {size}. A span may not be cut."
            )
        spans = places.view(-1, size)
        broken = (spans[:, -1] - spans[:, 0] != size - 1).nonzero().flatten()
        if broken.numel():
            first = int(spans[int(broken[0]), 0])
            raise ValueError(
                f"Row {first // length}: the image span that starts at slot {first % length} is not {size} tokens in "
                f"one piece. Mark boi, {self.num_features} features and eoi without a gap."
            )
        return spans

    def before_forward(self, ctx: Context) -> None:
        if f"{self.name}.places" in ctx.shared:
            ctx.shared[f"{self.name}.features"] = self.encode(ctx.require("images"))

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """[m, 3, y, x] -> [m, N + 2, h]: boi, projected features, eoi."""
        features = self.projector(self.tower(images=images.to(self.boi.dtype)))
        boi, eoi = (token.expand(len(features), 1, -1) for token in (self.boi, self.eoi))
        return torch.cat([boi, features, eoi], dim=1)

    @wrap
    def word_embedding_forward(
        self, input_ids: torch.Tensor, ctx: Context, old_impl: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        embeddings = old_impl(input_ids)
        features = ctx.shared.get(f"{self.name}.features")
        if features is None:
            return embeddings
        flat, places = embeddings.flatten(0, 1), ctx.shared[f"{self.name}.places"]
        return flat.index_copy(0, places, features.flatten(0, 1).to(flat.dtype)).view_as(embeddings)
