"""LLaMA, Mistral and Qwen2 as HF files have them, alone or inside another model's."""

from __future__ import annotations

from typing import Any

from mixformer.transformer import qkv_parts
from models.llama import LLaMA
from models.weights.rules import Format, Rule, Shapes, activation, foreign_activation, fused, rules_of

TOP = {"transformer.final_norm.weight": "norm.weight"}
NORMS = {"attention_norm.weight": "input_layernorm.weight", "mlp_norm.weight": "post_attention_layernorm.weight"}
DENSE = {"attention.dense": "self_attn.o_proj"}
MLP = {"mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"}
QKV = ("q_proj", "k_proj", "v_proj")

_SHARED: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {**_SHARED, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": {
        **_SHARED, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": {
        **_SHARED, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
    },
}
"""What a configuration inside another model's leaves out where it is usual."""

_BIASES = {(False, False): "none", (True, False): "attention", (False, True): "mlp", (True, True): "all"}
_SCALINGS = {
    "low_freq_factor": "low_frequency_factor", "high_freq_factor": "high_frequency_factor", "beta_fast": "beta_fast",
    "beta_slow": "beta_slow", "truncate": "truncate", "attention_factor": "attention_factor",
    "original_max_position_embeddings": "original_positions",
}


def rules(config: Any, foreign: str = "model.", head: str = "lm_head.weight") -> list[Rule]:
    """Key table of HF LLaMA, Mistral and Qwen2.

    Args:
        config: of ours.
        foreign: what the names of the language model begin with.
        head: name of the output projection.
    """
    embedding, found = "transformer.word_embeddings.weight", rules_of(TOP, foreign=foreign)
    if config.tied_head:
        found.append(Rule(embedding, (f"{foreign}embed_tokens.weight", head), copies=True, num_written=1))
    else:
        found += rules_of({embedding: f"{foreign}embed_tokens.weight", "mixins.head.linear.weight": head})
    kinds = {
        "qkv": ("weight", "bias") if config.bias in ("all", "qkv", "attention") else ("weight",),
        "dense": ("weight", "bias") if config.bias in ("all", "except_qkv", "attention") else ("weight",),
        "mlp": ("weight", "bias") if config.bias in ("all", "except_qkv", "mlp") else ("weight",),
    }
    parts = dict(zip(QKV, qkv_parts(config).values(), strict=True))
    linears = {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in DENSE.items() for kind in kinds["dense"]}
    linears |= {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in MLP.items() for kind in kinds["mlp"]}
    for i in range(config.num_layers):
        layer, theirs = f"transformer.layers.{i}.", f"{foreign}layers.{i}."
        found += fused(f"{layer}attention.qkv", f"{theirs}self_attn.", parts, kinds["qkv"])
        found += rules_of({**NORMS, **linears}, layer, theirs)
    return found


def read_config(config: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Options of `LLaMAConfig` from a config.json of one of the three types.

    Raises:
        ValueError: a variant that is not supported (some rotary positions, windows in some layers only).
    """
    kind = config.get("model_type", "llama")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim, kv_heads = config.get("head_dim"), config.get("num_key_value_heads")
    biases = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": hidden,
        "num_layers": config["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": None if kv_heads in (None, heads) else kv_heads,
        "head_size": None if head_dim is None or head_dim * heads == hidden else head_dim,
        "inner_hidden_size": config["intermediate_size"],
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "bias": "qkv" if kind == "qwen2" else _BIASES[biases],
        "activation": activation(config.get("hidden_act", "silu")),
        "max_positions": config.get("max_position_embeddings", 2048),
        "tied_head": bool(config.get("tie_word_embeddings", False)),
        **read_rope(config),
        "sliding_window": _read_window(config, kind),
        "init_std": config.get("initializer_range", 0.02),
    }


def read_text_config(config: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Options of `LLaMAConfig` from the `text_config` of another model, which leaves out what is usual.

    Raises:
        ValueError: a language model of another type.
    """
    kind = config.get("model_type", "llama")
    if kind not in DEFAULTS:
        raise ValueError(f"its language model is of type '{kind}'. Readable: {', '.join(DEFAULTS)}.")
    return read_config({**DEFAULTS[kind], **config}, shapes)


def read_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Options `rope_base` and `rope_scaling`."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}  # where both are, transformers reads this
    if config.get("original_max_position_embeddings") is not None:  # goes before the one inside, there as well
        rope = {**rope, "original_max_position_embeddings": config["original_max_position_embeddings"]}
    kind = rope.get("rope_type", rope.get("type", "default"))
    found: dict[str, Any] = {"rope_base": float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))}
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("it rotates a part of each head only (partial_rotary_factor), which is not supported.")
    if kind == "default":
        return found
    if kind not in ("linear", "dynamic", "llama3", "yarn"):
        raise ValueError(f"its rotary positions are scaled in a way ('{kind}') that is not supported.")
    if rope["factor"] is None:
        raise ValueError(f"its rotary positions are scaled ('{kind}') by no factor. Write a number as their 'factor'.")
    scaling = {"kind": kind, "factor": float(rope["factor"])}
    if kind in ("llama3", "yarn"):
        scaling |= {ours: rope[theirs] for theirs, ours in _SCALINGS.items() if rope.get(theirs) is not None}
    if kind == "yarn" and "mscale" in rope and "mscale_all_dim" in rope:
        raise ValueError("its yarn scaling has two temperatures (mscale, mscale_all_dim), which is not supported.")
    return {**found, "rope_scaling": scaling}


