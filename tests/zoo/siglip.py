"""SigLIP's vision tower beside HF's."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mixformer import from_pretrained
from models.siglip import SigLIP
from tests.zoo.harness import Size, System, copy_weights, difference, jittered
from tests.zoo.vit import TINY, picture

SIDE = 18  # four whole patches and two pixels
CLASSES = 5


def reference(**changes: Any) -> Any:
    """A tiny jittered `SiglipVisionModel`."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return jittered(SiglipVisionModel(SiglipVisionConfig(**{**TINY, "image_size": SIDE, **changes})))


def classifier_parity(images: torch.Tensor) -> dict[str, float]:
    """Logits and loss of the class head on the mean of the patches."""
    from transformers import SiglipConfig, SiglipForImageClassification

    config = SiglipConfig(vision_config={**TINY, "image_size": SIDE}, num_labels=CLASSES)
    theirs, labels = jittered(SiglipForImageClassification(config)), torch.tensor([4, 0, 2])
    expected = theirs(images, labels=labels)
    with tempfile.TemporaryDirectory() as folder:
        theirs.vision_model.save_pretrained(Path(folder))
        features = from_pretrained(folder, overrides={"output": "patches"})
    model = SigLIP(replace(features.config, output="logits", num_classes=CLASSES)).eval()
    head = {f"mixins.head.linear.{name}": tensor for name, tensor in theirs.classifier.named_parameters()}
    copy_weights(model, {**features.state_dict(), **head})
    loss = model.objective(model, {"images": images, "labels": labels})["classification"]  # type: ignore[misc]
    return {"logits": difference(model(images=images), expected.logits), "loss": difference(loss, expected.loss)}


@torch.no_grad()
def parity() -> dict[str, float]:
    """Every kind of features, of pictures whose side is no multiple of the patch."""
    theirs, images = reference(), picture(side=SIDE)
    expected = theirs(images, output_hidden_states=True)
    wanted: dict[str, tuple[dict[str, Any], torch.Tensor]] = {
        "pooled": ({}, expected.pooler_output),
        "patches": ({"output": "patches"}, expected.last_hidden_state),
        "patches of the last layer but one": (
            {"output": "patches", "output_norm": False, "num_layers_run": 2}, expected.hidden_states[-2],
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(Path(folder))
        found = {
            what: difference(from_pretrained(folder, overrides=options)(images=images), features)
            for what, (options, features) in wanted.items()
        }
    return {**found, **classifier_parity(images)}


SYSTEM = System(
    name="SigLIP (vision tower)",
    key="siglip",
    family="tower",
    paper="2303.15343",
    model="models.siglip:SigLIP",
    loss="cross entropy of the class",
    reference="HF SiglipVisionModel and SiglipForImageClassification",
    parity=parity,
    sizes={
        "SO400M/14-384": Size(428_225_600, "HF's count", "so400m_384.yaml"),
    },
)
