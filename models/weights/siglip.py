"""SigLIP's vision tower as HF files have it."""

from __future__ import annotations

from typing import Any

from models.siglip import SigLIP
from models.weights.clip import (
    POSITION_IDS,
    POSITIONS,
    foreign_sizes,
    layer_rules,
    picture_config,
    picture_options,
    sizes,
)
from models.weights.rules import Format, Rule, Shapes, rules_of, with_bias

VISION = with_bias({
    "mixins.patches.conv": "embeddings.patch_embedding", "transformer.final_norm": "post_layernorm",
})
HEAD = {
    "qkv.weight": "attention.in_proj_weight",
    "qkv.bias": "attention.in_proj_bias",
    **with_bias({"dense": "attention.out_proj", "norm": "layernorm", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}),
}
DEFAULTS = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "layer_norm_eps": 1e-6,
}


def vision_rules(config: Any, own: str = "", foreign: str = "") -> list[Rule]:
    """Key table of the tower, its attention pooling included where the output is pooled by it.

    Args:
        config: of the tower.
        own: prefix of our names, such as `mixins.image.tower.`.
        foreign: prefix of theirs, up to `embeddings`.
    """
    found = rules_of({**POSITIONS, **VISION}, own, foreign) + layer_rules(config, own, foreign)
    if config.output == "pooled":
        found.append(Rule(f"{own}mixins.head.query", (f"{foreign}head.probe",), leading=2))
        found += rules_of(HEAD, f"{own}mixins.head.", f"{foreign}head.")
    return found


def vision_options(config: dict[str, Any]) -> dict[str, Any]:
    """Options of `SigLIPConfig` from a `vision_config`; what HF leaves out are the sizes of B/16."""
    sized = sizes({"hidden_act": "gelu_pytorch_tanh", **config}, DEFAULTS)
    return {**sized, **picture_options(config, 224, 16)}


def vision_config(config: Any) -> dict[str, Any]:
    """The `vision_config` of the tower."""
    return {
        **foreign_sizes(config), **picture_config(config), "model_type": "siglip_vision_model",
        "vision_use_head": config.output == "pooled",
    }


def _read(config: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    return {**vision_options(config), "output": "pooled" if "head.probe" in shapes else "patches"}


HF = Format(
    "hf-siglip-vision", SigLIP, lambda config: config.get("model_type") == "siglip_vision_model", _read, vision_rules,
    ignored=(POSITION_IDS, r"head\..*"), renames=((r"^vision_model\.", ""),),
    write_config=lambda config: {"architectures": ["SiglipVisionModel"], **vision_config(config)},
    lacks=("crop", "output", "output_norm", "num_layers_run"),
)
