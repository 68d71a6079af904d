"""CogVLM and CogVLM2 as HF files have them."""

from __future__ import annotations

from typing import Any

from models.cogvlm import CogVLM
from models.weights.eva2_clip import e_config, e_options, e_rules
from models.weights.rules import Format, Rule, Shapes, activation, extent, foreign_activation, frequencies, rules_of

TOP = {
    "transformer.word_embeddings.weight": "model.embed_tokens.weight",
    "transformer.final_norm.weight": "model.norm.weight",
    "mixins.head.linear.weight": "lm_head.weight",
}
LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.qkv.weight": "self_attn.language_expert_query_key_value.weight",
    "attention.dense.weight": "self_attn.language_expert_dense.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.language_mlp.gate_proj.weight",
    "mlp.up.weight": "mlp.language_mlp.up_proj.weight",
    "mlp.down.weight": "mlp.language_mlp.down_proj.weight",
}
EXPERT = {
    "mixins.vision_expert.qkv.weight": "self_attn.vision_expert_query_key_value.weight",
    "mixins.vision_expert.dense.weight": "self_attn.vision_expert_dense.weight",
    "mixins.vision_expert_mlp.gate.weight": "mlp.vision_mlp.gate_proj.weight",
    "mixins.vision_expert_mlp.up.weight": "mlp.vision_mlp.up_proj.weight",
    "mixins.vision_expert_mlp.down.weight": "mlp.vision_mlp.down_proj.weight",
}
EXPERT_BIAS = {"mixins.vision_expert.qkv.bias": "self_attn.vision_expert_query_key_value.bias"}
MARKS = {"mixins.image.boi": "boi", "mixins.image.eoi": "eoi"}
PROJECTOR = {
    "linear.weight": "linear_proj.weight",
    "norm.weight": "norm1.weight",
    "norm.bias": "norm1.bias",
    "mlp.gate.weight": "gate_proj.weight",
    "mlp.up.weight": "dense_h_to_4h.weight",
    "mlp.down.weight": "dense_4h_to_h.weight",
}
DOWNSAMPLE = {"mixins.image.projector.conv.weight": "conv.weight", "mixins.image.projector.conv.bias": "conv.bias"}
POSITIONS = {"mixins.image.projector.position_embedding": "pos_embed"}
BASES = {1: 10000.0, 2: 500000.0}


def projector_rules(config: Any, foreign: str) -> list[Rule]:
    """Key table of boi, eoi and the projector, which HF and SAT name alike behind a prefix."""
    found = rules_of(MARKS, foreign=foreign, leading=2)
    found += rules_of(PROJECTOR, "mixins.image.projector.", f"{foreign}linear_proj.")
    found += rules_of(DOWNSAMPLE, foreign=foreign) if config.adapter.downsample > 1 else []
    return found + (rules_of(POSITIONS, foreign=foreign) if config.adapter.position_table else [])


def expert_layers(config: Any) -> range | list[int]:
    """Indices of the layers with visual experts."""
    return range(config.num_layers) if config.expert_layers is None else list(config.expert_layers)


def rules(config: Any) -> list[Rule]:
    """Key table of HF CogVLM and CogVLM2."""
    found = rules_of(TOP) + projector_rules(config, "model.vision.")
    copies = tuple(f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(config.num_layers))
    found.append(Rule("mixins.rotary.inv_freq", copies, copies=True, default=frequencies))
    expert = {**EXPERT, **(EXPERT_BIAS if config.expert_qkv_bias else {})}
    for i in range(config.num_layers):
        found += rules_of(LAYER, f"transformer.layers.{i}.", f"model.layers.{i}.")
    for i in expert_layers(config):
        found += rules_of(expert, f"transformer.layers.{i}.", f"model.layers.{i}.")
    return found + e_rules(config.vision, "mixins.image.tower.", "model.vision.")


def projector_options(shapes: Shapes, foreign: str, inner_size: int) -> dict[str, Any]:
    """Options of the projector, which its shapes tell."""
    inner, conv = extent(shapes, f"{foreign}linear_proj.gate_proj.weight", 0), f"{foreign}conv.weight"
    return {
        "inner_hidden_size": None if inner == inner_size else inner,
        "downsample": extent(shapes, conv, -1) if conv in shapes else 1,
        "position_table": f"{foreign}pos_embed" in shapes,
    }


def read_config(config: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Options of `CogVLMConfig` from config.json and the shapes in the weights."""
    heads, kv_heads = config["num_attention_heads"], config.get("num_multi_query_heads")
    base = BASES[1] if kv_heads is None else BASES[2]
    if config.get("tie_word_embeddings"):
        raise ValueError("its word embedding and head are tied, which no release of this family has.")
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": None if kv_heads in (None, heads) else kv_heads,
        "inner_hidden_size": config["intermediate_size"],
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "activation": activation(config.get("hidden_act", "silu")),
        "max_positions": config.get("max_position_embeddings", 2048),
        "init_std": config.get("initializer_range", 0.02),
        "rope_base": float(config.get("rope_theta", base)),
        "vision": e_options(config["vision_config"]),
        "adapter": projector_options(shapes, "model.vision.", config["intermediate_size"]),
        "expert_qkv_bias": any(name.endswith("vision_expert_query_key_value.bias") for name in shapes),
    }


def write_config(config: Any) -> dict[str, Any]:
    """config.json of HF CogVLM, or of CogVLM2 where the sizes are its own."""
    second = config.num_kv_heads is not None or config.rope_base == BASES[2]
    usual = BASES[2] if second else BASES[1]
    return {
        "architectures": ["CogVLMForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_cogvlm.CogVLMConfig",
            "AutoModelForCausalLM": "modeling_cogvlm.CogVLMForCausalLM",
        },
        "bos_token_id": 128000 if second else 1,
        "eos_token_id": 128001 if second else 2,
        "hidden_act": foreign_activation(config.activation),
        "hidden_size": config.hidden_size,
        "initializer_range": config.init_std,
        "intermediate_size": config.inner_size,
        "max_position_embeddings": config.max_positions,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        **({"num_multi_query_heads": config.kv_heads} if second else {}),
        "pad_token_id": 128002 if second else 0,
        "rms_norm_eps": config.norm_eps,
        **({} if config.rope_base == usual else {"rope_theta": config.rope_base}),
        "template_version": "chat",
        "tie_word_embeddings": False,
        "use_cache": True,
        "vision_config": e_config(config.vision),
        "vocab_size": config.vocab_size,
    }


def _claims(config: dict[str, Any]) -> bool:
    return "CogVLMForCausalLM" in (config.get("architectures") or []) and "cross_hidden_size" not in config


HF = Format(
    "hf-cogvlm", CogVLM, _claims, read_config, rules, write_config=write_config,
    lacks=("rope_base", "rope_tables", "norm_cast"), aliases={"placeholder_id": "", "rope_theta": "rope_base"},
)
