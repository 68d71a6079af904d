"""ViT as HF files have it."""

from __future__ import annotations

from typing import Any

from models.vit import ViT
from models.weights.clip import foreign_sizes, picture_config, picture_options, sizes
from models.weights.rules import Format, Rule, Shapes, extent, fused, label_names, rules_of, with_bias

PATCHES = with_bias({"mixins.patches.conv": "embeddings.patch_embeddings.projection"})
LAYER = with_bias({
    "attention_norm": "layernorm_before",
    "attention.dense": "attention.output.dense",
    "mlp_norm": "layernorm_after",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
})
DEFAULTS = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
}


def embedding_rules(own: str = "", foreign: str = "") -> list[Rule]:
    """Key table of patches, cls token and positions, which InternViT's files name alike; with prefixes."""
    return [
        Rule(f"{own}mixins.patches.cls", (f"{foreign}embeddings.cls_token",), leading=2),
        Rule(f"{own}transformer.position_embeddings.weight", (f"{foreign}embeddings.position_embeddings",), leading=1),
        *rules_of(PATCHES, own, foreign),
    ]


def _rules(config: Any) -> list[Rule]:
    found = embedding_rules(foreign="vit.")
    parts = dict.fromkeys(("query", "key", "value"), config.hidden_size)
    kinds = ("weight", "bias") if config.bias == "all" else ("weight",)
    for i in range(config.num_layers):
        layer, block = f"transformer.layers.{i}.", f"vit.encoder.layer.{i}."
        found += fused(f"{layer}attention.qkv", f"{block}attention.attention.", parts, kinds)
        found += rules_of(LAYER, layer, block)
    found += rules_of(with_bias({"transformer.final_norm": "vit.layernorm"}))
    return found + (rules_of(with_bias({"mixins.head.linear": "classifier"})) if config.output == "logits" else [])


def _read(config: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    classes = {}
    if "classifier.weight" in shapes:
        classes["num_classes"] = extent(shapes, "classifier.weight", 0)
    return {
        **sizes({"hidden_act": "gelu", **config}, DEFAULTS), **picture_options(config, 224, 16), **classes,
        "bias": "all" if config.get("qkv_bias", True) else "except_qkv",
        "output": "logits" if classes else "tokens",
    }


def _write(config: Any) -> dict[str, Any]:
    content = {
        **foreign_sizes(config), **picture_config(config), "model_type": "vit", "qkv_bias": config.bias == "all",
        "architectures": ["ViTModel"],
    }
    if config.output == "logits":
        content.update(architectures=["ViTForImageClassification"], **label_names(config.num_classes))
    return content


HF = Format(
    "hf-vit", ViT, lambda config: config.get("model_type") == "vit", _read, _rules,
    ignored=(r"vit\.pooler\.dense\.(weight|bias)", r"classifier\.(weight|bias)"),
    renames=((r"^(?=(embeddings|encoder|layernorm|pooler)\.)", "vit."),),
    write_config=_write, lacks=("crop", "output", "output_norm", "num_classes", "num_layers_run"),
)
