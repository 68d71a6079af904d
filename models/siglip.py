"""SigLIP's vision tower (arXiv:2303.15343), which Idefics2 and others look through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mixformer.config import VisionTowerConfig
from mixformer.mixins import AttentionPoolHeadMixin, PoolHeadMixin
from mixformer.objectives import ClassificationObjective, Objective, Trained
from models.vit import VisionTower


@dataclass
class SigLIPConfig(VisionTowerConfig):
    """The tower of SigLIP-SO400M/14 at 384 (27 x 27 whole patches, the last six pixels are left out).

    Attributes:
        output: `patches`; or `pooled` by attention [m, h]; or `logits` of the classes [m, num_classes], from the mean.
        num_classes: rows of the class head.
    """

    outputs: ClassVar[tuple[str, ...]] = ("patches", "pooled", "logits")

    hidden_size: int = 1152
    num_layers: int = 27
    num_heads: int = 16
    inner_hidden_size: int | None = 4304
    activation: str = "gelu_tanh"
    final_norm: bool = True
    cls_token: bool = False
    image_size: int = 384
    crop: bool = True
    num_classes: int = 1000

    @property
    def feature_size(self) -> int:
        """c: the number of classes, or h."""
        return self.num_classes if self.output == "logits" else self.hidden_size


class SigLIP(VisionTower):
    """Pre-norm blocks over patches alone and a final norm; `pooled` has the attention pooling on top."""

    Config = SigLIPConfig
    config: SigLIPConfig
    objective: ClassVar[Objective | None] = ClassificationObjective()
    stages: ClassVar[dict[str, Trained]] = {"train": Trained(["*"])}

    def compose(self) -> None:
        super().compose()
        if self.config.output == "pooled":
            self.add_mixin("head", AttentionPoolHeadMixin())
        elif self.config.output == "logits":
            self.add_mixin("head", PoolHeadMixin("mean", size=self.config.num_classes))


if __name__ == "__main__":
    from mixformer.cli import main

    main("models.siglip:SigLIP")
