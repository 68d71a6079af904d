"""A learned vector for the place of a frame in a video (arXiv:2205.14100, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from mixformer.context import Context
from mixformer.hooks import wrap
from mixformer.mixin import BaseMixin
from mixformer.sites import normal


class FrameEmbeddingMixin(BaseMixin):
    """Add to the features [m, N, c] of each picture the vector of its `frame_ids` [m]; without those, nothing.

    Args:
        num_frames: frames of a video.
    """

    inputs = ("frame_ids",)
    whole_sequence = True

    def __init__(self, num_frames: int) -> None:
        super().__init__()
        if num_frames < 1:
            raise ValueError(f"FrameEmbeddingMixin: num_frames is {num_frames}; it must be at least 1.")
        self.num_frames = num_frames

    def build(self, model: Any) -> None:
        self.table = nn.Parameter(normal(self.num_frames, 1, model.config.hidden_size, std=model.config.init_std))

    def plan(self, ctx: Context) -> None:
        frames, images = ctx.inputs.get("frame_ids"), ctx.inputs.get("images")
        if frames is None:
            return
        if images is None or frames.shape != images.shape[:1]:
            given = 0 if images is None else len(images)
            raise ValueError(f"frame_ids must be [m], one for each of the {given} images; got {tuple(frames.shape)}.")
        if not torch.compiler.is_compiling() and bool(((frames < 0) | (frames >= self.num_frames)).any()):
            raise ValueError(f"frame_ids must be from 0 to {self.num_frames - 1}; got {frames.tolist()}.")

    @wrap
    def final_forward(
        self, hidden_states: torch.Tensor, ctx: Context, old_impl: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        features, frames = old_impl(hidden_states), ctx.inputs.get("frame_ids")
        return features if frames is None else features + self.table[frames]
