"""Residual stages of convolutions (arXiv:1512.03385), as published or with the strides of v1.5."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from mixformer.mixins.conv_stem import Convolution, ConvStemMixin


class FreezableBatchNorm(nn.BatchNorm2d):
    """Batch norm that leaves its running statistics as they are, and uses them, while its weight is frozen."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and not self.weight.requires_grad:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class NormedConvolution(nn.Module):
    """A convolution and its batch norm; arguments as of `Convolution`."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = Convolution(in_channels, out_channels, kernel_size, stride)
        self.norm = FreezableBatchNorm(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x))
        return x


class ResidualBlock(nn.Module):
    """[m, in, y, x] -> [m, out, y / stride, x / stride]: relu(shortcut(x) + branch(x)).

    Args:
        in_channels: channels that come in.
        out_channels: channels that go out.
        stride: step of the block.
        bottleneck: 1x1, 3x3 and 1x1 convolutions, a quarter as wide inside, instead of two 3x3 ones.
        early: the stride is on the bottleneck's first convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, bottleneck: bool, early: bool) -> None:
        super().__init__()
        kernels, widths, strides = [3, 3], [in_channels, out_channels, out_channels], [stride, 1]
        if bottleneck:
            inner = out_channels // 4
            kernels, widths = [1, 3, 1], [in_channels, inner, inner, out_channels]
            strides = [stride, 1, 1] if early else [1, stride, 1]
        sizes = zip(pairwise(widths), kernels, strides, strict=True)
        self.branch = nn.ModuleList(self.convolution(*ends, kernel, step) for ends, kernel, step in sizes)
        changes = stride > 1 or in_channels != out_channels
        self.shortcut = self.convolution(in_channels, out_channels, 1, stride) if changes else None

    @staticmethod
    def convolution(in_channels: int, out_channels: int, kernel_size: int, stride: int) -> nn.Module:
        """One convolution of the network, with what norms it."""
        return NormedConvolution(in_channels, out_channels, kernel_size, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for index, convolution in enumerate(self.branch):
            y = convolution(F.relu(y) if index else y)
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNetMixin(ConvStemMixin):
    """Features of the last stage: a 7x7 convolution, 3x3 pooling, stages of blocks, each but the first half the size.

    Args:
        image_size: side of the pictures.
        channels: of the first convolution, and of each stage.
        depths: blocks of each stage.
        bottleneck: kind of the blocks (see `ResidualBlock`).
        early: the original network's place of the stride.
        in_channels: colour channels.

    Attributes:
        block: class of the blocks.

    Raises:
        ValueError: not one depth for each stage, or channels that a bottleneck cannot divide by four.
    """

    block: ClassVar[type[ResidualBlock]] = ResidualBlock

    def __init__(
        self, image_size: int, channels: list[int], depths: list[int], bottleneck: bool = True, early: bool = False,
        in_channels: int = 3,
    ) -> None:
        super().__init__(image_size, in_channels)
        if len(channels) != len(depths) + 1 or min(depths, default=0) < 1:
            raise ValueError(f"Stages of {channels[1:]} channels need one depth each, 1 or more; got {depths}.")
        if bottleneck and any(width % 4 for width in channels[1:]):
            raise ValueError(f"Bottlenecks are a quarter as wide as their stage, so 4 must divide {channels[1:]}.")
        self.channels, self.depths, self.bottleneck, self.early = list(channels), list(depths), bottleneck, early

    def build(self, model: Any) -> None:
        self.stem = self.block.convolution(self.in_channels, self.channels[0], 7, 2)
        self.stages = nn.ModuleList()
        for index, (before, after) in enumerate(pairwise(self.channels)):
            kind = self.bottleneck, self.early
            first, later = (before, after, 2 if index else 1, *kind), (after, after, 1, *kind)
            blocks = self.make_stage(index, [first, *[later] * (self.depths[index] - 1)])
            self.stages.append(nn.ModuleList(blocks))

    def make_stage(self, index: int, sizes: list[tuple[int, int, int, bool, bool]]) -> list[ResidualBlock]:
        """The blocks of the stage of that index, from their arguments."""
        return [self.block(*each) for each in sizes]

    def feature_map(self, images: torch.Tensor) -> torch.Tensor:
        """[m, in_channels, image_size, image_size] -> [m, channels, y, x] after the last stage."""
        return self.run_stages(F.relu(self.stem(images)))

    def run_stages(self, x: torch.Tensor) -> torch.Tensor:
        """Pooling and the stages, [m, c, y, x] -> [m, channels, y / 2, x / 2] and less."""
        x = F.max_pool2d(x, 3, 2, 1)
        for stage in self.stages:
            for block in stage:  # type: ignore[attr-defined]
                x = block(x)
        return x
