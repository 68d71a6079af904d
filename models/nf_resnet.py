"""NF-ResNet (arXiv:2101.08692): ResNet whose convolutions keep the variance, so that it needs no norms."""

from __future__ import annotations

from dataclasses import dataclass

from mixformer.mixins import NFResNetMixin
from models.resnet import ResNet, ResNetConfig


@dataclass
class NFResNetConfig(ResNetConfig):
    """NF-ResNet-50 by default; options as of `ResNetConfig`."""


class NFResNet(ResNet):
    """ResNet without batch norm: no picture sees another one, and no statistics are kept."""

    Config = NFResNetConfig
    stem = NFResNetMixin


if __name__ == "__main__":
    from mixformer.cli import main

    main("models.nf_resnet:NFResNet")
