"""CogVLM (arXiv:2311.03079) and CogVLM2: LLaMA, pictures in the sequence, and visual experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mixformer.connectors.glu import GLUAdapterConfig
from mixformer.mixins import ImageMixin, VisionExpertAttentionMixin, VisionExpertFCMixin
from mixformer.objectives import Trained
from models.eva2_clip import EVA2CLIPEConfig
from models.llama import LLaMA, LLaMAConfig

EXPERTS = ["*.mixins.vision_expert*"]
ADAPTER = ["mixins.image.projector.*", "mixins.image.boi", "mixins.image.eoi"]


@dataclass
class CogVLMConfig(LLaMAConfig):
    """CogVLM-17B at 224 by default; `vision.image_size: 490` for the larger one.

    Attributes:
        vision: the tower.
        adapter: the projector; CogVLM2 has `downsample: 2`.
        expert_layers: layers with visual experts; None for all.
        expert_qkv_bias: CogVLM2's experts have one.
    """

    norm_cast: str = "last"
    rope_tables: str = "released"
    max_positions: int = 2048
    vision: EVA2CLIPEConfig = field(default_factory=EVA2CLIPEConfig)
    adapter: GLUAdapterConfig = field(default_factory=GLUAdapterConfig)
    expert_layers: list[int] | None = None
    expert_qkv_bias: bool = False


class CogVLM(LLaMA):
    """LLaMA + ImageMixin + visual experts in attention and MLP.

    Stages: `align` trains the adapter alone (an ablation of the paper), `pretrain` the experts as well (stages 1 and 2,
    section 2.2), `tune` also the tower, which the paper gives a tenth of the rate. The language model stays as it is.
    """

    Config = CogVLMConfig
    config: CogVLMConfig
    stages: ClassVar[dict[str, Trained]] = {
        "align": Trained(ADAPTER),
        "pretrain": Trained([*EXPERTS, *ADAPTER]),
        "tune": Trained([*EXPERTS, *ADAPTER, "mixins.image.tower.*"]),
    }

    def compose(self) -> None:
        super().compose()
        config = self.config
        self.add_mixin("image", ImageMixin(config.vision, config.adapter))
        layers = config.expert_layers
        self.add_mixin("vision_expert", VisionExpertAttentionMixin(config.expert_qkv_bias), layers=layers)
        self.add_mixin("vision_expert_mlp", VisionExpertFCMixin(), layers=layers)


if __name__ == "__main__":
    from mixformer.cli import main

    main("models.cogvlm:CogVLM")
