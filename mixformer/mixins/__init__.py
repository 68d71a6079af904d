"""One file per behaviour."""

from mixformer.mixins.attention_pool_head import AttentionPoolHeadMixin
from mixformer.mixins.code_head import CodeHeadMixin
from mixformer.mixins.contrastive_head import ContrastiveHeadMixin
from mixformer.mixins.conv_stem import ConvStemMixin
from mixformer.mixins.cross_attention import CrossAttentionMixin
from mixformer.mixins.documents import DocumentsMixin
from mixformer.mixins.dropout import DropoutMixin
from mixformer.mixins.encoder_cross_attention import EncoderCrossAttentionMixin
from mixformer.mixins.frame_embedding import FrameEmbeddingMixin
from mixformer.mixins.gated_mlp import GatedMLPMixin
from mixformer.mixins.image import ImageMixin
from mixformer.mixins.image_beside import ImageBesideMixin
from mixformer.mixins.image_positions import ImagePositionsMixin
from mixformer.mixins.image_regions import ImageRegionsMixin
from mixformer.mixins.image_relative_bias import ImageRelativeBiasMixin
from mixformer.mixins.image_tokens import ImageTokensMixin
from mixformer.mixins.lenet import LeNetMixin
from mixformer.mixins.lm_head import LMHeadMixin
from mixformer.mixins.lora import LoRAMixin
from mixformer.mixins.mlm_head import MLMHeadMixin
from mixformer.mixins.native_patches import NativePatchesMixin
from mixformer.mixins.nf_resnet import NFResNetMixin
from mixformer.mixins.patch_embedding import PatchEmbeddingMixin
from mixformer.mixins.pool_head import PoolHeadMixin
from mixformer.mixins.prefix_mask import PrefixMaskMixin
from mixformer.mixins.prefix_tuning import PrefixTuningMixin
from mixformer.mixins.qv_bias import QVBiasMixin
from mixformer.mixins.resized_positions import ResizedPositionsMixin
from mixformer.mixins.resnet import ResNetMixin
from mixformer.mixins.rotary import RotaryMixin
from mixformer.mixins.rotary_2d import Rotary2DMixin
from mixformer.mixins.sinusoidal_positions import SinusoidalPositionMixin
from mixformer.mixins.sliding_window import SlidingWindowMixin
from mixformer.mixins.stored_head import StoredHeadMixin
from mixformer.mixins.stored_norm import StoredNormMixin
from mixformer.mixins.sub_norm import SubNormMixin
from mixformer.mixins.token_type import TokenTypeMixin
from mixformer.mixins.vision_expert import VisionExpertAttentionMixin, VisionExpertFCMixin
from mixformer.mixins.xpos import XPosMixin

__all__ = [
    "AttentionPoolHeadMixin",
    "CodeHeadMixin",
    "ContrastiveHeadMixin",
    "ConvStemMixin",
    "CrossAttentionMixin",
    "DocumentsMixin",
    "DropoutMixin",
    "EncoderCrossAttentionMixin",
    "FrameEmbeddingMixin",
    "GatedMLPMixin",
    "ImageBesideMixin",
    "ImageMixin",
    "ImagePositionsMixin",
    "ImageRegionsMixin",
    "ImageRelativeBiasMixin",
    "ImageTokensMixin",
    "LMHeadMixin",
    "LeNetMixin",
    "LoRAMixin",
    "MLMHeadMixin",
    "NFResNetMixin",
    "NativePatchesMixin",
    "PatchEmbeddingMixin",
    "PoolHeadMixin",
    "PrefixMaskMixin",
    "PrefixTuningMixin",
    "QVBiasMixin",
    "ResNetMixin",
    "ResizedPositionsMixin",
    "Rotary2DMixin",
    "RotaryMixin",
    "SinusoidalPositionMixin",
    "SlidingWindowMixin",
    "StoredHeadMixin",
    "StoredNormMixin",
    "SubNormMixin",
    "TokenTypeMixin",
    "VisionExpertAttentionMixin",
    "VisionExpertFCMixin",
    "XPosMixin",
]
