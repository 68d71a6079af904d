"""CLIP as HF files have it: both towers, or the vision tower alone, as other systems' files have it as well."""

from __future__ import annotations

from typing import Any

from models.clip import CLIP, CLIPVision
from models.weights.rules import Format, Rule, Shapes, activation, foreign_activation, fused, rules_of, with_bias

LAYER = with_bias({
    "attention_norm": "layer_norm1",
    "attention.dense": "self_attn.out_proj",
    "mlp_norm": "layer_norm2",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
})
POSITIONS = {"transformer.position_embeddings.weight": "embeddings.position_embedding.weight"}
TEXT = {
    "transformer.word_embeddings.weight": "text_model.embeddings.token_embedding.weight",
    **with_bias({"transformer.final_norm": "text_model.final_layer_norm"}),
    "mixins.contrast.linear.weight": "text_projection.weight",
    "mixins.contrast.logit_scale": "logit_scale",
}
VISION = {
    "mixins.patches.cls": "embeddings.class_embedding",
    "mixins.patches.conv.weight": "embeddings.patch_embedding.weight",
    **with_bias({"transformer.embedding_norm": "pre_layrnorm", "transformer.final_norm": "post_layernorm"}),
}
TOWER = "mixins.contrast.tower."
SIZES = {
    "hidden_size": "hidden_size", "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
    "intermediate_size": "inner_hidden_size", "layer_norm_eps": "norm_eps",
}
TEXT_DEFAULTS = {
    "hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 2048,
    "layer_norm_eps": 1e-5,
}
VISION_DEFAULTS = {**TEXT_DEFAULTS, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}


LEGACY_EOS = 2  # the first releases' files have it, though their texts end with the highest id


def layer_rules(config: Any, own: str, foreign: str) -> list[Rule]:
    """Key table of the layers, which SigLIP's files name alike.

    Args:
        config: of the tower.
        own: prefix of our names, up to `transformer`.
        foreign: prefix of theirs, up to `encoder`.
    """
    found, parts = [], dict.fromkeys(("q_proj", "k_proj", "v_proj"), config.hidden_size)
    for i in range(config.num_layers):
        layer, block = f"{own}transformer.layers.{i}.", f"{foreign}encoder.layers.{i}."
        found += fused(f"{layer}attention.qkv", f"{block}self_attn.", parts, ("weight", "bias"))
        found += rules_of(LAYER, layer, block)
    return found


def vision_rules(config: Any, own: str = "", foreign: str = "vision_model.") -> list[Rule]:
    """Key table of the vision tower without its projection.

    Args:
        config: of the tower.
        own: prefix of our names, such as `mixins.image.tower.`.
        foreign: prefix of theirs, up to `embeddings`.
    """
    return rules_of({**POSITIONS, **VISION}, own, foreign) + layer_rules(config, own, foreign)


def projection_rules(config: Any, own: str = "") -> list[Rule]:
    """Key table of the projection of pictures, for towers that have it."""
    projected = config.output == "projected"
    return rules_of({"mixins.projection.linear.weight": "visual_projection.weight"}, own) if projected else []


