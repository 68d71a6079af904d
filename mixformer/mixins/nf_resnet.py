"""Residual stages without norms: NF-ResNet (arXiv:2101.08692)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from mixformer.mixins.conv_stem import Convolution
from mixformer.mixins.resnet import ResidualBlock, ResNetMixin

RELU_GAIN = math.sqrt(2 / (1 - 1 / math.pi))
"""Brings relu of unit normal numbers back to unit variance (section 4.2)."""


def scaled_relu(x: torch.Tensor) -> torch.Tensor:
    """relu that keeps the variance of unit normal numbers."""
    return F.relu(x) * RELU_GAIN


class ScaledConvolution(Convolution):
    """A convolution with scaled weight standardisation (section 4.3); its gain and bias are those of each channel.

    Args:
        in_channels: channels that come in.
        out_channels: channels that go out.
        kernel_size: side of the kernel, odd.
        stride: step.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, bias=True)
        self.gain = nn.Parameter(torch.ones(out_channels, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        variance, mean = torch.var_mean(weight, dim=(1, 2, 3), correction=0, keepdim=True)
        scale = self.gain * torch.rsqrt((variance * weight[0].numel()).clamp(min=1e-4))
        return F.conv2d(x, (weight - mean) * scale, self.bias, self.stride, self.padding)


class NFResidualBlock(ResidualBlock):
    """shortcut + alpha * branch(relu(x) / deviation), relu before each convolution and none after the sum.

    Args:
        alpha: how much variance the block adds (its square).
        deviation: standard deviation of what comes in, as the scheme predicts it.
        *sizes: as of `ResidualBlock`.
    """

    def __init__(self, alpha: float, deviation: float, *sizes: Any) -> None:
        super().__init__(*sizes)
        self.alpha, self.deviation = alpha, deviation

    @staticmethod
    def convolution(in_channels: int, out_channels: int, kernel_size: int, stride: int) -> nn.Module:
        """One convolution of the network."""
        return ScaledConvolution(in_channels, out_channels, kernel_size, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        start = y = scaled_relu(x) / self.deviation
        for index, convolution in enumerate(self.branch):
            y = convolution(scaled_relu(y) if index else y)
        return (x if self.shortcut is None else self.shortcut(start)) + self.alpha * y


class NFResNetMixin(ResNetMixin):
    """As `ResNetMixin`, with convolutions that keep the variance instead of batch norm; no statistics are kept.

    Args:
        image_size, channels, depths, bottleneck, early, in_channels: as of `ResNetMixin`.
        alpha: weight of what each block adds.
    """

    block = NFResidualBlock

    def __init__(
        self, image_size: int, channels: list[int], depths: list[int], bottleneck: bool = True, early: bool = False,
        in_channels: int = 3, alpha: float = 0.2,
    ) -> None:
        super().__init__(image_size, channels, depths, bottleneck, early, in_channels)
        self.alpha = alpha

    def make_stage(self, index: int, sizes: list[tuple[int, int, int, bool, bool]]) -> list[ResidualBlock]:
        """The blocks of the stage of that index, from their arguments.

        Each block adds alpha**2 to the variance, and the shortcut of a stage's first one brings it back to one.
        """
        before = [self.depths[index - 1] if index else 0, *range(1, len(sizes))]
        deviations = [math.sqrt(1 + num_blocks * self.alpha**2) for num_blocks in before]
        return [NFResidualBlock(self.alpha, *each) for each in zip(deviations, *zip(*sizes, strict=True), strict=True)]

    def feature_map(self, images: torch.Tensor) -> torch.Tensor:
        """[m, in_channels, image_size, image_size] -> [m, channels, y, x] after the last stage."""
        return scaled_relu(self.run_stages(self.stem(images)))
