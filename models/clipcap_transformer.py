"""ClipCap's second form (arXiv:2111.09734, section 3.2): a transformer makes the tokens, and GPT-2 stays as it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mixformer.connectors import PrefixMapperConfig
from mixformer.objectives import Trained
from models.clipcap import ClipCap, PrefixConfig


@dataclass
class ClipCapTransformerConfig(PrefixConfig):
    """CLIP ViT-B/32, eight layers that make ten tokens, and GPT-2 small by default."""

    adapter: PrefixMapperConfig = field(default_factory=PrefixMapperConfig)


class ClipCapTransformer(ClipCap):
    """ClipCap, of which the mapper alone is trained."""

    Config = ClipCapTransformerConfig
    config: ClipCapTransformerConfig
    stages: ClassVar[dict[str, Trained]] = {"map": Trained(["mixins.image.projector.*"])}


if __name__ == "__main__":
    from mixformer.cli import main

    main("models.clipcap_transformer:ClipCapTransformer")
