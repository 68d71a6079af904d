"""EVA2-CLIP vision towers (arXiv:2303.15389): E for CogVLM and CogAgent, L for CogAgent's high-resolution branch."""

from __future__ import annotations

from dataclasses import dataclass

from mixformer.config import VisionTowerConfig
from mixformer.mixins import QVBiasMixin, Rotary2DMixin, StoredHeadMixin, SubNormMixin
from models.vit import VisionTower


@dataclass
class EVA2CLIPEConfig(VisionTowerConfig):
    """EVA02-CLIP-bigE without its last block, by default at 224."""

    hidden_size: int = 1792
    num_layers: int = 63
    num_heads: int = 16
    inner_hidden_size: int | None = 15360
    norm_order: str = "res_post"


class EVA2CLIPE(VisionTower):
    """x + LN(f(x)) blocks over patches with learned positions; features [m, patches, 1792]."""

    Config = EVA2CLIPEConfig


@dataclass
class EVA2CLIPLConfig(VisionTowerConfig):
    """EVA02-CLIP-L at 1120; 24 blocks stored, 23 run, as CogAgent releases it.

    Attributes:
        pretraining_grid: rotary positions are stretched to this grid.
        stored_head_size: rows of the unused contrastive head that the release carries; 0 for none.
    """

    hidden_size: int = 1024
    num_layers: int = 24
    num_layers_run: int | None = 23
    num_heads: int = 16
    inner_hidden_size: int | None = 2730
    bias: str = "except_qkv"
    activation: str = "silu"
    gated_mlp: bool = True
    image_size: int = 1120
    pretraining_grid: int = 16
    stored_head_size: int = 768


class EVA2CLIPL(VisionTower):
    """Pre-norm blocks with sub-LN, SwiGLU, learned and 2-D rotary positions; features [m, patches, 1024]."""

    Config = EVA2CLIPLConfig
    config: EVA2CLIPLConfig

    def compose(self) -> None:
        super().compose()
        self.add_mixin("qv_bias", QVBiasMixin())
        self.add_mixin("rotary", Rotary2DMixin(self.config.grid, self.config.pretraining_grid))
        self.add_mixin("sub_norm", SubNormMixin())
        if self.config.stored_head_size:
            self.add_mixin("stored", StoredHeadMixin(self.config.stored_head_size))
