"""LLaVA as HF files have it, and what InternVL's have alike."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mixformer.connectors import ProjectorConfig
from models.clip import CLIPVisionConfig
from models.llava import LLaVA
from models.weights import clip, llama
from models.weights.rules import Format, Rule, Shapes, activation, foreign_activation, rules_of

TOWER, PROJECTOR = "mixins.image.tower.", "mixins.image.projector."
LINEARS = {
    f"linears.{place}.{kind}": f"linear_{place + 1}.{kind}" for place in range(2) for kind in ("weight", "bias")
}
HEAD = "language_model.lm_head.weight"
RENAMES = (
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
)
IGNORED = (r"language_model\.model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
STRATEGIES = {"default": "patches", "full": "tokens"}
READABLE = tuple(STRATEGIES.values())


def language_rules(config: Any) -> list[Rule]:
    """Key table of the language model."""
    return llama.rules(config, "language_model.model.", HEAD)


def language_options(config: dict[str, Any], shapes: Shapes, usual: str, tied: bool) -> dict[str, Any]:
    """Options of the language model from the whole config.json.

    Releases of one system say in different places whether the head is the word embedding; a head of its own in the
    weights settles what is left open.

    Args:
        config: its content.
        shapes: of the tensors in the file.
        usual: type of the language model where the file names none.
        tied: whether there is no head where the file does not say.
    """
    text = {"model_type": usual, **(config.get("text_config") or {})}
    outer, inner = config.get("tie_word_embeddings"), bool(text.get("tie_word_embeddings"))
    if HEAD in shapes:
        text["tie_word_embeddings"] = inner if outer is None else outer
    else:
        text["tie_word_embeddings"] = inner or (tied if outer is None else outer)
    return llama.read_text_config(text, shapes)


def layers_run(config: dict[str, Any], usual: int, num_layers: int) -> int:
    """How many layers of the tower run, from `vision_feature_layer`.

    Raises:
        ValueError: features of several layers, or of none.
    """
    layer = config.get("vision_feature_layer", usual)
    run = layer if not isinstance(layer, int) or layer >= 0 else num_layers + 1 + layer
    if not isinstance(run, int) or not 1 <= run <= num_layers:
        raise ValueError(
            f"it reads the pictures' features from vision_feature_layer {layer}; supported is one layer, from "
            f"-{num_layers} (the first of {num_layers}) to -1."
        )
    return run


def selected(config: dict[str, Any]) -> str:
    """The tower's output, from `vision_feature_select_strategy`.

    Raises:
        ValueError: another strategy than HF's two.
    """
    strategy = config.get("vision_feature_select_strategy", "default")
    if strategy not in STRATEGIES:
        raise ValueError(f"its vision_feature_select_strategy is '{strategy}'. Known: {', '.join(STRATEGIES)}.")
    return STRATEGIES[strategy]


def common_config(config: Any) -> dict[str, Any]:
    """What config.json says alike in both formats; the language model is of the type that has its biases and window."""
    kind = "qwen2" if config.bias == "qkv" else "llama" if config.sliding_window is None else "mistral"
    text = {name: value for name, value in llama.write_config(config, kind).items() if name != "architectures"}
    strategies = {ours: theirs for theirs, ours in STRATEGIES.items()}
    return {
        "image_seq_length": config.adapter.num_tokens(config.vision.num_features),
        "projector_hidden_act": foreign_activation(config.adapter.activation),
        "text_config": text,
        "tie_word_embeddings": config.tied_head,
        "vision_feature_layer": config.vision.layers_run - config.vision.num_layers - 1,
        "vision_feature_select_strategy": strategies[config.vision.output],
    }


def require_parts(config: Any, tower: type, adapter: ProjectorConfig, release: str) -> None:
    """Check that a model has the tower and the projector that a format holds.

    Args:
        config: of the model.
        tower: class of its tower's config.
        adapter: its projector's config; `activation` may differ.
        release: whose format it is.

    Raises:
        ValueError: another tower or projector, or no id for the places of pictures.
    """
    if config.image_token_id is None:
        raise ValueError(
            f"{release} in HF's form finds the places of pictures by their token, and this model has no "
            f"image_token_id. Set config.image_token_id."
        )
    found = config.adapter
    fits = isinstance(found, ProjectorConfig) and replace(found, activation=adapter.activation) == adapter
    if not fits or not isinstance(config.vision, tower) or getattr(config.vision, "output", "") not in READABLE:
        raise ValueError(
            f"The HF format of {release} holds a {tower.__name__.removesuffix('Config')} and the projector that "
            f"{release} has, and this model differs: vision is {config.vision!r}, adapter is {found!r}. Use "
            f"format='own'."
        )


def _rules(config: Any) -> list[Rule]:
    bias = getattr(config.adapter, "bias", True)
    require_parts(config, CLIPVisionConfig, ProjectorConfig(depth=2, bias=bias), "LLaVA")
    names = {ours: theirs for ours, theirs in LINEARS.items() if bias or theirs.endswith("weight")}
    found = language_rules(config) + rules_of(names, PROJECTOR, "multi_modal_projector.")
    return found + clip.vision_rules(config.vision, TOWER, "vision_tower.vision_model.")


def _read(config: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    vision = {"model_type": "clip_vision_model", **(config.get("vision_config") or {})}
    if vision["model_type"] != "clip_vision_model":
        raise ValueError(f"its tower is of type '{vision['model_type']}'; readable is clip_vision_model.")
    tower = clip.vision_options(vision)
    return {
        **language_options(config, shapes, "llama", False),
        "vision": {
            **tower, "num_layers_run": layers_run(config, -2, tower["num_layers"]), "output": selected(config),
        },
        "adapter": {
            "depth": 2,
            "activation": activation(config.get("projector_hidden_act", "gelu")),
            "bias": config.get("multimodal_projector_bias", True),
        },
        "image_token_id": config.get("image_token_index", config.get("image_token_id", 32000)),
    }


def _write(config: Any) -> dict[str, Any]:
    return {
        **common_config(config),
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": config.image_token_id,
        "model_type": "llava",
        "multimodal_projector_bias": config.adapter.bias,
        "vision_config": clip.vision_config(config.vision),
    }


HF = Format(
    "hf-llava", LLaVA, lambda config: config.get("model_type") == "llava", _read, _rules,
    ignored=(clip.POSITION_IDS, *IGNORED),
    renames=(*RENAMES, (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.")),
    write_config=_write, lacks=("rope_tables",),
)
