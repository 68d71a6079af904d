"""Idefics2 as HF files have it."""

from __future__ import annotations

from typing import Any

from mixformer.connectors import ProjectorConfig
from models.idefics2 import Idefics2
from models.weights import llama, siglip
from models.weights.clip import foreign_sizes, picture_config
from models.weights.rules import Format, Rule, Shapes, activation, foreign_activation, rules_of

RESAMPLER = "mixins.image.projector."
PROJECTION = {
    "linears.0.weight": "up_proj.weight", "gate.weight": "gate_proj.weight", "linears.1.weight": "down_proj.weight",
}
LAYER = {
    "latents_norm.weight": "input_latents_norm.weight",
    "features_norm.weight": "input_context_norm.weight",
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.key.weight": "self_attn.k_proj.weight",
    "attention.value.weight": "self_attn.v_proj.weight",
    "attention.dense.weight": "self_attn.o_proj.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.gate_proj.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}
SIZES = {
    "num_latents": ("resampler_n_latents", 64), "depth": ("resampler_depth", 3), "num_heads": ("resampler_n_heads", 16),
    "head_size": ("resampler_head_dim", 96), "num_kv_heads": ("num_key_value_heads", 4),
}


def _rules(config: Any) -> list[Rule]:
    found = llama.rules(config, "model.text_model.")
    found += siglip.vision_rules(config.vision, "mixins.image.tower.", "model.vision_model.")
    found += rules_of(PROJECTION, f"{RESAMPLER}input_projector.", "model.connector.modality_projection.")
    resampler = "model.connector.perceiver_resampler."
    found += rules_of({"latents": "latents", "norm.weight": "norm.weight"}, RESAMPLER, resampler)
    for i in range(config.adapter.depth):
        found += rules_of(LAYER, f"{RESAMPLER}layers.{i}.", f"{resampler}layers.{i}.")
    return found


def _read(config: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    text = {"model_type": "mistral", **(config.get("text_config") or {})}
    text["tie_word_embeddings"] = config.get("tie_word_embeddings", False)
    options, perceiver = llama.read_text_config(text, shapes), config.get("perceiver_config") or {}
    vision = {"patch_size": 32, **(config.get("vision_config") or {})}
    resampler = {
        **{ours: perceiver.get(theirs, usual) for ours, (theirs, usual) in SIZES.items()},
        "norm": "rmsnorm",
        "norm_eps": perceiver.get("rms_norm_eps", options["norm_eps"]),  # the first files leave it to the text's
        "activation": activation(perceiver.get("hidden_act", "silu")),
        "gated": True,
        "input_projector": ProjectorConfig(2, options["activation"], True, False),
    }
    return {
        **options, "vision": siglip.vision_options(vision), "adapter": resampler,
        "image_token_id": config.get("image_token_id", 32001),
    }


def _write(config: Any) -> dict[str, Any]:
    text, adapter = llama.write_config(config, "mistral"), config.adapter
    perceiver = {theirs: getattr(adapter, ours) for ours, (theirs, _) in SIZES.items()}
    perceiver["num_key_value_heads"] = adapter.num_kv_heads or adapter.num_heads
    return {
        "architectures": ["Idefics2ForConditionalGeneration"],
        "image_token_id": config.image_token_id,
        "model_type": "idefics2",
        "perceiver_config": {
            **perceiver, "hidden_act": foreign_activation(adapter.activation), "hidden_size": config.hidden_size,
            "model_type": "idefics2_perceiver", "rms_norm_eps": adapter.norm_eps,
        },
        "text_config": {key: value for key, value in text.items() if key != "architectures"},
        "tie_word_embeddings": config.tied_head,
        "vision_config": {
            **foreign_sizes(config.vision), **picture_config(config.vision), "model_type": "idefics2_vision",
        },
    }


HF = Format(
    "hf-idefics2", Idefics2, lambda config: config.get("model_type") == "idefics2", _read, _rules,
    ignored=(r"model\.text_model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",), write_config=_write,
    lacks=("rope_tables",),
)
