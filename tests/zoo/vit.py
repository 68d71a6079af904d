"""ViT beside HF's."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from mixformer import from_pretrained
from tests.zoo.harness import Size, System, difference, jittered

TINY: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 4,
}


def picture(num_images: int = 3, side: int = TINY["image_size"]) -> torch.Tensor:
    """Random pictures [m, 3, y, x]."""
    return torch.randn(num_images, 3, side, side, generator=torch.Generator().manual_seed(1))


def reference(**changes: Any) -> Any:
    """A tiny jittered `ViTForImageClassification`."""
    from transformers import ViTConfig, ViTForImageClassification

    return jittered(ViTForImageClassification(ViTConfig(**{**TINY, "num_labels": 5, **changes})))


@torch.no_grad()
def parity() -> dict[str, float]:
    """Logits, loss, and every kind of features."""
    theirs, images, labels = reference(), picture(), torch.tensor([4, 0, 2])
    expected = theirs(images, labels=labels, output_hidden_states=True)
    last = theirs.vit(images).last_hidden_state
    unnormed = expected.hidden_states[-2]
    wanted: dict[str, tuple[dict[str, Any], torch.Tensor]] = {
        "cls token": ({"output": "cls"}, last[:, 0]),
        "tokens": ({"output": "tokens"}, last),
        "patches": ({"output": "patches"}, last[:, 1:]),
        "patches of the last layer but one": (
            {"output": "patches", "output_norm": False, "num_layers_run": 2}, unnormed[:, 1:],
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(Path(folder))
        model = from_pretrained(folder)
        loss = model.objective(model, {"images": images, "labels": labels})["classification"]
        found = {
            "logits": difference(model(images=images), expected.logits), "loss": difference(loss, expected.loss),
        }
        for what, (options, features) in wanted.items():
            found[what] = difference(from_pretrained(folder, overrides=options)(images=images), features)
    bare = reference(qkv_bias=False)
    with tempfile.TemporaryDirectory() as folder:
        bare.save_pretrained(Path(folder))
        found["logits without biases of q, k and v"] = difference(
            from_pretrained(folder)(images=images), bare(images).logits
        )
    return found


SYSTEM = System(
    name="ViT",
    key="vit",
    family="tower",
    paper="2010.11929",
    model="models.vit:ViT",
    loss="cross entropy of the class",
    reference="HF ViTForImageClassification",
    parity=parity,
    sizes={
        "B/16": Size(86_567_656, "HF's count"),
        "L/16": Size(304_326_632, "HF's count", "l16.yaml"),
        "H/14": Size(632_045_800, "HF's count", "h14.yaml"),
    },
)
