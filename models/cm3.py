"""CM3 (arXiv:2201.07520): one decoder over tokens of text and pictures, with spans of documents moved to the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mixformer import BaseModel, TransformerConfig
from mixformer.mixins import SinusoidalPositionMixin
from mixformer.objectives import LanguageObjective, Trained


@dataclass
class CM3Config(TransformerConfig):
    """CM3-Medium (2.7B) by default: the dense 2.7B model of arXiv:2112.10684 (appendix A.1), whose vocabulary this is.

    `embedding_scale` is the square root of the hidden size, as in all of those models.
    """

    vocab_size: int = 50261
    hidden_size: int = 2560
    num_layers: int = 32
    num_heads: int = 32
    max_positions: int = 2048
    embedding_scale: float = 2560**0.5


class CM3(BaseModel):
    """A pre-norm decoder with sine and cosine positions and a tied head; the objective is in its data.

    `mixformer.data.causal_mask.CausalMaskTransform` moves the spans and fills holes.
    """

    Config = CM3Config
    config: CM3Config
    objective = LanguageObjective()
    stages: ClassVar[dict[str, Trained]] = {"pretrain": Trained(["*"])}

    def compose(self) -> None:
        self.add_mixin("positions", SinusoidalPositionMixin())


if __name__ == "__main__":
    from mixformer.cli import main

    main("models.cm3:CM3")
