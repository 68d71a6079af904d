"""InternViT as HF files have it."""

from __future__ import annotations

from typing import Any

from models.intern_vit import InternViT
from models.weights.clip import foreign_sizes, picture_config, picture_options, sizes
from models.weights.rules import Format, Rule, fused, rules_of, with_bias
from models.weights.vit import embedding_rules

LAYER = {
    **with_bias({"attention.dense": "attention.projection_layer", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}),
    "attention_scale": "lambda_1",
    "mlp_scale": "lambda_2",
}
NORMS = {"attention_norm": "layernorm_before", "mlp_norm": "layernorm_after"}
QK_NORMS = {"attention.q_norm.weight": "attention.q_norm.weight", "attention.k_norm.weight": "attention.k_norm.weight"}
DEFAULTS = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
    "layer_norm_eps": 1e-6,
}


def vision_rules(config: Any, own: str = "", foreign: str = "") -> list[Rule]:
    """Key table of the tower.

    Args:
        config: of the tower.
        own: prefix of our names, such as `mixins.image.tower.`.
        foreign: prefix of theirs, up to `embeddings`.
    """
    found, table, norms = embedding_rules(own, foreign), dict(LAYER), with_bias(NORMS)
    table.update({ours: norms[ours] for ours in norms if config.norm == "layernorm" or ours.endswith("weight")})
    table.update(QK_NORMS if config.qk_norm else {})
    kinds = ("weight", "bias") if config.bias == "all" else ("weight",)
    parts = dict.fromkeys(("q_proj", "k_proj", "v_proj"), config.hidden_size)
    for i in range(config.num_layers):
        layer, block = f"{own}transformer.layers.{i}.", f"{foreign}encoder.layer.{i}."
        found += fused(f"{layer}attention.qkv", f"{block}attention.", parts, kinds)
        found += rules_of(table, layer, block)
    final = with_bias({"transformer.final_norm": "layernorm"}) if config.final_norm else {}
    return found + rules_of(final, own, foreign)


def vision_options(config: dict[str, Any]) -> dict[str, Any]:
    """Options of `InternViTConfig` from a `vision_config`.

    Raises:
        ValueError: a variant that is not supported.
    """
    norm, final_norm = config.get("norm_type", "layer_norm").replace("_", ""), not config.get("use_mean_pooling", True)
    if not config.get("use_absolute_position_embeddings", True):
        raise ValueError("InternViT without learned positions is not supported.")
    if norm == "rmsnorm" and final_norm:
        raise ValueError("InternViT with RMSNorm in its layers and a LayerNorm after them is not supported.")
    if config.get("use_qk_norm") and config.get("layer_norm_eps", 1e-6) != 1e-6:
        raise ValueError(
            f"InternViT with layer_norm_eps {config['layer_norm_eps']} and normed queries and keys is not supported: "
            f"there the released code keeps 1e-6."
        )
    return {
        **sizes({"hidden_act": "gelu", **config}, DEFAULTS), **picture_options(config, 448, 14),
        "norm": norm,
        "final_norm": final_norm,
        "bias": "all" if config.get("attention_bias", False) else "except_qkv",
        "qk_norm": config.get("use_qk_norm", False),
        "layer_scale": config.get("layer_scale_init_value", 0.1),
    }


def vision_config(config: Any) -> dict[str, Any]:
    """The `vision_config` of the tower."""
    pictures = picture_config(config)
    return {
        **foreign_sizes(config),
        **{name: [value] * 2 if name.endswith("_size") else value for name, value in pictures.items()},
        "attention_bias": config.bias == "all",
        "layer_scale_init_value": config.layer_scale,
        "model_type": "internvl_vision",
        "norm_type": "layer_norm" if config.norm == "layernorm" else "rms_norm",
        "use_absolute_position_embeddings": True,
        "use_mask_token": False,
        "use_mean_pooling": not config.final_norm,
        "use_qk_norm": config.qk_norm,
    }


HF = Format(
    "hf-internvl-vision", InternViT, lambda config: config.get("model_type") == "internvl_vision",
    lambda config, shapes: vision_options(config), vision_rules,
    write_config=lambda config: {"architectures": ["InternVLVisionModel"], **vision_config(config)},
    lacks=("crop", "output", "output_norm", "num_classes", "num_layers_run"),
)
