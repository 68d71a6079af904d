"""VILA (arXiv:2312.07533): LLaVA's form with a language model that learns from interleaved pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mixformer.connectors import ProjectorConfig
from mixformer.objectives import Trained
from models.llava import LLaVA, LLaVAConfig


@dataclass
class VILAConfig(LLaVAConfig):
    """VILA-7B by default: a linear projector between CLIP L/14-336 and Llama-2.

    VILA-1.5 merges squares of 2 x 2 patches: `adapter: {depth: 2, norm: pre, merge: 2, pad: true}`, or of 3 x 3:
    `merge: 3` and `narrow: 3`.
    """

    vocab_size: int = 32000
    adapter: ProjectorConfig = field(default_factory=ProjectorConfig)
    image_token_id: int | None = None


class VILA(LLaVA):
    """LLaVA in three stages: the projector; with the language model, on interleaved text; on instructions."""

    Config = VILAConfig
    stages: ClassVar[dict[str, Trained]] = {
        "align": LLaVA.stages["align"],
        "pretrain": LLaVA.stages["tune"],
        "tune": LLaVA.stages["tune"],
        "tune_all": Trained(["*"]),
    }


if __name__ == "__main__":
    from mixformer.cli import main

    main("models.vila:VILA")
