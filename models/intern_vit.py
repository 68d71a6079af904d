"""InternViT (arXiv:2312.14238, section 3.2; arXiv:2404.16821, section 3.2), the tower of InternVL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mixformer.objectives import Trained
from models.vit import ViT, ViTConfig


@dataclass
class InternViTConfig(ViTConfig):
    """InternViT-6B as InternVL 1.5 has it: 448 pixels, 45 of 48 blocks, patches without a final norm.

    The 300M kind has LayerNorms, biases everywhere and no norm of q and k.
    """

    hidden_size: int = 3200
    num_layers: int = 45
    num_heads: int = 25
    inner_hidden_size: int | None = 12800
    norm: str = "rmsnorm"
    norm_eps: float = 1e-6
    norm_cast: str = "first"
    final_norm: bool = False
    bias: str = "except_qkv"
    qk_norm: bool = True
    qk_norm_width: str = "all"
    layer_scale: float | None = 0.1
    image_size: int = 448
    patch_size: int = 14
    output: str = "patches"


class InternViT(ViT):
    """Pre-norm blocks with layer scale, and norms of q and k over all heads; `logits` are for probing the cls token."""

    Config = InternViTConfig
    config: InternViTConfig
    stages: ClassVar[dict[str, Trained]] = {"probe": Trained(["mixins.head.*"]), "train": Trained(["*"])}


if __name__ == "__main__":
    from mixformer.cli import main

    main("models.intern_vit:InternViT")
