"""LLaMA (arXiv:2302.13971): a pre-norm backbone with rotary positions and a head of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mixformer import BaseModel, TransformerConfig
from mixformer.mixins import LMHeadMixin, RotaryMixin, SlidingWindowMixin
from mixformer.objectives import LanguageObjective, Objective, Trained
from mixformer.rope import RotaryScaling


@dataclass
class LLaMAConfig(TransformerConfig):
    """LLaMA-2-7B by default; LLaMA-7B has `norm_eps: 1e-6`. Mistral, Qwen2 and InternLM2 are other values.

    Attributes:
        rope_base: wavelength base of the rotary positions.
        rope_tables: `fp32` or `released` (see `RotaryMixin`).
        rope_scaling: how they are stretched to longer sequences.
        sliding_window: how many tokens each token sees, itself included (Mistral); None for all before it.
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
    rope_scaling: RotaryScaling = field(default_factory=RotaryScaling)
    sliding_window: int | None = None


class LLaMA(BaseModel):
    """The language model under CogVLM, LLaVA and many others."""

    Config = LLaMAConfig
    config: LLaMAConfig
    objective: ClassVar[Objective | None] = LanguageObjective()
    stages: ClassVar[dict[str, Trained]] = {"pretrain": Trained(["*"])}

    def compose(self) -> None:
        config = self.config
        self.add_mixin("rotary", RotaryMixin(config.rope_base, config.rope_tables, config.rope_scaling))
        if config.sliding_window is not None:
            self.add_mixin("window", SlidingWindowMixin(config.sliding_window))
        if not config.tied_head:
            self.add_mixin("head", LMHeadMixin())


if __name__ == "__main__":
    from mixformer.cli import main

    main("models.llama:LLaMA")
