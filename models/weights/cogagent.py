"""CogAgent as HF files have it."""

from __future__ import annotations

from typing import Any

from models.cogagent import CogAgent
from models.weights import cogvlm
from models.weights.eva2_clip import L_ALIASES, L_ROPE_TABLES, l_heads, l_options, l_rules
from models.weights.rules import Format, Rule, Shapes, extent, rules_of

TOWER = "model.cross_vision."
LAYER = {
    "mixins.cross.norm.weight": "post_cross_attention_layernorm.weight",
    "mixins.cross.query.weight": "cross_attn.query.weight",
    "mixins.cross.key_value.weight": "cross_attn.key_value.weight",
    "mixins.cross.dense.weight": "cross_attn.dense.weight",
}
POSITIONS = {"mixins.cross.position_embedding": "pos_embed"}
ALIASES = {name: path and f"cross_vision.{path}" for name, path in L_ALIASES.items()}
LACKS = tuple(f"cross_vision.{name}" for name in ("num_layers_run", "num_heads", "pretraining_grid"))


def tower_rules(config: Any, foreign: str) -> list[Rule]:
    """Key table of the high-resolution branch outside the layers, which HF and SAT name alike behind a prefix."""
    found = rules_of(POSITIONS, foreign=foreign)
    return found + l_rules(config.cross_vision, "mixins.cross.tower.", f"{foreign}vit.model.")


def cross_layers(config: Any) -> range | list[int]:
    """Indices of the layers with cross attention."""
    return range(config.num_layers) if config.cross_layers is None else list(config.cross_layers)


def rules(config: Any) -> list[Rule]:
    """Key table of HF CogAgent."""
    found = cogvlm.rules(config) + tower_rules(config, TOWER)
    for i in cross_layers(config):
        found += rules_of(LAYER, f"transformer.layers.{i}.", f"model.layers.{i}.")
    return found


def cross_options(shapes: Shapes, tower: str, query: str, image_size: int) -> dict[str, Any]:
    """Options of the high-resolution branch.

    Args:
        shapes: of the tensors in the file.
        tower: prefix of the tower's names.
        query: name of a layer's query weight.
        image_size: side of its pictures.
    """
    vision, compute = l_options(shapes, f"{tower}vit.model.", image_size), extent(shapes, query, 0)
    return {"cross_vision": vision, "cross_compute_size": None if compute == vision["hidden_size"] else compute}


def read_config(config: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Options of `CogAgentConfig` from config.json and the shapes in the weights."""
    cross = cross_options(shapes, TOWER, "model.layers.0.cross_attn.query.weight", config["cross_image_size"])
    return {**cogvlm.read_config(config, shapes), **cross}


def finish(options: dict[str, Any]) -> dict[str, Any]:
    """The number of heads of the high-resolution tower from their width."""
    return {**options, "cross_vision": l_heads(options["cross_vision"])}


def write_config(config: Any) -> dict[str, Any]:
    """config.json of HF CogAgent."""
    return {
        **cogvlm.write_config(config),
        "architectures": ["CogAgentForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_cogagent.CogAgentConfig",
            "AutoModelForCausalLM": "modeling_cogagent.CogAgentForCausalLM",
        },
        "cross_compute_hidden_size": config.cross_compute_size or config.cross_vision.hidden_size,
        "cross_hidden_size": config.cross_vision.hidden_size,
        "cross_image_size": config.cross_vision.image_size,
    }


def _claims(config: dict[str, Any]) -> bool:
    return "cross_hidden_size" in config and "cross_image_size" in config


HF = Format(
    "hf-cogagent", CogAgent, _claims, read_config, rules,
    ignored=(rf"model\.cross_vision\.vit\.model\.{L_ROPE_TABLES}",), write_config=write_config,
    lacks=(*cogvlm.HF.lacks, *LACKS), aliases={**cogvlm.HF.aliases, **ALIASES}, finish=finish,
)
