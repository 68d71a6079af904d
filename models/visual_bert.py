"""VisualBERT (arXiv:1908.03557): BERT over words and the regions of a picture behind them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mixformer.connectors import ProjectorConfig
from mixformer.mixins import ImageRegionsMixin
from mixformer.objectives import Trained
from models.bert import BERT, BERTConfig
from models.clip import CLIPVisionConfig


@dataclass
class VisualBERTConfig(BERTConfig):
    """VisualBERT over the regions that VQA and COCO have; NLVR2 has `feature_size: 1024`, VCR 512.

    Attributes:
        feature_size: width of ready features of regions, where there is no tower.
        vision: a tower whose patches are the regions, instead of a detector's; None for ready features.
        adapter: the projector.
        image_token_id: id that stands at regions; None where `token_type_ids` alone tell them.
    """

    feature_size: int = 2048
    vision: CLIPVisionConfig | None = None
    adapter: ProjectorConfig = field(default_factory=ProjectorConfig)
    image_token_id: int | None = None


class VisualBERT(BERT):
    """BERT + ImageRegionsMixin; the second head says whether text and picture belong together."""

    Config = VisualBERTConfig
    config: VisualBERTConfig
    stages: ClassVar[dict[str, Trained]] = {
        "pretrain": Trained([
            "transformer.*", "mixins.segments.*", "mixins.head.*", "mixins.sentence.*", "mixins.regions.projector.*",
            "mixins.regions.*_table",
        ]),
    }

    def compose(self) -> None:
        super().compose()
        config = self.config
        size = config.feature_size if config.vision is None else None
        self.add_mixin("regions", ImageRegionsMixin(config.vision, config.adapter, config.image_token_id, size))


if __name__ == "__main__":
    from mixformer.cli import main

    main("models.visual_bert:VisualBERT")
