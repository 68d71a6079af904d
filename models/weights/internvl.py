"""InternVL as HF files have it."""

from __future__ import annotations

from typing import Any

from mixformer.connectors import ProjectorConfig
from models.intern_vit import InternViTConfig
from models.internvl import InternVL
from models.weights import intern_vit
from models.weights.llava import (
    IGNORED,
    LINEARS,
    PROJECTOR,
    RENAMES,
    TOWER,
    common_config,
    language_options,
    language_rules,
    layers_run,
    require_parts,
    selected,
)
from models.weights.rules import Format, Rule, Shapes, activation, rules_of, with_bias

NORM = with_bias({"norms.0": "layer_norm"})


def _rules(config: Any) -> list[Rule]:
    merge = getattr(config.adapter, "merge", 2)
    require_parts(config, InternViTConfig, ProjectorConfig(depth=2, norm="pre", merge=merge), "InternVL")
    found = language_rules(config) + rules_of({**LINEARS, **NORM}, PROJECTOR, "multi_modal_projector.")
    return found + intern_vit.vision_rules(config.vision, TOWER, "vision_tower.")


def _read(config: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    tower, ratio = intern_vit.vision_options(config.get("vision_config") or {}), config.get("downsample_ratio", 0.5)
    merge = round(1 / ratio)
    if merge * ratio != 1:
        raise ValueError(f"its downsample_ratio is {ratio}; supported are 1, 1/2, 1/3 and so on.")
    normed = not tower["final_norm"] or config.get("vision_feature_layer", -1) == -1
    return {
        **language_options(config, shapes, "qwen2", True),
        "vision": {
            **tower, "num_layers_run": layers_run(config, -1, tower["num_layers"]), "output": selected(config),
            "output_norm": normed,
        },
        "adapter": {
            "depth": 2, "norm": "pre", "merge": merge,
            "activation": activation(config.get("projector_hidden_act", "gelu")),
        },
        "image_token_id": config.get("image_token_id", 151667),
    }


def _write(config: Any) -> dict[str, Any]:
    return {
        **common_config(config),
        "architectures": ["InternVLForConditionalGeneration"],
        "downsample_ratio": 1 / config.adapter.merge,
        "image_token_id": config.image_token_id,
        "model_type": "internvl",
        "vision_config": intern_vit.vision_config(config.vision),
    }


HF = Format(
    "hf-internvl", InternVL, lambda config: config.get("model_type") == "internvl", _read, _rules,
    ignored=(r"vision_tower\.embeddings\.mask_token", *IGNORED), renames=RENAMES, write_config=_write,
    lacks=("rope_tables",),
)
