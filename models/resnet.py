"""ResNet (arXiv:1512.03385): convolutional stages, as a classifier or as a tower."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mixformer import BaseModel, TransformerConfig
from mixformer.config import VisionTowerConfig
from mixformer.mixins import PoolHeadMixin, ResNetMixin
from mixformer.objectives import ClassificationObjective, Objective, Trained


@dataclass
class ResNetConfig(VisionTowerConfig):
    """ResNet-50 v1.5 by default. A tower may have fewer stages; the last one is what comes out.

    Attributes:
        output: `patches` [m, N, c], the places of the last stage; `pooled` [m, c], their mean; or `logits` of classes.
        num_classes: rows of the class head.
        channels: of the first convolution, and of each stage.
        depths: blocks of each stage.
        bottleneck: blocks of 1x1, 3x3 and 1x1 convolutions instead of two 3x3 ones (ResNet-18 and -34).
        downsample_in_bottleneck: the stride is on the first convolution, as published, not on the second (v1.5).
    """

    outputs: ClassVar[tuple[str, ...]] = ("patches", "pooled", "logits")

    num_layers: int = 0
    num_heads: int = 1
    positions: str = "none"
    output: str = "logits"
    num_classes: int = 1000
    channels: list[int] = field(default_factory=lambda: [64, 256, 512, 1024, 2048])
    depths: list[int] = field(default_factory=lambda: [3, 4, 6, 3])
    bottleneck: bool = True
    downsample_in_bottleneck: bool = False
    # what the stages decide, and what only towers of patches have
    hidden_size: int = field(default=0, init=False)
    patch_size: int = field(default=0, init=False)
    cls_token: bool = field(default=False, init=False)
    patch_bias: bool = field(default=False, init=False)
    crop: bool = field(default=False, init=False)
    output_norm: bool = field(default=False, init=False)
    stem_channels: list[int] = field(default_factory=list, init=False)
    stem_depth: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.hidden_size, self.patch_size = (self.channels or [0])[-1], 2 ** len(self.channels)
        super().__post_init__()

    @property
    def feature_size(self) -> int:
        """c: the number of classes, or the channels of the last stage."""
        return self.num_classes if self.output == "logits" else self.hidden_size


class ResNet(BaseModel):
    """Convolutional stages, and the mean of their features under a linear class head."""

    Config: ClassVar[type[TransformerConfig]] = ResNetConfig
    config: ResNetConfig
    objective: ClassVar[Objective | None] = ClassificationObjective()
    stages: ClassVar[dict[str, Trained]] = {"train": Trained(["*"])}
    stem: ClassVar[type[ResNetMixin]] = ResNetMixin

    def compose(self) -> None:
        config = self.config
        sizes = (config.image_size, config.channels, config.depths, config.bottleneck)
        self.add_mixin("stem", self.stem(*sizes, config.downsample_in_bottleneck, config.in_channels))
        if config.output != "patches":
            size = config.num_classes if config.output == "logits" else None
            self.add_mixin("head", PoolHeadMixin("mean", size=size))


if __name__ == "__main__":
    from mixformer.cli import main

    main("models.resnet:ResNet")
