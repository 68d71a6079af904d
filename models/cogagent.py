"""CogAgent (arXiv:2312.08914): CogVLM at 224 and a high-resolution cross encoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mixformer.connectors.glu import GLUAdapterConfig
from mixformer.mixins import CrossAttentionMixin
from mixformer.objectives import Trained
from models.cogvlm import EXPERTS, CogVLM, CogVLMConfig
from models.eva2_clip import EVA2CLIPLConfig

CROSS = ["mixins.cross.*", "*.mixins.cross.*"]


@dataclass
class CogAgentConfig(CogVLMConfig):
    """CogAgent-18B by default.

    Attributes:
        cross_vision: the high-resolution tower.
        cross_compute_size: width of the cross attention; None for the tower's.
        cross_layers: layers with cross attention; None for all.
    """

    adapter: GLUAdapterConfig = field(default_factory=lambda: GLUAdapterConfig(position_table=True))
    cross_vision: EVA2CLIPLConfig = field(default_factory=EVA2CLIPLConfig)
    cross_compute_size: int | None = None
    cross_layers: list[int] | None = None


class CogAgent(CogVLM):
    """CogVLM + CrossAttentionMixin.

    Stages (section 2.3): `cross` trains what CogAgent adds to CogVLM, `joint` the visual experts as well, `tune` all.
    """

    Config = CogAgentConfig
    config: CogAgentConfig
    stages: ClassVar[dict[str, Trained]] = {
        "cross": Trained(CROSS), "joint": Trained([*CROSS, *EXPERTS]), "tune": Trained(["*"]),
    }

    def compose(self) -> None:
        super().compose()
        cross = CrossAttentionMixin(self.config.cross_vision, self.config.cross_compute_size)
        self.add_mixin("cross", cross, layers=self.config.cross_layers)


if __name__ == "__main__":
    from mixformer.cli import main

    main("models.cogagent:CogAgent")
