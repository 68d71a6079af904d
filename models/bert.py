"""BERT (arXiv:1810.04805): an encoder that predicts masked words, and whether two segments follow one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mixformer import BaseModel, TransformerConfig
from mixformer.mixins import MLMHeadMixin, PoolHeadMixin, TokenTypeMixin
from mixformer.objectives import MaskedLanguageObjective, Objective, Trained


@dataclass
class BERTConfig(TransformerConfig):
    """BERT-base, uncased, by default.

    Attributes:
        num_segments: kinds of segments that `segment_ids` tell apart.
        next_sentence: a head over the first token that says whether the second segment follows the first.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    causal: bool = False
    norm_eps: float = 1e-12
    norm_order: str = "post"
    final_norm: bool = False
    embedding_norm: bool = True
    positions: str = "learned"
    max_positions: int = 512
    num_segments: int = 2
    next_sentence: bool = True


class BERT(BaseModel):
    """The post-norm backbone with segments; word logits, and `outputs["sentence"]` [b, 2]."""

    Config = BERTConfig
    config: BERTConfig
    objective: ClassVar[Objective | None] = MaskedLanguageObjective()
    stages: ClassVar[dict[str, Trained]] = {"pretrain": Trained(["*"])}

    def compose(self) -> None:
        config = self.config
        self.add_mixin("segments", TokenTypeMixin(config.num_segments))
        self.add_mixin("head", MLMHeadMixin())
        if config.next_sentence:
            self.add_mixin("sentence", PoolHeadMixin(dense=True, size=2, result="sentence"))


if __name__ == "__main__":
    from mixformer.cli import main

    main("models.bert:BERT")
