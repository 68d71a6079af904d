"""Patches in, features out: what makes a vision tower of a backbone (arXiv:2010.11929)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from mixformer.context import Context
from mixformer.hooks import replace
from mixformer.mixin import BaseMixin


class PatchEmbeddingMixin(BaseMixin):
    """Cut pictures into patches, put a cls token before them, and drop it again at the end.

    Args:
        image_size: pictures are image_size x image_size.
        patch_size: side of a patch, a divisor of image_size.
        in_channels: colour channels.
        stem_channels: widths of 3x3 stride-2 convolutions with GELU before the patch convolution (early
            convolutions, arXiv:2106.14881); each halves what is left of the patch for the last one.

    Raises:
        ValueError: sizes that do not divide.
    """

    inputs = ("images",)
    whole_sequence = True

    def __init__(
        self, image_size: int, patch_size: int, in_channels: int = 3, stem_channels: list[int] | None = None
    ) -> None:
        super().__init__()
        self.stem_channels = list(stem_channels or [])
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}.")
        if patch_size % 2 ** len(self.stem_channels):
            raise ValueError(f"patch_size {patch_size} cannot be halved {len(self.stem_channels)} times by the stem.")
        self.image_size, self.patch_size, self.in_channels = image_size, patch_size, in_channels

    def build(self, model: Any) -> None:
        size = model.config.hidden_size
        widths = [self.in_channels, *self.stem_channels]
        stem = [nn.Conv2d(a, b, 3, 2, 1) for a, b in pairwise(widths)]
        self.stem = nn.ModuleList(stem)
        side = self.patch_size // 2 ** len(stem)
        self.conv = nn.Conv2d(widths[-1], size, side, side)
        self.cls = nn.Parameter(torch.randn(size) * model.config.init_std)

    def plan(self, ctx: Context) -> None:
        images = ctx.require("images")
        expected = (self.in_channels, self.image_size, self.image_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images must be [m, {', '.join(map(str, expected))}] for this tower; got {tuple(images.shape)}."
            )

    @replace
    def word_embedding_forward(self, input_ids: None, ctx: Context) -> torch.Tensor:
        x = ctx.require("images")
        for conv in self.stem:
            x = F.gelu(conv(x))
        patches = self.conv(x).flatten(2).transpose(1, 2)
        return torch.cat([self.cls.expand(len(patches), 1, -1), patches], dim=1)

    @replace
    def final_forward(self, hidden_states: torch.Tensor, ctx: Context) -> torch.Tensor:
        return hidden_states[:, 1:]
