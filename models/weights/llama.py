"""LLaMA as HF files have it."""

from __future__ import annotations

from typing import Any

from models.llama import LLaMA
from models.weights.eva2_clip import activation, foreign_activation
from models.weights.rules import Format, Rule, Shapes, rules_of

TOP = {"transformer.final_norm.weight": "model.norm.weight"}
LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.dense.weight": "self_attn.o_proj.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.gate_proj.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}
QKV = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")


def rules(config: Any) -> list[Rule]:
    """Key table of HF LLaMA."""
    embedding, head = "transformer.word_embeddings.weight", "lm_head.weight"
    found = rules_of(TOP)
    if config.tied_head:
        found.append(Rule(embedding, ("model.embed_tokens.weight", head), copies=True, num_written=1))
    else:
        found += rules_of({embedding: "model.embed_tokens.weight", "mixins.head.linear.weight": head})
    kv = config.kv_heads * config.head_width
    heights = (config.num_heads * config.head_width, kv, kv)
    for i in range(config.num_layers):
        layer, foreign = f"transformer.layers.{i}.", f"model.layers.{i}."
        found.append(Rule(f"{layer}attention.qkv.weight", tuple(foreign + name for name in QKV), rows=heights))
        found += rules_of(LAYER, layer, foreign)
    return found


def read_config(config: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Options of `LLaMAConfig` from config.json.

    Raises:
        ValueError: a variant of LLaMA that is not supported (scaled rotary positions, biases).
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"its rotary positions are scaled ('{kind}'), which is not supported.")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise ValueError("its Linears have biases, which is not supported.")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim, kv_heads = config.get("head_dim"), config.get("num_key_value_heads")
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": hidden,
        "num_layers": config["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": None if kv_heads in (None, heads) else kv_heads,
        "head_size": None if head_dim is None or head_dim * heads == hidden else head_dim,
        "inner_hidden_size": config["intermediate_size"],
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "activation": activation(config.get("hidden_act", "silu")),
        "max_positions": config.get("max_position_embeddings", 2048),
        "tied_head": bool(config.get("tie_word_embeddings", False)),
        "rope_base": float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        "init_std": config.get("initializer_range", 0.02),
    }


def write_config(config: Any) -> dict[str, Any]:
    """config.json of HF LLaMA."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **({} if config.head_size is None else {"head_dim": config.head_size}),
        "hidden_act": foreign_activation(config.activation),
        "hidden_size": config.hidden_size,
        "initializer_range": config.init_std,
        "intermediate_size": config.inner_size,
        "max_position_embeddings": config.max_positions,
        "model_type": "llama",
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_base,
        "tie_word_embeddings": config.tied_head,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def _claims(config: dict[str, Any]) -> bool:
    return config.get("model_type") == "llama" or "LlamaForCausalLM" in (config.get("architectures") or [])


HF = Format(
    "hf-llama", LLaMA, _claims, read_config, rules,
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",), write_config=write_config,
    lacks=("rope_tables",),
)
