"""ClipCap (arXiv:2111.09734): the vector that CLIP has for a picture becomes the first tokens of GPT-2."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mixformer.connectors import ConnectorConfig, ProjectorConfig
from mixformer.mixins import ImageMixin
from mixformer.objectives import LanguageObjective, Objective, Trained
from models.clip_vision import CLIPVisionConfig
from models.gpt2 import GPT2, GPT2Config


@dataclass
class PrefixConfig(GPT2Config):
    """GPT-2 behind the vector of a picture.

    Attributes:
        vision: the tower; its vector is not normalised.
        adapter: what makes tokens of the vector.
        image_token_id: id that stands at those tokens; None where `token_type_ids` alone tell them.
    """

    vision: CLIPVisionConfig = field(default_factory=lambda: CLIPVisionConfig(output="projected"))
    adapter: ConnectorConfig = field(default_factory=ProjectorConfig)
    image_token_id: int | None = None


@dataclass
class ClipCapConfig(PrefixConfig):
    """CLIP ViT-B/32, an MLP that makes ten tokens, and GPT-2 small by default."""

    adapter: ProjectorConfig = field(
        default_factory=lambda: ProjectorConfig(depth=2, activation="tanh", tokens_per_feature=10)
    )


class ClipCap(GPT2):
    """GPT-2 + ImageMixin, trained together. Token id 0 ("!") is not learnt: the released code pads captions with it."""

    Config: ClassVar[type[PrefixConfig]] = ClipCapConfig
    config: PrefixConfig
    objective: ClassVar[Objective | None] = LanguageObjective(ignored_ids=(0,))
    stages: ClassVar[dict[str, Trained]] = {"tune": Trained(["*"], ["mixins.image.tower.*"])}

    def compose(self) -> None:
        super().compose()
        config = self.config
        self.add_mixin("image", ImageMixin(config.vision, config.adapter, False, "counted", config.image_token_id))


if __name__ == "__main__":
    from mixformer.cli import main

    main("models.clipcap:ClipCap")