def _read_window(config: dict[str, Any], kind: str) -> int | None:
    window: int | None = config.get("sliding_window")
    if kind == "llama" or (kind == "qwen2" and not config.get("use_sliding_window")) or window is None:
        return None
    if kind == "qwen2":
        first, num_layers = config.get("max_window_layers", 28), config["num_hidden_layers"]
        kinds = config.get("layer_types") or ["full_attention"] * first + ["sliding_attention"] * num_layers
        windowed = [i for i, name in enumerate(kinds[:num_layers]) if name == "sliding_attention"]
        if not windowed or window >= config.get("max_position_embeddings", 32768):
            return None
        if len(windowed) < num_layers:
            raise ValueError(
                f"its layers {windowed} attend to the latest {window} tokens only, the others to all, which is not "
                f"supported. With max_position_embeddings at {window} in config.json, no window is needed."
            )
    return window


def write_config(config: Any, kind: str = "llama") -> dict[str, Any]:
    """config.json of HF LLaMA, Mistral or Qwen2."""
    window = config.sliding_window
    own: dict[str, Any] = {
        "llama": {"attention_bias": config.bias in ("attention", "all"), "mlp_bias": config.bias in ("mlp", "all")},
        "mistral": {"sliding_window": window},
        "qwen2": {
            "max_window_layers": config.num_layers if window is None else 0, "sliding_window": window,
            "use_sliding_window": window is not None,
        },
    }[kind]
    return {
        "architectures": [ARCHITECTURES[kind]],
        **own,
        **({} if kind == "qwen2" else {"bos_token_id": 1, "eos_token_id": 2}),
        **({} if config.head_size is None else {"head_dim": config.head_size}),
        "hidden_act": foreign_activation(config.activation),
        "hidden_size": config.hidden_size,
        "initializer_range": config.init_std,
        "intermediate_size": config.inner_size,
        "max_position_embeddings": config.max_positions,
        "model_type": kind,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": _write_scaling(config),
        "rope_theta": config.rope_base,
        "tie_word_embeddings": config.tied_head,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def _write_scaling(config: Any) -> dict[str, Any] | None:
    scaling = config.rope_scaling
    if scaling.kind == "none":
        return None
    found = {"rope_type": scaling.kind, "factor": scaling.factor}
    of_kind = {"llama3": ("original", "low", "high"), "yarn": ("original", "beta", "truncate", "attention")}
    for theirs, ours in _SCALINGS.items():
        value = getattr(scaling, ours)
        if theirs.startswith(of_kind.get(scaling.kind, ())) and value is not None:
            found[theirs] = value
    return found


ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}


def _format(kind: str) -> Format:
    def claims(config: dict[str, Any]) -> bool:
        if "model_type" in config:
            return bool(config["model_type"] == kind)
        return ARCHITECTURES[kind] in (config.get("architectures") or [])

    def read(config: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
        return read_config({**config, "model_type": kind}, shapes)

    def write(config: Any) -> dict[str, Any]:
        return write_config(config, kind)

    return Format(
        f"hf-{kind}", LLaMA, claims, read, rules,
        ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",), write_config=write, lacks=("rope_tables",),
    )


FORMATS: list[Format] = [_format(kind) for kind in ARCHITECTURES]
HF = FORMATS[0]
