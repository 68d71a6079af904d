"""LeNet-5 as published (LeCun et al., Proceedings of the IEEE 86(11), 1998): 60,000 parameters, ten fixed codes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mixformer import BaseModel, TransformerConfig
from mixformer.mixins import CodeHeadMixin, LeNetMixin
from mixformer.objectives import ClassificationObjective, Objective, SquaredDistanceObjective, Trained


@dataclass
class LeNet5Config(TransformerConfig):
    """The published network.

    Attributes:
        scores: give negative distances to the codes instead of the distances.
    """

    hidden_size: int = field(default=120, init=False)
    image_size: int = field(default=32, init=False)
    num_layers: int = 0
    num_heads: int = 1
    causal: bool = False
    final_norm: bool = False
    scores: bool = False


class LeNet5(BaseModel):
    """Pictures [m, 1, 32, 32] (or in colour) to squared distances [m, 10]; the nearest code is the class."""

    Config: ClassVar[type[TransformerConfig]] = LeNet5Config
    config: LeNet5Config
    objective: ClassVar[Objective | None] = SquaredDistanceObjective()
    stages: ClassVar = {"train": Trained(["*"])}

    def compose(self) -> None:
        self.add_mixin("stem", LeNetMixin())
        self.add_mixin("head", CodeHeadMixin(self.config.scores))


@dataclass
class LeNet5ScoresConfig(LeNet5Config):
    """The same network, whose largest output is the class."""

    scores: bool = True


class LeNet5Scores(LeNet5):
    """Trained with a cross entropy, which also pushes the other codes away."""

    Config = LeNet5ScoresConfig
    objective = ClassificationObjective()


if __name__ == "__main__":
    from mixformer.cli import main

    main("models.lenet:LeNet5")
