"""Frozen (arXiv:2106.13884): a picture becomes two tokens of a language model that is not trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mixformer.connectors import ProjectorConfig
from mixformer.objectives import Trained
from models.llava import LLaVA, SpliceConfig
from models.nf_resnet import NFResNetConfig


@dataclass
class FrozenConfig(SpliceConfig):
    """NF-ResNet-50 and LLaMA-7B by default: the paper's own language model of 7 billion parameters is not published.

    LLaMA's positions are relative, as that model's are, so that pictures may stand anywhere in the text.
    """

    vision: NFResNetConfig = field(default_factory=lambda: NFResNetConfig(output="pooled"))
    adapter: ProjectorConfig = field(default_factory=lambda: ProjectorConfig(tokens_per_feature=2))


class Frozen(LLaVA):
    """LLaMA + ImageMixin; the encoder learns from scratch through the language model, which stays as it is."""

    Config = FrozenConfig
    config: FrozenConfig
    stages: ClassVar[dict[str, Trained]] = {"encoder": Trained(["mixins.image.*"])}


if __name__ == "__main__":
    from mixformer.cli import main

    main("models.frozen:Frozen")
