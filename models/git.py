"""GIT (arXiv:2205.14100): CLIP's tokens in front of a text decoder that reads them whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mixformer import BaseModel, TransformerConfig
from mixformer.connectors import ProjectorConfig
from mixformer.mixins import FrameEmbeddingMixin, ImageBesideMixin, LMHeadMixin, PrefixMaskMixin
from mixformer.objectives import LanguageObjective, Trained
from models.clip import CLIPVision, CLIPVisionConfig


@dataclass
class GITVisionConfig(CLIPVisionConfig):
    """The tower of CLIP ViT-B/16, all tokens normed; the `num_frames` of a video have a learned vector each."""

    patch_size: int = 16
    output: str = "tokens"
    output_norm: bool = True
    num_frames: int | None = None


class GITVision(CLIPVision):
    """CLIP's tower; frames of a video know their place in it."""

    Config = GITVisionConfig
    config: GITVisionConfig

    def compose(self) -> None:
        super().compose()
        if self.config.num_frames is not None:
            self.add_mixin("frames", FrameEmbeddingMixin(self.config.num_frames))


@dataclass
class GITConfig(TransformerConfig):
    """GIT-base by default.

    Attributes:
        vision, adapter: the tower and the projector.
        image_token_id: id that stands at image tokens; None where `token_type_ids` alone tell them.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_layers: int = 6
    num_heads: int = 12
    norm_eps: float = 1e-12
    norm_order: str = "post"
    final_norm: bool = False
    embedding_norm: bool = True
    positions: str = "learned"
    max_positions: int = 1024
    vision: GITVisionConfig = field(default_factory=GITVisionConfig)
    adapter: ProjectorConfig = field(default_factory=lambda: ProjectorConfig(norm="post"))
    image_token_id: int | None = None


class GIT(BaseModel):
    """A post-norm decoder; pictures join it behind the embedding norm and attend to pictures alone."""

    Config = GITConfig
    config: GITConfig
    objective = LanguageObjective(smoothing=0.1)
    stages: ClassVar[dict[str, Trained]] = {"pretrain": Trained(["*"])}

    def compose(self) -> None:
        config = self.config
        self.add_mixin("image", ImageBesideMixin(config.vision, config.adapter, config.image_token_id))
        self.add_mixin("prefix", PrefixMaskMixin("images"))
        self.add_mixin("head", LMHeadMixin(bias=True))


if __name__ == "__main__":
    from mixformer.cli import main

    main("models.git:GIT")
