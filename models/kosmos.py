"""KOSMOS-1 (arXiv:2302.14045): a Magneto decoder with xPos that reads resampled CLIP features among its tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mixformer import BaseModel, TransformerConfig
from mixformer.connectors import PerceiverResamplerConfig, ProjectorConfig
from mixformer.mixins import ImageMixin, SubNormMixin, XPosMixin
from mixformer.mixins.sub_norm import magneto_init
from mixformer.objectives import LanguageObjective, Trained
from models.clip_vision import CLIPVisionConfig


def _clip() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=1024, num_layers=24, num_heads=16, inner_hidden_size=4096, patch_size=14, output="tokens",
        output_norm=True,
    )


def _resampler() -> PerceiverResamplerConfig:
    return PerceiverResamplerConfig(num_latents=64, depth=2, output_projector=ProjectorConfig(bias=False))


@dataclass
class KosmosConfig(TransformerConfig):
    """KOSMOS-1 by default.

    The paper gives the decoder's sizes, the tower and 64 latents. It does not say how deep the resampler is (2 layers
    in a public reimplementation), nor whether the tower's cls token and final norm take part (in KOSMOS-2 they do).

    Attributes:
        vision: the tower.
        adapter: the resampler; each picture takes as many tokens as come out of it.
        image_token_id: id that stands at those tokens; None where `token_type_ids` alone tell them.
        xpos_scale_base: see `XPosMixin`; its centre is the middle of `max_positions`.
    """

    vocab_size: int = 64007
    hidden_size: int = 2048
    num_layers: int = 24
    num_heads: int = 32
    max_positions: int = 2048
    vision: CLIPVisionConfig = field(default_factory=_clip)
    adapter: PerceiverResamplerConfig = field(default_factory=_resampler)
    image_token_id: int | None = None
    xpos_scale_base: float = 512.0


class Kosmos(BaseModel):
    """A pre-norm decoder with sub-LN, its initial weights and xPos; pictures are tokens like any others.

    `train` trains all but CLIP, and of that the last of 24 layers.
    """

    Config: ClassVar[type[TransformerConfig]] = KosmosConfig
    config: KosmosConfig
    objective = LanguageObjective()
    stages: ClassVar = {
        "train": Trained(["transformer.*", "mixins.image.projector.*", "mixins.image.tower.transformer.layers.23.*"])
    }

    def compose(self) -> None:
        config = self.config
        self.add_mixin("sub_norm", SubNormMixin())
        self.add_mixin("xpos", XPosMixin(scale_base=config.xpos_scale_base, centre=config.max_positions // 2))
        magneto_init(self)
        image = ImageMixin(config.vision, config.adapter, False, "counted", config.image_token_id)
        self.add_mixin("image", image)


if __name__ == "__main__":
    from mixformer.cli import main

    main("models.kosmos:Kosmos")
