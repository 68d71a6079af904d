"""CLIP's vision tower alone (arXiv:2103.00020), as many systems look through it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mixformer.config import VisionTowerConfig
from mixformer.mixins import PoolHeadMixin
from models.vit import VisionTower


@dataclass
class CLIPVisionConfig(VisionTowerConfig):
    """The vision tower of CLIP ViT-B/32.

    LLaVA's features are `patches` of all layers but the last (`num_layers_run`); GIT's and KOSMOS's are `tokens` with
    `output_norm`; ClipCap's vector is `projected`.

    Attributes:
        output: also `pooled`, the normed cls token [m, h], or `projected`, its projection [m, projection_size].
        projection_size: width of the space that pictures share with texts.
    """

    outputs: ClassVar[tuple[str, ...]] = ("patches", "tokens", "pooled", "projected")

    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    norm_eps: float = 1e-5
    final_norm: bool = True
    embedding_norm: bool = True
    activation: str = "quick_gelu"
    patch_size: int = 32
    patch_bias: bool = False
    output_norm: bool = False
    projection_size: int = 512

    @property
    def feature_size(self) -> int:
        """c: h, or the width of the shared space."""
        return self.projection_size if self.output == "projected" else self.hidden_size


class CLIPVision(VisionTower):
    """Pre-norm blocks over patches and a cls token with a norm before the first, and one on what is pooled."""

    Config = CLIPVisionConfig
    config: CLIPVisionConfig

    def compose(self) -> None:
        super().compose()
        if self.config.output in ("pooled", "projected"):
            size = self.config.projection_size if self.config.output == "projected" else None
            self.add_mixin("projection", PoolHeadMixin("cls", size=size, bias=False))
