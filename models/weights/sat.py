"""SwissArmyTransformer's key tables and configs: LLaMA, CogVLM, CogVLM2 and CogAgent, both ways."""

from __future__ import annotations

import re
from typing import Any

import torch

from models.cogagent import CogAgent
from models.cogvlm import CogVLM
from models.llama import LLaMA
from models.weights import cogagent, cogvlm
from models.weights.eva2_clip import L_ROPE_TABLES
from models.weights.rules import Format, Rule, Shapes, Source, frequencies, rules_of, with_bias
from models.weights.sat_folder import EVA

TOP = {
    "transformer.word_embeddings.weight": "transformer.word_embeddings.weight",
    "transformer.final_norm.weight": "transformer.final_layernorm.weight",
}
HEAD = {"mixins.head.linear.weight": "mixins.lm.lm_head.weight"}
LAYER = {
    "attention_norm.weight": "transformer.layers.{i}.input_layernorm.weight",
    "attention.qkv.weight": "transformer.layers.{i}.attention.query_key_value.weight",
    "attention.dense.weight": "transformer.layers.{i}.attention.dense.weight",
    "mlp_norm.weight": "transformer.layers.{i}.post_attention_layernorm.weight",
    "mlp.up.weight": "transformer.layers.{i}.mlp.dense_h_to_4h.weight",
    "mlp.down.weight": "transformer.layers.{i}.mlp.dense_4h_to_h.weight",
}
GATE = "mlp.gate.weight"
GATES = ("mixins.mlp.gate_proj.{i}.weight", "transformer.layers.{i}.mlp.dense_h_to_4h_gate.weight")
FREQUENCIES = ("mixins.rotary.rotary_emb.inv_freq", "transformer.position_embeddings.inv_freq")
EXPERT = {
    "mixins.vision_expert.qkv.weight": "mixins.rotary.vision_query_key_value_list.{i}.weight",
    "mixins.vision_expert.dense.weight": "mixins.rotary.vision_dense_list.{i}.weight",
    "mixins.vision_expert_mlp.gate.weight": "mixins.mlp.vision_gate_proj.{i}.weight",
    "mixins.vision_expert_mlp.up.weight": "mixins.mlp.vision_dense_h_to_4h_list.{i}.weight",
    "mixins.vision_expert_mlp.down.weight": "mixins.mlp.vision_dense_4h_to_h_list.{i}.weight",
}
EXPERT_BIAS = {"mixins.vision_expert.qkv.bias": "mixins.rotary.vision_query_key_value_list.{i}.bias"}
CROSS = {
    "mixins.cross.norm.weight": "transformer.layers.{i}.post_cross_attention_layernorm.weight",
    "mixins.cross.query.weight": "transformer.layers.{i}.cross_attention.query.weight",
    "mixins.cross.key_value.weight": "transformer.layers.{i}.cross_attention.key_value.weight",
    "mixins.cross.dense.weight": "transformer.layers.{i}.cross_attention.dense.weight",
}
TOWER = {
    "transformer.position_embeddings.weight": "transformer.position_embeddings.weight",
    **with_bias({"mixins.patches.conv": "mixins.patch_embedding.proj"}),
}
TOWER_LAYER = with_bias({
    "attention_norm": "input_layernorm",
    "attention.qkv": "attention.query_key_value",
    "attention.dense": "attention.dense",
    "mlp_norm": "post_attention_layernorm",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
})
ENCODER = "mixins.encoder."


def language_rules(config: Any) -> list[Rule]:
    """Key table of the language model, in both dialects: gate and frequencies in mixins (old) or in the backbone."""
    found = rules_of(TOP) + ([] if config.tied_head else rules_of(HEAD))
    for i in range(config.num_layers):
        found += rules_of({ours: theirs.format(i=i) for ours, theirs in LAYER.items()}, f"transformer.layers.{i}.")
        gates = tuple(name.format(i=i) for name in GATES)
        found.append(Rule(f"transformer.layers.{i}.{GATE}", gates, copies=True, num_written=1))
    return found


