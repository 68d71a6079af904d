"""ViT (arXiv:2010.11929) at its three sizes, and what all vision towers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mixformer import BaseModel, TransformerConfig
from mixformer.config import VisionTowerConfig
from mixformer.mixins import PatchEmbeddingMixin, PoolHeadMixin, StoredNormMixin
from mixformer.objectives import ClassificationObjective, Objective, Trained


class VisionTower(BaseModel):
    """Patches with learned positions in, features [m, N, c] out; subclasses that pool give [m, c].

    What is stored and does not run (later layers, a norm that the features leave out) is frozen.
    """

    Config: ClassVar[type[TransformerConfig]] = VisionTowerConfig
    config: VisionTowerConfig

    def compose(self) -> None:
        config = self.config
        sizes = config.image_size, config.patch_size, config.in_channels, config.stem_channels, config.stem_depth
        options = config.cls_token, config.patch_bias, config.output == "patches", config.crop
        self.add_mixin("patches", PatchEmbeddingMixin(*sizes, *options))
        if config.final_norm and not config.output_norm and config.output in VisionTowerConfig.outputs:
            self.add_mixin("stored_norm", StoredNormMixin())
            self.transformer.final_norm.requires_grad_(False)  # type: ignore[union-attr]
        self.transformer.layers[config.layers_run :].requires_grad_(False)


@dataclass
class ViTConfig(VisionTowerConfig):
    """ViT-B/16 at 224, as it was fine-tuned on ImageNet.

    Attributes:
        output: also `cls`, the cls token [m, h], or `logits` of the classes [m, num_classes].
        num_classes: rows of the class head.
    """

    outputs: ClassVar[tuple[str, ...]] = ("patches", "tokens", "cls", "logits")

    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    norm_eps: float = 1e-12
    final_norm: bool = True
    patch_size: int = 16
    output: str = "logits"
    num_classes: int = 1000

    @property
    def feature_size(self) -> int:
        """c: the number of classes, or h."""
        return self.num_classes if self.output == "logits" else self.hidden_size


class ViT(VisionTower):
    """Pre-norm blocks over patches and a cls token, and a linear class head on the latter."""

    Config = ViTConfig
    config: ViTConfig
    objective: ClassVar[Objective | None] = ClassificationObjective()
    stages: ClassVar[dict[str, Trained]] = {"train": Trained(["*"])}

    def compose(self) -> None:
        super().compose()
        if self.config.output in ("cls", "logits"):
            size = self.config.num_classes if self.config.output == "logits" else None
            self.add_mixin("head", PoolHeadMixin("cls", size=size))


if __name__ == "__main__":
    from mixformer.cli import main

    main("models.vit:ViT")
