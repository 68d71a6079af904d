"""CLIP (arXiv:2103.00020): a text tower and a vision tower that meet in one space."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mixformer import BaseModel, TransformerConfig
from mixformer.mixins import ContrastiveHeadMixin
from mixformer.objectives import ContrastiveObjective, Objective, Trained
from models.clip_vision import CLIPVision, CLIPVisionConfig

__all__ = ["CLIP", "CLIPConfig", "CLIPVision", "CLIPVisionConfig"]


@dataclass
class CLIPConfig(TransformerConfig):
    """CLIP ViT-B/32: the text tower's sizes, and those of the vision tower.

    Attributes:
        eos_token_id: id of the end-of-text token, at whose first place a text is pooled; None: at the highest id.
        vision: the vision tower; its `output` is `projected`.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    num_layers: int = 12
    num_heads: int = 8
    activation: str = "quick_gelu"
    positions: str = "learned"
    max_positions: int = 77
    tied_head: bool = False
    eos_token_id: int | None = None
    vision: CLIPVisionConfig = field(default_factory=lambda: CLIPVisionConfig(output="projected"))


class CLIP(BaseModel):
    """Causal pre-norm text tower whose head owns the vision tower and compares the two; gives hidden states [b, s, h].

    `run(input_ids, attention_mask, images=...)` has the features and their similarities in `outputs` (see
    `ContrastiveHeadMixin`); without images, those of the texts. Pictures alone: `get_mixin("contrast").encode(images)`.
    """

    Config = CLIPConfig
    config: CLIPConfig
    objective: ClassVar[Objective | None] = ContrastiveObjective()
    stages: ClassVar[dict[str, Trained]] = {"train": Trained(["*"])}

    def compose(self) -> None:
        self.add_mixin("contrast", ContrastiveHeadMixin(self.config.vision, self.config.eos_token_id))


if __name__ == "__main__":
    from mixformer.cli import main

    main("models.clip:CLIP")
