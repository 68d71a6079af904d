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
from mixformer.sites import normal


class StemStage(nn.Module):
    """[m, c, y, x] -> [m, size, y/2, x/2]: a 3x3 convolution of stride 2, and residual 3x3 convolutions after it.

    Args:
        in_channels: channels that come in.
        size: channels that go out.
        depth: number of residual convolutions; a stage without any has no norms either.
    """

    def __init__(self, in_channels: int, size: int, depth: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, size, 3, 2, 1)
        self.norm = nn.GroupNorm(1, size) if depth else nn.Identity()
        self.residual = nn.ModuleList(nn.Conv2d(size, size, 3, 1, 1) for _ in range(depth))
        self.residual_norm = nn.GroupNorm(1, size) if depth else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.conv(x)))
        for index, conv in enumerate(self.residual):
            y = conv(x)
            x = x + F.relu(self.residual_norm(y) if index == len(self.residual) - 1 else y)
        return x


class PatchEmbeddingMixin(BaseMixin):
    """Cut pictures into patches and put a cls token before them.

    Args:
        image_size: pictures are image_size x image_size.
        patch_size: side of a patch, a divisor of image_size.
        in_channels: colour channels.
        stem_channels: widths of the stages of an early-convolution stem (arXiv:2106.14881) before the patch
            convolution; each stage halves what is left of the patch for the last one.
        stem_depth: residual convolutions in each stage but the first. What the second stage gives is at
            `ctx.shared["{name}.stem"]` for mixins that look at it.
        cls_token: whether there is a cls token.
        bias: whether the patch convolution has one.
        drop_cls: leave the cls token out of what comes out.
        crop: leave out what lies beyond the last whole patch, where image_size is no multiple of patch_size (only
            without a stem).

    Raises:
        ValueError: sizes that do not divide.
    """

    inputs: tuple[str, ...] = ("images",)
    whole_sequence = True

    def __init__(
        self, image_size: int, patch_size: int, in_channels: int = 3, stem_channels: list[int] | None = None,
        stem_depth: int = 0, cls_token: bool = True, bias: bool = True, drop_cls: bool = True, crop: bool = False,
    ) -> None:
        super().__init__()
        self.stem_channels = list(stem_channels or [])
        if image_size % patch_size and (self.stem_channels or not crop):
            raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}.")
        if patch_size % 2 ** len(self.stem_channels):
            raise ValueError(f"patch_size {patch_size} cannot be halved {len(self.stem_channels)} times by the stem.")
        self.image_size, self.patch_size, self.in_channels = image_size, patch_size, in_channels
        self.stem_depth, self.cls_token, self.bias, self.drop_cls = stem_depth, cls_token, bias, drop_cls and cls_token

    def build(self, model: Any) -> None:
        size = model.config.hidden_size
        widths = [self.in_channels, *self.stem_channels]
        stem = [StemStage(a, b, self.stem_depth if i else 0) for i, (a, b) in enumerate(pairwise(widths))]
        self.stem = nn.ModuleList(stem)
        side = self.patch_size // 2 ** len(stem)
        self.conv = nn.Conv2d(widths[-1], size, side, side, bias=self.bias)
        self.cls = nn.Parameter(normal(size, std=model.config.init_std)) if self.cls_token else None

    def plan(self, ctx: Context) -> None:
        images = ctx.require("images")
        expected = (self.in_channels, self.image_size, self.image_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images must be [m, {', '.join(map(str, expected))}] for this tower; got {tuple(images.shape)}."
            )

    @replace
    def word_embedding_forward(self, input_ids: None, ctx: Context) -> torch.Tensor:
        x = ctx.require("images").to(self.conv.weight.dtype)
        if self.stem:
            x = x.contiguous(memory_format=torch.channels_last)
        for index, stage in enumerate(self.stem):
            x = stage(x)
            if index == 1:
                ctx.shared[f"{self.name}.stem"] = x
        patches = self.conv(x).flatten(2).transpose(1, 2)
        return patches if self.cls is None else torch.cat([self.cls.expand(len(patches), 1, -1), patches], dim=1)

    @replace
    def final_forward(self, hidden_states: torch.Tensor, ctx: Context) -> torch.Tensor:
        return hidden_states[:, 1:] if self.drop_cls else hidden_states