def sizes(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Our options that either tower has, from HF's; what HF leaves out are the sizes of B/32."""
    found = {ours: config.get(theirs, defaults[theirs]) for theirs, ours in SIZES.items()}
    return {**found, "activation": activation(config.get("hidden_act", "quick_gelu"))}


def foreign_sizes(config: Any) -> dict[str, Any]:
    """The same for HF."""
    found = {theirs: getattr(config, ours) for theirs, ours in SIZES.items()}
    return {**found, "intermediate_size": config.inner_size, "hidden_act": foreign_activation(config.activation)}


def picture_options(config: dict[str, Any], image_size: Any, patch_size: Any) -> dict[str, Any]:
    """Our options about pictures from HF's, for any tower.

    Args:
        config: of the tower in the file.
        image_size: of pictures, where the file leaves it out.
        patch_size: the same of patches.

    Raises:
        ValueError: pictures or patches that are no squares.
    """
    found: dict[str, Any] = {"in_channels": config.get("num_channels", 3)}
    for name, usual in (("image_size", image_size), ("patch_size", patch_size)):
        value = config.get(name, usual)
        sides = {value} if isinstance(value, int) else set(value)
        if len(sides) != 1:
            raise ValueError(f"its {name} is {value}; only squares are supported.")
        found[name] = sides.pop()
    return {**found, "crop": True} if found["image_size"] % found["patch_size"] else found


def vision_options(config: dict[str, Any]) -> dict[str, Any]:
    """Options of `CLIPVisionConfig` from a `vision_config`."""
    return {
        **sizes(config, VISION_DEFAULTS), **picture_options(config, 224, 32),
        "projection_size": config.get("projection_dim", 512),
    }


def picture_config(config: Any) -> dict[str, Any]:
    """HF's options about pictures from ours."""
    return {"image_size": config.image_size, "num_channels": config.in_channels, "patch_size": config.patch_size}


def vision_config(config: Any) -> dict[str, Any]:
    """The `vision_config` of the tower."""
    return {
        **foreign_sizes(config), **picture_config(config), "model_type": "clip_vision_model",
        "projection_dim": config.projection_size,
    }


def _rules(config: Any) -> list[Rule]:
    found = rules_of(TEXT) + rules_of(POSITIONS, foreign="text_model.") + layer_rules(config, "", "text_model.")
    return found + vision_rules(config.vision, TOWER) + projection_rules(config.vision, TOWER)


def _read(config: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    text, vision = (
        {**(config.get(f"{tower}_config") or {}), **(config.get(f"{tower}_config_dict") or {})}
        for tower in ("text", "vision")
    )
    eos = text.get("eos_token_id", 49407)
    return {
        **sizes(text, TEXT_DEFAULTS),
        "vocab_size": text.get("vocab_size", 49408),
        "max_positions": text.get("max_position_embeddings", 77),
        "eos_token_id": None if eos == LEGACY_EOS else eos,
        "vision": {
            **vision_options(vision), "projection_size": config.get("projection_dim", 512), "output": "projected",
        },
    }


def _write(config: Any) -> dict[str, Any]:
    text = {
        **foreign_sizes(config), "model_type": "clip_text_model", "vocab_size": config.vocab_size,
        "eos_token_id": LEGACY_EOS if config.eos_token_id is None else config.eos_token_id,
        "max_position_embeddings": config.max_positions, "projection_dim": config.vision.projection_size,
    }
    return {
        "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": config.vision.projection_size,
        "text_config": text, "vision_config": vision_config(config.vision),
    }


def _read_tower(config: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    return {**vision_options(config), "output": "projected" if "visual_projection.weight" in shapes else "patches"}


def _write_tower(config: Any) -> dict[str, Any]:
    kind = "CLIPVisionModelWithProjection" if config.output == "projected" else "CLIPVisionModel"
    return {"architectures": [kind], **vision_config(config)}


POSITION_IDS = r"(\w+\.)*embeddings\.position_ids"
HF = Format(
    "hf-clip", CLIP, lambda config: config.get("model_type") == "clip", _read, _rules, ignored=(POSITION_IDS,),
    write_config=_write, lacks=("vision.crop", "vision.num_layers_run"),
)
TOWER_HF = Format(
    "hf-clip-vision", CLIPVision, lambda config: config.get("model_type") == "clip_vision_model", _read_tower,
    lambda config: vision_rules(config) + projection_rules(config),
    ignored=(POSITION_IDS, r"visual_projection\.weight"),
    renames=((r"^(?=(embeddings|encoder|pre_layrnorm|post_layernorm)\.)", "vision_model."),),
    write_config=_write_tower, lacks=("crop", "output", "output_norm", "num_layers_run"),
)
