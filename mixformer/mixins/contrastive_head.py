"""Texts and pictures in one space, and how near they are to each other (arXiv:2103.00020, section 2.3 and figure 3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from mixformer.config import VisionTowerConfig
from mixformer.context import Context
from mixformer.hooks import wrap
from mixformer.mixins.pool_head import PoolHeadMixin


class ContrastiveHeadMixin(PoolHeadMixin):
    """Project each text's end-of-text token and compare it with pictures that a tower puts into the same space.

    A forward gives `outputs["text_features"]` [b, p] of unit length and, with `images` [m, 3, y, x], also
    `image_features` [m, p], `logits_per_text` [b, m] and its transpose `logits_per_image`; `encode` takes pictures
    alone. In a batch to learn from, text i belongs to picture i.

    Args:
        tower: config of the vision tower, one whose output is one vector [m, p] for each picture.
        eos_token_id: id of the end-of-text token, of which the first counts; None: the highest id (CLIP's releases).
        initial_scale: what similarities are multiplied by in a fresh model; it is learned as its logarithm.
        max_scale: while training, the scale is cut down to it before each forward. Evaluation takes it as it is.

    Raises:
        ValueError: a tower that gives more than one vector.
    """

    inputs = ("images",)

    def __init__(
        self, tower: VisionTowerConfig, eos_token_id: int | None = None, initial_scale: float = 1 / 0.07,
        max_scale: float = 100.0,
    ) -> None:
        super().__init__("eot", size=tower.feature_size, bias=False, result="text_features", eos_token_id=eos_token_id)
        if tower.num_features != 1:
            raise ValueError(
                f"Texts are compared with one vector for each picture, but the tower's output '{tower.output}' has "
                f"{tower.num_features}. Take one that pools: {', '.join(tower.outputs[2:]) or 'of another tower'}."
            )
        self.tower_config, self.initial_scale, self.max_scale = tower, initial_scale, max_scale

    def build(self, model: Any) -> None:
        super().build(model)
        self.tower = self.tower_config.build()
        self.logit_scale = nn.Parameter(torch.full((), math.log(self.initial_scale)))

    def before_forward(self, ctx: Context) -> None:
        if self.training:
            with torch.no_grad():
                self.logit_scale.clamp_(max=math.log(self.max_scale))
        images = ctx.inputs.get("images")
        if images is not None and ctx.cache is None:
            ctx.outputs["image_features"] = self.encode(images)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """[m, 3, y, x] -> features [m, p] of unit length."""
        return F.normalize(self.tower(images=images.to(self.logit_scale.dtype)), dim=-1)

    def pooled(self, hidden_states: torch.Tensor, ctx: Context) -> torch.Tensor:
        """[b, s, h] -> text features [b, p] of unit length."""
        return F.normalize(super().pooled(hidden_states, ctx), dim=-1)

    @wrap
    def final_forward(
        self, hidden_states: torch.Tensor, ctx: Context, old_impl: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        value = super().final_forward(hidden_states, ctx, old_impl)
        if "image_features" in ctx.outputs:
            texts, images = ctx.outputs["text_features"], ctx.outputs["image_features"]
            ctx.outputs["logits_per_text"] = self.logit_scale.exp() * texts @ images.T
            ctx.outputs["logits_per_image"] = ctx.outputs["logits_per_text"].T
        return value
