"""Qwen-VL (arXiv:2308.12966): a large ViT, 256 queries that look at it, and Qwen-7B."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mixformer.config import VisionTowerConfig
from mixformer.connectors import AttentionPoolerConfig
from mixformer.mixins import ResizedPositionsMixin
from mixformer.objectives import Trained
from models.llava import LLaVA, SpliceConfig
from models.vit import VisionTower


@dataclass
class QwenVisionConfig(VisionTowerConfig):
    """OpenCLIP's bigG/14 without its cls token, at 448; the first stage of training has `image_size: 224`.

    Attributes:
        position_grid: side of the stored grid of positions, which is resized to the patches: weights of one image
            size fit any other.
    """

    hidden_size: int = 1664
    num_layers: int = 48
    num_heads: int = 16
    inner_hidden_size: int | None = 8192
    embedding_norm: bool = True
    positions: str = "none"
    cls_token: bool = False
    patch_bias: bool = False
    image_size: int = 448
    position_grid: int = 16


class QwenVision(VisionTower):
    """Pre-norm blocks over patches, with a norm before the first and none after the last."""

    Config = QwenVisionConfig
    config: QwenVisionConfig

    def compose(self) -> None:
        super().compose()
        self.add_mixin("positions", ResizedPositionsMixin(self.config.position_grid))


@dataclass
class QwenVLConfig(SpliceConfig):
    """Qwen-VL (9.6B) by default. Its language model was trained on 2048 tokens; what releases do beyond is left out."""

    vocab_size: int = 151936
    norm_eps: float = 1e-6
    bias: str = "qkv"
    max_positions: int = 2048
    vision: QwenVisionConfig = field(default_factory=QwenVisionConfig)
    adapter: AttentionPoolerConfig = field(default_factory=AttentionPoolerConfig)
    image_token_id: int | None = 151859


class QwenVL(LLaVA):
    """LLaVA with an attention pooler, trained in three stages."""

    Config = QwenVLConfig
    stages: ClassVar[dict[str, Trained]] = {
        "pretrain": Trained(["mixins.image.*"]),
        "multitask": Trained(["*"]),
        "tune": LLaVA.stages["tune"],
    }


if __name__ == "__main__":
    from mixformer.cli import main

    main("models.qwen_vl:QwenVL")