def cogvlm_rules(config: Any) -> list[Rule]:
    """Key table of CogVLM and CogVLM2."""
    found = language_rules(config) + cogvlm.projector_rules(config, EVA)
    found.append(Rule("mixins.rotary.inv_freq", FREQUENCIES, copies=True, num_written=1, default=frequencies))
    expert = {**EXPERT, **(EXPERT_BIAS if config.expert_qkv_bias else {})}
    for i in cogvlm.expert_layers(config):
        found += rules_of({ours: theirs.format(i=i) for ours, theirs in expert.items()}, f"transformer.layers.{i}.")
    own, foreign = "mixins.image.tower.", f"{EVA}vit_model."
    found.append(Rule(f"{own}mixins.patches.cls", (f"{foreign}transformer.word_embeddings.weight",), leading=1))
    found += rules_of(TOWER, own, foreign)
    for i in range(config.vision.num_layers):
        found += rules_of(TOWER_LAYER, f"{own}transformer.layers.{i}.", f"{foreign}transformer.layers.{i}.")
    return found


def cogagent_rules(config: Any) -> list[Rule]:
    """Key table of CogAgent."""
    found = cogvlm_rules(config) + cogagent.tower_rules(config, ENCODER)
    for i in cogagent.cross_layers(config):
        found += rules_of({ours: theirs.format(i=i) for ours, theirs in CROSS.items()}, f"transformer.layers.{i}.")
    return found


