"""Convolutions instead of patches: what makes a convolutional network of a backbone without layers."""

from __future__ import annotations

import torch
import torch.nn as nn

from mixformer.context import Context
from mixformer.hooks import replace
from mixformer.mixin import BaseMixin


class Convolution(nn.Conv2d):
    """A convolution without a bias that keeps the size but for its stride, drawn as in arXiv:1502.01852.

    Args:
        in_channels: channels that come in.
        out_channels: channels that go out.
        kernel_size: side of the kernel, odd.
        stride: step.
        bias: whether it has one.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, bias: bool = False
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=bias)

    def reset_parameters(self) -> None:
        """Normal weights that keep the variance of gradients, zero bias."""
        if self.weight.is_meta:
            return
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class ConvStemMixin(BaseMixin):
    """Turn pictures into a map of features, whose places, row by row, are the tokens; subclasses say how.

    A network that takes one channel makes colour pictures grey: the mean of their channels.

    Args:
        image_size: pictures are image_size x image_size.
        in_channels: channels that the network takes.
    """

    inputs = ("images",)

    def __init__(self, image_size: int, in_channels: int = 3) -> None:
        super().__init__()
        self.image_size, self.in_channels = image_size, in_channels

    def plan(self, ctx: Context) -> None:
        images, size = ctx.require("images"), self.image_size
        known = {self.in_channels, 3} if self.in_channels == 1 else {self.in_channels}
        if images.dim() != 4 or images.shape[1] not in known or tuple(images.shape[2:]) != (size, size):
            channels = " or ".join(map(str, sorted(known)))
            raise ValueError(
                f"images must be [m, {channels}, {size}, {size}] for this network; got {tuple(images.shape)}."
            )

    def feature_map(self, images: torch.Tensor) -> torch.Tensor:
        """[m, in_channels, image_size, image_size] -> [m, c, y, x].

        Raises:
            TypeError: a stem that makes none.
        """
        raise TypeError(f"{type(self).__name__} must define feature_map(images).")

    @replace
    def word_embedding_forward(self, input_ids: None, ctx: Context) -> torch.Tensor:
        images = ctx.require("images")
        images = images.to(next(self.parameters(), images).dtype)
        if images.shape[1] != self.in_channels:
            images = images.mean(1, keepdim=True)
        return self.feature_map(images).flatten(2).transpose(1, 2)
