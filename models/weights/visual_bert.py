"""VisualBERT as HF files have it."""

from __future__ import annotations

from typing import Any

from models.visual_bert import VisualBERT
from models.weights import bert
from models.weights.rules import Format, Rule, Shapes, rules_of, with_bias

BODY = "visual_bert."
REGIONS = {
    "mixins.regions.position_table": "embeddings.visual_position_embeddings.weight",
    "mixins.regions.token_type_table": "embeddings.visual_token_type_embeddings.weight",
    **with_bias({"mixins.regions.projector.linears.0": "embeddings.visual_projection"}),
}


def _rules(config: Any) -> list[Rule]:
    return bert.rules(config, BODY) + rules_of(REGIONS, foreign=BODY)


def _read(config: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    if config.get("bypass_transformer"):
        raise ValueError("its regions bypass the transformer, which is not supported.")
    return {**bert.read_config(config, shapes), "feature_size": config.get("visual_embedding_dim", 512)}


def _write(config: Any) -> dict[str, Any]:
    return {
        **bert.write_config(config),
        "architectures": ["VisualBertForPreTraining"],
        "bypass_transformer": False,
        "model_type": "visual_bert",
        "special_visual_initialize": True,
        "visual_embedding_dim": config.feature_size,
    }


HF = Format(
    "hf-visual-bert", VisualBERT, lambda config: config.get("model_type") == "visual_bert", _read, _rules,
    ignored=(r"visual_bert\.embeddings\.position_ids",), renames=bert.RENAMES, write_config=_write,
    lacks=("image_token_id",),
)
