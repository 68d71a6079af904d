"""GPT-2 as HF files have it."""

from __future__ import annotations

from typing import Any

from models.gpt2 import GPT2
from models.weights.rules import Format, Rule, Shapes, activation, foreign_activation, rules_of, with_bias

TOP = {
    "transformer.position_embeddings.weight": "wpe.weight",
    **with_bias({"transformer.final_norm": "ln_f"}),
}
NORMS = {"attention_norm": "ln_1", "mlp_norm": "ln_2"}
LINEARS = {
    "attention.qkv": "attn.c_attn", "attention.dense": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj",
}
CROSS_NORMS = {"mixins.cross.norm": "ln_cross_attn"}
CROSS_LINEARS = {
    "mixins.cross.query": "crossattention.q_attn",
    "mixins.cross.key_value": "crossattention.c_attn",
    "mixins.cross.dense": "crossattention.c_proj",
}
GELU = "gelu_new"


def rules(config: Any) -> list[Rule]:
    """Key table of HF GPT-2, whose matrices are [in, out]."""
    embedding = "transformer.word_embeddings.weight"
    found = rules_of(TOP)
    if config.tied_head:
        found.append(Rule(embedding, ("wte.weight", "lm_head.weight"), copies=True, num_written=1))
    else:
        found += rules_of({embedding: "wte.weight", "mixins.head.linear.weight": "lm_head.weight"})
    crossed = config.cross_attention
    norms = with_bias({**NORMS, **(CROSS_NORMS if crossed else {})})
    linears = {**LINEARS, **(CROSS_LINEARS if crossed else {})}
    for i in range(config.num_layers):
        layer, theirs = f"transformer.layers.{i}.", f"h.{i}."
        found += rules_of(norms, layer, theirs)
        for ours, name in linears.items():
            found.append(Rule(f"{layer}{ours}.weight", (f"{theirs}{name}.weight",), transposed=True))
            found.append(Rule(f"{layer}{ours}.bias", (f"{theirs}{name}.bias",)))
    return found


def read_config(config: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Options of `GPT2Config` from config.json.

    Raises:
        ValueError: a variant that is not supported (other scales of attention).
    """
    if config.get("scale_attn_by_inverse_layer_idx") or not config.get("scale_attn_weights", True):
        raise ValueError("its attention is scaled by layer, or not at all, which is not supported.")
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["n_embd"],
        "num_layers": config["n_layer"],
        "num_heads": config["n_head"],
        "inner_hidden_size": config.get("n_inner"),
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "activation": activation(config.get("activation_function", "gelu_new")),
        "max_positions": config.get("n_positions", config.get("n_ctx", 1024)),
        "tied_head": bool(config.get("tie_word_embeddings", True)),
        "cross_attention": bool(config.get("add_cross_attention")),
        "init_std": config.get("initializer_range", 0.02),
    }


def write_config(config: Any) -> dict[str, Any]:
    """config.json of HF GPT-2."""
    return {
        "activation_function": GELU if config.activation == "gelu_tanh" else foreign_activation(config.activation),
        "add_cross_attention": config.cross_attention,
        "architectures": ["GPT2LMHeadModel"],
        "bos_token_id": config.vocab_size - 1,
        "eos_token_id": config.vocab_size - 1,
        "initializer_range": config.init_std,
        "layer_norm_epsilon": config.norm_eps,
        "model_type": "gpt2",
        "n_embd": config.hidden_size,
        "n_head": config.num_heads,
        "n_inner": config.inner_hidden_size,
        "n_layer": config.num_layers,
        "n_positions": config.max_positions,
        "tie_word_embeddings": config.tied_head,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def _claims(config: dict[str, Any]) -> bool:
    if "model_type" in config:
        return bool(config["model_type"] == "gpt2")
    return "GPT2LMHeadModel" in (config.get("architectures") or [])


HF = Format(
    "hf-gpt2", GPT2, _claims, read_config, rules,
    ignored=(r"h\.\d+\.(attn|crossattention)\.(bias|masked_bias)",), renames=((r"^transformer\.", ""),),
    write_config=write_config,
)
