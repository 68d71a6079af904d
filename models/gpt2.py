"""GPT-2 (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019), with or without an encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mixformer import BaseModel, TransformerConfig
from mixformer.mixins import EncoderCrossAttentionMixin, LMHeadMixin
from mixformer.objectives import LanguageObjective, Objective, Trained


@dataclass
class GPT2Config(TransformerConfig):
    """GPT-2 small (124M) by default.

    Attributes:
        cross_attention: every layer attends to `encoder_hidden_states` between self attention and MLP.
        feature_size: width of those; None for h.
    """

    vocab_size: int = 50257
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    activation: str = "gelu_tanh"
    positions: str = "learned"
    max_positions: int = 1024
    cross_attention: bool = False
    feature_size: int | None = None


class GPT2(BaseModel):
    """The plain backbone: pre-norm, learned positions, tied head."""

    Config = GPT2Config
    config: GPT2Config
    objective: ClassVar[Objective | None] = LanguageObjective()
    stages: ClassVar[dict[str, Trained]] = {"pretrain": Trained(["*"])}

    def compose(self) -> None:
        config = self.config
        if config.cross_attention:
            self.add_mixin("cross", EncoderCrossAttentionMixin(config.feature_size))
        if not config.tied_head:
            self.add_mixin("head", LMHeadMixin())


if __name__ == "__main__":
    from mixformer.cli import main

    main("models.gpt2:GPT2")
