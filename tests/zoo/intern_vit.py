"""InternViT beside HF's."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from mixformer import from_pretrained
from tests.zoo.harness import Size, System, difference, jittered
from tests.zoo.vit import TINY, picture

# the 6B kind, the 300M kind, and the latter with the final norm that HF has as an option
KINDS: dict[str, dict[str, Any]] = {
    "6B": {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False, "use_mean_pooling": True},
    "300M": {"norm_type": "layer_norm", "use_qk_norm": False, "attention_bias": True, "use_mean_pooling": True},
    "final norm": {"norm_type": "layer_norm", "use_qk_norm": False, "attention_bias": True, "use_mean_pooling": False},
}


def reference(kind: str) -> Any:
    """A tiny jittered `InternVLVisionModel`."""
    from transformers import InternVLVisionConfig, InternVLVisionModel

    sizes = {name: [value] * 2 if name in ("image_size", "patch_size") else value for name, value in TINY.items()}
    return jittered(InternVLVisionModel(InternVLVisionConfig(**sizes, **KINDS[kind])))


@torch.no_grad()
def parity() -> dict[str, float]:
    """Patches and tokens of each kind, and patches of the last layer but one."""
    found, images = {}, picture()
    for kind in KINDS:
        theirs = reference(kind)
        expected = theirs(images, output_hidden_states=True)
        wanted: dict[str, tuple[dict[str, Any], torch.Tensor]] = {
            "patches": ({}, expected.last_hidden_state[:, 1:]),
            "tokens": ({"output": "tokens"}, expected.last_hidden_state),
            "patches of the last layer but one": (
                {"num_layers_run": 2, "output_norm": False}, expected.hidden_states[-2][:, 1:],
            ),
        }
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(Path(folder))
            for what, (options, features) in wanted.items():
                ours = from_pretrained(folder, overrides=options)(images=images)
                found[f"{kind}: {what}"] = difference(ours, features)
    return found


SYSTEM = System(
    name="InternViT",
    key="intern_vit",
    family="tower",
    paper="2312.14238",
    model="models.intern_vit:InternViT",
    loss="cross entropy of the class, of a probe or of all",
    reference="HF InternVLVisionModel",
    parity=parity,
    sizes={
        "6B, 45 blocks": Size(5_536_496_000, "HF's count"),
        "6B, 48 blocks": Size(5_905_251_200, "HF's count", "6b_48.yaml"),
        "300M": Size(304_012_288, "HF's count", "300m.yaml"),
    },
)
