"""MobileVLM (arXiv:2312.16886): a small LLaVA whose projector leaves a quarter of the patches."""

from __future__ import annotations

from dataclasses import dataclass, field

from mixformer.connectors import LDPConfig
from models.clip import CLIPVisionConfig
from models.llava import LLaVA, SpliceConfig, clip_large


@dataclass
class MobileLLaMAConfig(SpliceConfig):
    """What both versions have: MobileLLaMA-1.4B and CLIP L/14-336 by default."""

    hidden_size: int = 2048
    num_layers: int = 24
    num_heads: int = 16
    inner_hidden_size: int | None = 5632
    norm_eps: float = 1e-6
    max_positions: int = 2048
    vision: CLIPVisionConfig = field(default_factory=clip_large)


@dataclass
class MobileVLMConfig(MobileLLaMAConfig):
    """MobileVLM-1.7B by default."""

    adapter: LDPConfig = field(default_factory=LDPConfig)


class MobileVLM(LLaVA):
    """LLaVA with LDP between MobileLLaMA and CLIP, trained as LLaVA is."""

    Config = MobileVLMConfig


if __name__ == "__main__":
    from mixformer.cli import main

    main("models.mobilevlm:MobileVLM")
