"""MobileVLM V2 (arXiv:2402.03766): MobileVLM with a lighter projector and a language model trained from the start."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mixformer.connectors import LDPv2Config
from mixformer.objectives import Trained
from models.llava import LLaVA
from models.mobilevlm import MobileLLaMAConfig


@dataclass
class MobileVLMV2Config(MobileLLaMAConfig):
    """MobileVLM V2 1.7B by default."""

    adapter: LDPv2Config = field(default_factory=LDPv2Config)


class MobileVLMV2(LLaVA):
    """LLaVA with LDPv2 between MobileLLaMA and CLIP; CLIP stays frozen in both stages, nothing else does."""

    Config = MobileVLMV2Config
    stages: ClassVar[dict[str, Trained]] = {"pretrain": LLaVA.stages["tune"], "tune": LLaVA.stages["tune"]}


if __name__ == "__main__":
    from mixformer.cli import main

    main("models.mobilevlm_v2:MobileVLMV2")
