"""One file per behaviour."""

from mixformer.mixins.cross_attention import CrossAttentionMixin
from mixformer.mixins.gated_mlp import GatedMLPMixin
from mixformer.mixins.image import ImageMixin, ImageTokensMixin
from mixformer.mixins.lm_head import LMHeadMixin
from mixformer.mixins.lora import LoRAMixin
from mixformer.mixins.patch_embedding import PatchEmbeddingMixin
from mixformer.mixins.prefix_mask import PrefixMaskMixin
from mixformer.mixins.prefix_tuning import PrefixTuningMixin
from mixformer.mixins.qv_bias import QVBiasMixin
from mixformer.mixins.rotary import RotaryMixin
from mixformer.mixins.rotary_2d import Rotary2DMixin
from mixformer.mixins.stored_head import StoredHeadMixin
from mixformer.mixins.sub_norm import SubNormMixin
from mixformer.mixins.vision_expert import VisionExpertAttentionMixin, VisionExpertFCMixin

__all__ = [
    "CrossAttentionMixin",
    "GatedMLPMixin",
    "ImageMixin",
    "ImageTokensMixin",
    "LMHeadMixin",
    "LoRAMixin",
    "PatchEmbeddingMixin",
    "PrefixMaskMixin",
    "PrefixTuningMixin",
    "QVBiasMixin",
    "Rotary2DMixin",
    "RotaryMixin",
    "StoredHeadMixin",
    "SubNormMixin",
    "VisionExpertAttentionMixin",
    "VisionExpertFCMixin",
]