def read_llama(config: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Options of `LLaMAConfig` from model_config.json; it records what differs from SAT's defaults only.

    Raises:
        ValueError: biases in the Linears, which this family does not have.
    """
    if config.get("use_bias", True):
        raise ValueError("its Linears have biases ('use_bias' is not false), which no LLaMA has.")
    heads, kv_heads = config["num_attention_heads"], config.get("num_multi_query_heads")
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "num_layers": config["num_layers"],
        "num_heads": heads,
        "num_kv_heads": None if kv_heads in (None, 0, heads) else kv_heads,
        "inner_hidden_size": config.get("inner_hidden_size"),
        "norm_eps": config.get("layernorm_epsilon", 1e-5),
        "max_positions": config.get("max_sequence_length", 2048),
        "rope_base": float(config.get("rope_theta", cogvlm.BASES[2 if kv_heads else 1])),
    }


def read_cogvlm(config: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Options of `CogVLMConfig` from model_config.json and the shapes in the weights."""
    options, eva = read_llama(config, shapes), config["eva_args"]
    sizes = eva["image_size"]
    inner = options["inner_hidden_size"] or 4 * options["hidden_size"]
    return {
        **options,
        "vision": {
            "hidden_size": eva["hidden_size"],
            "num_layers": eva["num_layers"],
            "num_heads": eva["num_attention_heads"],
            "inner_hidden_size": eva.get("inner_hidden_size"),
            "image_size": sizes[0] if isinstance(sizes, list) else sizes,
            "patch_size": eva.get("patch_size", 14),
            "in_channels": eva.get("in_channels", 3),
            "norm_eps": eva.get("layernorm_epsilon", 1e-5),
        },
        "adapter": cogvlm.projector_options(shapes, EVA, inner),
        "expert_qkv_bias": any(re.fullmatch(r".*vision_query_key_value_list\.\d+\.bias", name) for name in shapes),
    }


def read_cogagent(config: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Options of `CogAgentConfig` from model_config.json and the shapes in the weights."""
    options, decoders = read_cogvlm(config, shapes), config.get("is_decoder", True)
    layers = [i for i, crosses in enumerate(decoders) if crosses] if isinstance(decoders, list) else []
    query = f"transformer.layers.{layers[0] if layers else 0}.cross_attention.query.weight"
    cross = cogagent.cross_options(shapes, ENCODER, query, config.get("cross_image_pix", 1120))
    return {**options, **cross, "cross_layers": None if len(layers) in (0, options["num_layers"]) else layers}


def write_llama(config: Any) -> dict[str, Any]:
    """model_config.json of SAT LLaMA in the older dialect, which the released CogVLM and CogAgent have."""
    base = cogvlm.BASES[1 if config.num_kv_heads is None else 2]
    return {
        "model_class": "LLaMAModel",
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "vocab_size": config.vocab_size,
        "layernorm_order": "pre",
        "model_parallel_size": 1,
        "max_sequence_length": config.max_positions,
        "use_bias": False,
        "inner_hidden_size": config.inner_size,
        **({} if config.norm_eps == 1e-5 else {"layernorm_epsilon": config.norm_eps}),
        **({} if config.num_kv_heads is None else {"num_multi_query_heads": config.num_kv_heads}),
        **({} if config.rope_base == base else {"rope_theta": config.rope_base}),  # SAT takes it from inv_freq
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def write_cogvlm(config: Any) -> dict[str, Any]:
    """model_config.json of SAT CogVLM."""
    vision, found = config.vision, write_llama(config)
    if config.num_kv_heads is not None:
        found.update(bos_token_id=128000, eos_token_id=128001, pad_token_id=128002)
    else:
        found.update(tokenizer_type="vicuna-7b-v1.5")
    return {
        **found,
        "model_class": "CogVLMModel",
        "text_processor_version": "chat_old",
        "image_length": config.adapter.num_tokens(vision.num_features),
        "eva_args": {
            "model_class": "EVA2CLIPModel",
            "num_layers": vision.num_layers,
            "hidden_size": vision.hidden_size,
            "num_attention_heads": vision.num_heads,
            "vocab_size": 1,
            "layernorm_order": "post",
            "model_parallel_size": 1,
            "max_sequence_length": vision.grid**2 + 1,
            "inner_hidden_size": vision.inner_size,
            "use_final_layernorm": False,
            "layernorm_epsilon": vision.norm_eps,
            "row_parallel_linear_final_bias": False,
            "image_size": [vision.image_size, vision.image_size],
            "pre_len": 1,
            "post_len": 0,
            "in_channels": vision.in_channels,
            "patch_size": vision.patch_size,
        },
    }


def write_cogagent(config: Any) -> dict[str, Any]:
    """model_config.json of SAT CogAgent."""
    width, crossing = config.cross_vision.hidden_size, set(cogagent.cross_layers(config))
    return {
        **write_cogvlm(config),
        "model_class": "CogAgentModel",
        "text_processor_version": "chat",
        "is_decoder": [i in crossing for i in range(config.num_layers)],
        "cross_attn_hidden_size": width,
        "cross_hidden_size_per_attention_head": (config.cross_compute_size or width) // config.num_heads,
        "encoder_args": {},
        "cross_image_pix": config.cross_vision.image_size,
    }


def for_ranks(content: dict[str, Any], num_ranks: int) -> dict[str, Any]:
    """A model_config.json for so many model-parallel ranks.

    Raises:
        ValueError: heads that do not divide among them.
    """
    eva = content.get("eva_args")
    for where, sizes in (("", content), ("eva_args.", eva or {})):
        for name in ("num_attention_heads", "num_multi_query_heads"):
            if (sizes.get(name) or 0) % num_ranks:
                raise ValueError(
                    f"{where}{name} is {sizes[name]}, which does not divide among {num_ranks} ranks. Choose another "
                    f"number of parts."
                )
    found = {**content, "model_parallel_size": num_ranks}
    return found if eva is None else {**found, "eva_args": {**eva, "model_parallel_size": num_ranks}}


def settings_from(source: Source | None, target: str) -> dict[str, Any]:
    """What the config file of HF says of prompts and ids, as SAT's says it, or the other way round.

    Args:
        source: what is kept of the file that a model was read from.
        target: name of the format that is written.
    """
    if source is None or {source.format[:3], target[:3]} != {"hf-", "sat"}:
        return {}
    config = source.config
    found = {name: config[name] for name in ("bos_token_id", "pad_token_id") if isinstance(config.get(name), int)}
    ends = config.get("eos_token_id")
    if isinstance(ends, int | list) and ends:
        found["eos_token_id"] = ends[0] if isinstance(ends, list) else ends
    family = target.partition("-")[2]
    for sat_name, hf_name in TEMPLATES.get(family, {}).items():
        if target.startswith("sat") and config.get("template_version") == hf_name:
            found["text_processor_version"] = sat_name
        elif config.get("text_processor_version") == sat_name and target.startswith("hf-"):
            found["template_version"] = hf_name
    return found


TEMPLATES = {
    "cogvlm": {"base": "base", "chat_old": "chat", "vqa": "vqa"},
    "cogagent": {"base": "base", "chat": "chat", "chat_old": "chat_old", "vqa": "vqa"},
}
"""{family: {SAT's name of a template: HF's name of the same one}}."""


def tables(format_name: str, config: Any) -> list[Rule]:
    """Tensors of a format that a model of ours computes, under names that all formats of its family share.

    They are buffers of the released code: the rotary tables of CogAgent's second tower, once and again in every block,
    and LLaMA's frequencies, one per layer in HF's older files. SAT asks for its own when it loads, so they have a
    default; in HF's files they may be missing.
    """
    if format_name in ("sat-cogagent", "hf-cogagent"):
        is_sat = format_name.startswith("sat")
        prefix = f"{ENCODER if is_sat else cogagent.TOWER}vit.model."
        homes = ["rope", *(f"blocks.{i}.attn.rope" for i in range(config.cross_vision.num_layers))]
        return [
            Rule(
                f"unused.rope_{kind}", tuple(f"{prefix}{home}.freqs_{kind}" for home in homes), copies=True,
                num_written=None if is_sat else 1, default=make if is_sat else None,
            )
            for kind, make in (("cos", _cosines), ("sin", _sines))
        ]
    if format_name == "sat-llama":
        return [Rule("unused.inv_freq", FREQUENCIES, copies=True, num_written=1, default=frequencies)]
    if format_name in ("hf-llama", "hf-mistral", "hf-qwen2"):
        names = tuple(f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(config.num_layers))
        return [Rule("unused.inv_freq", names, copies=True, num_written=0)]
    return []


def _angles(model: Any) -> torch.Tensor:
    rotary = model.get_mixin("cross").tower.get_mixin("rotary")
    found: torch.Tensor = rotary.angles(rotary.head_width, torch.device("cpu"))
    return found


def _cosines(model: Any) -> torch.Tensor:
    return _angles(model).cos()


def _sines(model: Any) -> torch.Tensor:
    return _angles(model).sin()


def _is(*names: str) -> Any:
    return lambda config: str(config.get("model_class", "")).rpartition(".")[2] in names


FORMATS = [
    Format(
        "sat-llama", LLaMA, _is("LLaMAModel", "RotaryLLaMAModel"), read_llama, language_rules,
        ignored=tuple(map(re.escape, FREQUENCIES)), write_config=write_llama, lacks=("norm_cast", "rope_tables"),
    ),
    Format(
        "sat-cogvlm", CogVLM, _is("CogVLMModel", "FineTuneTrainCogVLMModel", "FineTuneTestCogVLMModel"),
        read_cogvlm, cogvlm_rules, write_config=write_cogvlm, lacks=cogvlm.HF.lacks, aliases=cogvlm.HF.aliases,
    ),
    Format(
        "sat-cogagent", CogAgent, _is("CogAgentModel", "FineTuneTrainCogAgentModel", "FineTuneTestCogAgentModel"),
        read_cogagent, cogagent_rules, ignored=(rf"mixins\.encoder\.vit\.model\.{L_ROPE_TABLES}",),
        write_config=write_cogagent, lacks=cogagent.HF.lacks, aliases=cogagent.HF.aliases, finish=cogagent.finish,
    ),
]
