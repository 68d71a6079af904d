"""SimVLM (arXiv:2108.10904) as one decoder: pictures and the start of the text are read whole, the rest is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mixformer import BaseModel, TransformerConfig
from mixformer.connectors import ProjectorConfig
from mixformer.mixins import ImageMixin, ImagePositionsMixin, ImageRelativeBiasMixin, PrefixMaskMixin
from mixformer.objectives import LanguageObjective, Objective, Trained
from models.resnet import ResNetConfig


def first_stages() -> ResNetConfig:
    """The first three stages of ResNet-101."""
    return ResNetConfig(channels=[64, 256, 512, 1024], depths=[3, 4, 23], output="patches")


@dataclass
class SimVLMConfig(TransformerConfig):
    """SimVLM-base by default: the sizes of ViT-B over the first three stages of ResNet-101.

    Attributes:
        max_positions: of the text; pictures have their own.
        vision: the convolutions.
        adapter: the projector.
        image_token_id: id that stands at image tokens; None where `token_type_ids` alone tell them.
    """

    vocab_size: int = 32000
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    norm_eps: float = 1e-6
    positions: str = "learned"
    max_positions: int = 512
    vision: ResNetConfig = field(default_factory=first_stages)
    adapter: ProjectorConfig = field(default_factory=ProjectorConfig)
    image_token_id: int | None = None


class SimVLM(BaseModel):
    """A pre-norm decoder that sees the prefix of each row, `prefix_lengths` [b] tokens with the pictures, whole.

    The paper's experiments split the same objective over an encoder and a decoder.
    """

    Config = SimVLMConfig
    config: SimVLMConfig
    objective: ClassVar[Objective | None] = LanguageObjective()
    stages: ClassVar[dict[str, Trained]] = {"pretrain": Trained(["*"])}

    def compose(self) -> None:
        config = self.config
        self.add_mixin("image", ImageMixin(config.vision, config.adapter, False, "none", config.image_token_id))
        self.add_mixin("positions", ImagePositionsMixin(config.vision.num_features))
        self.add_mixin("relative", ImageRelativeBiasMixin(config.vision.grid))
        self.add_mixin("prefix", PrefixMaskMixin("given"))


if __name__ == "__main__":
    from mixformer.cli import main

    main("models.simvlm:SimVLM")
