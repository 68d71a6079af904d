"""LLaVA (arXiv:2304.08485) and LLaVA-1.5 (arXiv:2310.03744): CLIP patches, projected, among the tokens of LLaMA."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mixformer.config import VisionTowerConfig
from mixformer.connectors import ConnectorConfig, ProjectorConfig
from mixformer.mixins import ImageMixin
from mixformer.objectives import Trained
from models.clip import CLIPVisionConfig
from models.llama import LLaMA, LLaMAConfig


def clip_large(image_size: int = 336) -> CLIPVisionConfig:
    """CLIP's L/14 tower as language models read it: the patches of the last layer but one."""
    return CLIPVisionConfig(
        hidden_size=1024, num_layers=24, num_layers_run=23, num_heads=16, inner_hidden_size=4096,
        image_size=image_size, patch_size=14, projection_size=768,
    )


@dataclass
class SpliceConfig(LLaMAConfig):
    """LLaMA with pictures among its tokens.

    Attributes:
        vision: the tower.
        adapter: the connector; each picture takes as many tokens as come out of it.
        image_token_id: id that stands at those tokens; None where `token_type_ids` alone tell them.
    """

    vision: VisionTowerConfig = field(default_factory=clip_large)
    adapter: ConnectorConfig = field(default_factory=ProjectorConfig)
    image_token_id: int | None = None


@dataclass
class LLaVAConfig(SpliceConfig):
    """LLaVA-1.5-7B by default; v1 has `adapter.depth: 1` and `vision.image_size: 224`."""

    vocab_size: int = 32064
    vision: CLIPVisionConfig = field(default_factory=clip_large)
    adapter: ProjectorConfig = field(default_factory=lambda: ProjectorConfig(depth=2))
    image_token_id: int | None = 32000


class LLaVA(LLaMA):
    """LLaMA + ImageMixin, whose features count as tokens like any others."""

    Config: ClassVar[type[SpliceConfig]] = LLaVAConfig
    config: SpliceConfig
    stages: ClassVar[dict[str, Trained]] = {
        "align": Trained(["mixins.image.projector.*"]),
        "tune": Trained(["*"], ["mixins.image.tower.*"]),
    }

    def compose(self) -> None:
        super().compose()
        config = self.config
        image = ImageMixin(config.vision, config.adapter, False, "counted", config.image_token_id)
        self.add_mixin("image", image)


if __name__ == "__main__":
    from mixformer.cli import main

    main("models.llava:LLaVA")
