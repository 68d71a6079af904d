"""ResNet as HF files have it."""

from __future__ import annotations

from typing import Any

from models.resnet import ResNet
from models.weights.rules import Format, Rule, Shapes, extent, label_names, rules_of, with_bias

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
HEAD = with_bias({"mixins.head.linear": "classifier.1"})


def _convolution(own: str, foreign: str) -> list[Rule]:
    norm = {f"norm.{kind}": f"normalization.{kind}" for kind in NORM}
    return rules_of({"conv.weight": "convolution.weight", **norm}, own, foreign)


def _rules(config: Any) -> list[Rule]:
    found = _convolution("mixins.stem.stem.", "resnet.embedder.embedder.")
    for stage, depth in enumerate(config.depths):
        for index in range(depth):
            own, foreign = f"mixins.stem.stages.{stage}.{index}.", f"resnet.encoder.stages.{stage}.layers.{index}."
            for place in range(3 if config.bottleneck else 2):
                found += _convolution(f"{own}branch.{place}.", f"{foreign}layer.{place}.")
            if index == 0 and (stage or config.channels[0] != config.channels[1]):
                found += _convolution(f"{own}shortcut.", f"{foreign}shortcut.")
    return found + (rules_of(HEAD) if config.output == "logits" else [])


def _read(config: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    if config.get("downsample_in_first_stage"):
        raise ValueError("its first stage halves the size (downsample_in_first_stage), which is not supported.")
    if config.get("hidden_act", "relu") != "relu":
        raise ValueError(f"its activation is {config['hidden_act']!r}; only relu is supported.")
    channels = [config.get("embedding_size", 64), *config.get("hidden_sizes", [256, 512, 1024, 2048])]
    classes: dict[str, Any] = {"output": "pooled"}
    if "classifier.1.weight" in shapes:
        classes = {"output": "logits", "num_classes": extent(shapes, "classifier.1.weight", 0)}
    return {
        "channels": channels,
        "depths": list(config.get("depths", [3, 4, 6, 3])),
        "bottleneck": config.get("layer_type", "bottleneck") == "bottleneck",
        "downsample_in_bottleneck": config.get("downsample_in_bottleneck", False),
        "in_channels": config.get("num_channels", 3),
        **classes,
    }


def _write(config: Any) -> dict[str, Any]:
    content = {
        "architectures": ["ResNetModel"],
        "depths": list(config.depths),
        "downsample_in_bottleneck": config.downsample_in_bottleneck,
        "downsample_in_first_stage": False,
        "embedding_size": config.channels[0],
        "hidden_act": "relu",
        "hidden_sizes": list(config.channels[1:]),
        "layer_type": "bottleneck" if config.bottleneck else "basic",
        "model_type": "resnet",
        "num_channels": config.in_channels,
    }
    if config.output == "logits":
        content.update(architectures=["ResNetForImageClassification"], **label_names(config.num_classes))
    return content


HF = Format(
    "hf-resnet", ResNet, lambda config: config.get("model_type") == "resnet", _read, _rules,
    ignored=(r"classifier\.1\.(weight|bias)",), renames=((r"^(?=(embedder|encoder)\.)", "resnet."),),
    write_config=_write, lacks=("image_size", "output"),
)
