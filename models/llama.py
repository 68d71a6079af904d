"""LLaMA (arXiv:2302.13971): a pre-norm backbone with rotary positions and a head of its own."""

from __future__ import annotations

from dataclasses import dataclass

from mixformer import BaseModel, TransformerConfig
from mixformer.mixins import LMHeadMixin, RotaryMixin


@dataclass
class LLaMAConfig(TransformerConfig):
    """LLaMA-7B by default.

    Attributes:
        rope_base: wavelength base of the rotary positions.
        rope_tables: `fp32` or `released` (see `RotaryMixin`).
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    inner_hidden_size: int | None = 11008
    norm: str = "rmsnorm"
    norm_cast: str = "first"
    bias: str = "none"
    activation: str = "silu"
    gated_mlp: bool = True
    tied_head: bool = False
    max_positions: int = 4096
    rope_base: float = 10000.0
    rope_tables: str = "fp32"


class LLaMA(BaseModel):
    """The language model under CogVLM and CogAgent."""

    Config = LLaMAConfig
    config: LLaMAConfig

    def compose(self) -> None:
        self.add_mixin("rotary", RotaryMixin(self.config.rope_base, self.config.rope_tables))
        if not self.config.tied_head:
            self.add_mixin("head", LMHeadMixin())


if __name__ == "__main__":
    from mixformer.cli import main

    main("models.llama:LLaMA")
