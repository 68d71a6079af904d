"""BERT as HF files have it, with a head for masked words, and one for next sentences where the file has it."""

from __future__ import annotations

from typing import Any

from mixformer.transformer import qkv_parts
from models.bert import BERT
from models.weights.rules import Format, Rule, Shapes, activation, foreign_activation, fused, rules_of, with_bias

EMBEDDINGS = {
    "transformer.position_embeddings.weight": "embeddings.position_embeddings.weight",
    "mixins.segments.table": "embeddings.token_type_embeddings.weight",
    **with_bias({"transformer.embedding_norm": "embeddings.LayerNorm"}),
}
LAYER = with_bias({
    "attention.dense": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
    "mlp_norm": "output.LayerNorm",
})
QKV = ("attention.self.query", "attention.self.key", "attention.self.value")
WORDS = with_bias({"mixins.head.dense": "transform.dense", "mixins.head.norm": "transform.LayerNorm"})
SENTENCE = with_bias({"mixins.sentence.dense": "{model}pooler.dense", "mixins.sentence.linear": "cls.seq_relationship"})
RENAMES = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))


def layer_rules(config: Any, foreign: str) -> list[Rule]:
    """Key table of the layers; `foreign` ends where `encoder` begins."""
    found, parts = [], dict(zip(QKV, qkv_parts(config).values(), strict=True))
    for i in range(config.num_layers):
        layer, theirs = f"transformer.layers.{i}.", f"{foreign}encoder.layer.{i}."
        found += fused(f"{layer}attention.qkv", theirs, parts, ("weight", "bias"))
        found += rules_of(LAYER, layer, theirs)
    return found


def rules(config: Any, foreign: str = "bert.") -> list[Rule]:
    """Key table of HF BERT with its heads; `foreign` is what the encoder's names begin with."""
    words = f"{foreign}embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
    biases = "cls.predictions.bias", "cls.predictions.decoder.bias"
    found = [
        Rule("transformer.word_embeddings.weight", words, copies=True, num_written=1),
        Rule("mixins.head.bias", biases, copies=True, num_written=1),
        *rules_of(EMBEDDINGS, foreign=foreign),
        *rules_of(WORDS, foreign="cls.predictions."),
        *layer_rules(config, foreign),
    ]
    if config.next_sentence:
        found += rules_of({ours: theirs.format(model=foreign) for ours, theirs in SENTENCE.items()})
    return found


def read_config(config: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Options of `BERTConfig` from config.json; the weights tell whether there is a head for next sentences.

    Raises:
        ValueError: a variant that is not supported (decoders, relative positions, a head of its own).
    """
    if config.get("is_decoder") or config.get("add_cross_attention"):
        raise ValueError("it is a decoder, which is not supported; as an encoder it has is_decoder: false.")
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(f"its positions are '{config['position_embedding_type']}'; supported are 'absolute' ones.")
    if not config.get("tie_word_embeddings", True):
        raise ValueError("its word embedding and head are not tied, which is not supported.")
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "inner_hidden_size": config["intermediate_size"],
        "norm_eps": config.get("layer_norm_eps", 1e-12),
        "activation": activation(config.get("hidden_act", "gelu")),
        "max_positions": config["max_position_embeddings"],
        "num_segments": config.get("type_vocab_size", 2),
        "next_sentence": "cls.seq_relationship.weight" in shapes,
        "init_std": config.get("initializer_range", 0.02),
    }


def write_config(config: Any) -> dict[str, Any]:
    """config.json of HF BERT."""
    return {
        "architectures": ["BertForPreTraining" if config.next_sentence else "BertForMaskedLM"],
        "hidden_act": foreign_activation(config.activation),
        "hidden_size": config.hidden_size,
        "initializer_range": config.init_std,
        "intermediate_size": config.inner_size,
        "layer_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "model_type": "bert",
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
        "type_vocab_size": config.num_segments,
        "vocab_size": config.vocab_size,
    }


def _claims(config: dict[str, Any]) -> bool:
    if "model_type" in config:
        return bool(config["model_type"] == "bert")
    return not {"BertForPreTraining", "BertForMaskedLM"}.isdisjoint(config.get("architectures") or [])


HF = Format(
    "hf-bert", BERT, _claims, read_config, rules,
    ignored=(r"bert\.embeddings\.position_ids", r"bert\.pooler\..*"), renames=RENAMES, write_config=write_config,
)
