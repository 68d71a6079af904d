"""Idefics2 (arXiv:2405.02246): SigLIP at the pictures' own size, 64 latents a picture, and Mistral."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mixformer.connectors import PerceiverResamplerConfig, ProjectorConfig
from mixformer.mixins import NativePatchesMixin
from mixformer.objectives import Trained
from models.llava import LLaVA, SpliceConfig
from models.siglip import SigLIPConfig
from models.vit import VisionTower


@dataclass
class Idefics2VisionConfig(SigLIPConfig):
    """SigLIP-SO400M/14 with a table of positions for 980 x 980; pictures may have any size."""

    outputs: ClassVar[tuple[str, ...]] = ("patches",)

    image_size: int = 980
    crop: bool = False


class Idefics2Vision(VisionTower):
    """SigLIP's blocks and final norm over the patches of pictures of any size, those of padding masked."""

    Config = Idefics2VisionConfig
    config: Idefics2VisionConfig

    def compose(self) -> None:
        config = self.config
        patches = NativePatchesMixin(config.image_size, config.patch_size, config.in_channels, config.patch_bias)
        self.add_mixin("patches", patches)


def _resampler() -> PerceiverResamplerConfig:
    projector = ProjectorConfig(depth=2, gated=True, activation="silu", bias=False)
    return PerceiverResamplerConfig(
        num_latents=64, depth=3, num_heads=16, head_size=96, num_kv_heads=4, norm="rmsnorm",
        activation="silu", gated=True, input_projector=projector,
    )


@dataclass
class Idefics2Config(SpliceConfig):
    """Idefics2-8B by default, with Mistral-7B."""

    vocab_size: int = 32003
    num_kv_heads: int | None = 8
    inner_hidden_size: int | None = 14336
    max_positions: int = 32768
    sliding_window: int | None = 4096
    vision: Idefics2VisionConfig = field(default_factory=Idefics2VisionConfig)
    adapter: PerceiverResamplerConfig = field(default_factory=_resampler)
    image_token_id: int | None = 32001


class Idefics2(LLaVA):
    """LLaVA with a masked resampler. `adapt` also trains mixins named `lora`, to be added to both backbones."""

    Config = Idefics2Config
    stages: ClassVar[dict[str, Trained]] = {
        "align": LLaVA.stages["align"],
        "adapt": Trained(["mixins.image.projector.*", "*mixins.lora.*"]),
    }


if __name__ == "__main__":
    from mixformer.cli import main

    main("models.idefics2:Idefics2")
