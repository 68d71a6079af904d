"""GIT as HF files have it."""

from __future__ import annotations

from typing import Any

from models.git import GIT
from models.weights import bert, clip
from models.weights.rules import Format, Rule, Shapes, rules_of, with_bias

TOWER = "mixins.image.tower."
FRAMES = "git.img_temporal_embedding.{i}"
TOP = {
    "transformer.word_embeddings.weight": "git.embeddings.word_embeddings.weight",
    "transformer.position_embeddings.weight": "git.embeddings.position_embeddings.weight",
    **with_bias({
        "transformer.embedding_norm": "git.embeddings.LayerNorm",
        "mixins.image.projector.linears.0": "git.visual_projection.visual_projection.0",
        "mixins.image.projector.output_norm": "git.visual_projection.visual_projection.1",
        "mixins.head.linear": "output",
    }),
}
DEFAULTS = {
    "hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
}


def _rules(config: Any) -> list[Rule]:
    found = rules_of(TOP) + bert.layer_rules(config, "git.")
    frames = config.vision.num_frames
    if frames is not None:
        vectors = tuple(FRAMES.format(i=i) for i in range(frames))
        found.append(Rule(f"{TOWER}mixins.frames.table", vectors, rows=(1,) * frames))
    return found + clip.vision_rules(config.vision, TOWER, "git.image_encoder.vision_model.")


def _read(config: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    if config.get("tie_word_embeddings"):
        raise ValueError("its word embedding and head are tied, which no release of GIT has.")
    vision = config.get("vision_config") or {}
    sizes = clip.sizes(vision, clip.VISION_DEFAULTS)
    return {
        **clip.sizes({"hidden_act": "gelu", **config}, DEFAULTS),
        "vocab_size": config.get("vocab_size", 30522),
        "max_positions": config.get("max_position_embeddings", 1024),
        "init_std": config.get("initializer_range", 0.02),
        "vision": {
            **sizes, **clip.picture_options(vision, 224, 16), "num_frames": config.get("num_image_with_embedding"),
        },
        "adapter": {"norm": "post", "norm_eps": sizes["norm_eps"]},
    }


def _write(config: Any) -> dict[str, Any]:
    vision = {**clip.foreign_sizes(config.vision), **clip.picture_config(config.vision)}
    return {
        **clip.foreign_sizes(config),
        "architectures": ["GitForCausalLM"],
        "bos_token_id": 101,
        "eos_token_id": 102,
        "initializer_range": config.init_std,
        "max_position_embeddings": config.max_positions,
        "model_type": "git",
        "num_image_with_embedding": config.vision.num_frames,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "vision_config": {**vision, "model_type": "git_vision_model"},
        "vocab_size": config.vocab_size,
    }


HF = Format(
    "hf-git", GIT, lambda config: config.get("model_type") == "git", _read, _rules, ignored=(clip.POSITION_IDS,),
    write_config=_write, lacks=("image_token_id",),
)
