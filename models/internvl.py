"""InternVL-Chat 1.5 (arXiv:2404.16821): tiles of a picture through InternViT, four patches a token, into InternLM2."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mixformer.connectors import ProjectorConfig
from mixformer.objectives import Trained
from models.intern_vit import InternViTConfig
from models.llava import LLaVA, SpliceConfig


@dataclass
class InternVLConfig(SpliceConfig):
    """InternVL-Chat 1.5 (26B) by default, with InternLM2-20B. Each tile is an image of its own.

    The release stretches rotary positions beyond `max_positions`; `rope_scaling` has that.
    """

    vocab_size: int = 92553
    hidden_size: int = 6144
    num_layers: int = 48
    num_heads: int = 48
    num_kv_heads: int | None = 8
    inner_hidden_size: int | None = 16384
    max_positions: int = 32768
    rope_base: float = 1000000.0
    vision: InternViTConfig = field(default_factory=InternViTConfig)
    adapter: ProjectorConfig = field(default_factory=lambda: ProjectorConfig(depth=2, norm="pre", merge=2))
    image_token_id: int | None = 92546


class InternVL(LLaVA):
    """LLaVA with InternViT and merged patches; `adapt` is for tuning it further."""

    Config = InternVLConfig
    stages: ClassVar[dict[str, Trained]] = {
        "pretrain": Trained(["mixins.image.*"]),
        "tune": Trained(["*"]),
        "adapt": LLaVA.stages["tune"],
    }


if __name__ == "__main__":
    from mixformer.cli import main

    main("models.internvl:InternVL")
