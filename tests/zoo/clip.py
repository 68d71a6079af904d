"""CLIP and its vision tower beside HF's."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mixformer import from_pretrained
from tests.zoo.harness import Size, System, difference, jittered
from tests.zoo.vit import TINY, picture

EOS = 90
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97,
    "max_position_embeddings": 24, "bos_token_id": 89, "pad_token_id": EOS,
}


def reference(eos_token_id: int = EOS, activation: str = "quick_gelu") -> Any:
    """A tiny jittered `CLIPModel`; an end-of-text id of 2 is the legacy way to say the highest id."""
    from transformers import CLIPConfig, CLIPModel

    text = {**TEXT, "eos_token_id": eos_token_id, "hidden_act": activation}
    vision = {**TINY, "hidden_act": activation}
    return jittered(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)))


def texts(end: int = EOS) -> dict[str, torch.Tensor]:
    """Three texts, padded on the right with their end-of-text id; ids are below it."""
    ids = torch.randint(3, 89, (3, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row, length in enumerate((9, 4, 6)):
        ids[row, length - 1 :] = end
        mask[row, length:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def compared(theirs: Any, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """{what: difference} between a reference and its saved folder."""
    images = picture()
    expected = theirs(**batch, pixel_values=images, return_loss=True)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(Path(folder))
        model = from_pretrained(folder)
    out = model.run(**batch, images=images)
    text_alone = model.run(**batch).outputs["text_features"]
    loss = model.objective(model, {**batch, "images": images})["contrastive"]
    real = batch["attention_mask"].bool()
    return {
        "text hidden states": difference(out.logits[real], expected.text_model_output.last_hidden_state[real]),
        "text features": difference(out.outputs["text_features"], expected.text_embeds),
        "text features alone": difference(text_alone, F.normalize(theirs.get_text_features(**batch).pooler_output)),
        "image features": difference(out.outputs["image_features"], expected.image_embeds),
        "image features alone": difference(model.get_mixin("contrast").encode(images), expected.image_embeds),
        "logits per text": difference(out.outputs["logits_per_text"], expected.logits_per_text),
        "logits per image": difference(out.outputs["logits_per_image"], expected.logits_per_image),
        "loss": difference(loss, expected.loss),
    }


@torch.no_grad()
def tower_parity() -> dict[str, float]:
    """Every output of the vision tower alone."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    theirs, images = jittered(CLIPVisionModelWithProjection(CLIPVisionConfig(**TINY, projection_dim=20))), picture()
    expected = theirs(images, output_hidden_states=True)
    hidden, norm = expected.hidden_states, theirs.vision_model.post_layernorm
    pooled = theirs.vision_model(images).pooler_output
    wanted: dict[str, tuple[dict[str, Any], torch.Tensor]] = {
        "projected": ({}, expected.image_embeds),
        "pooled": ({"output": "pooled"}, pooled),
        "tokens": ({"output": "tokens"}, hidden[-1]),
        "tokens after the norm": ({"output": "tokens", "output_norm": True}, norm(hidden[-1])),
        "patches of the last layer but one": ({"output": "patches", "num_layers_run": 2}, hidden[-2][:, 1:]),
        "patches after the norm": ({"output": "patches", "output_norm": True}, norm(hidden[-1])[:, 1:]),
    }
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(Path(folder))
        return {
            f"tower: {what}": difference(from_pretrained(folder, overrides=options)(images=images), features)
            for what, (options, features) in wanted.items()
        }


@torch.no_grad()
def parity() -> dict[str, float]:
    """Features, similarities and loss, with either way to find the end of a text; and the tower alone."""
    found = compared(reference(), texts())
    legacy = compared(reference(eos_token_id=2, activation="gelu"), texts(end=96))
    return {**found, **{f"highest id: {what}": value for what, value in legacy.items()}, **tower_parity()}


SYSTEM = System(
    name="CLIP",
    key="clip",
    family="tower",
    paper="2103.00020",
    model="models.clip:CLIP",
    loss="which picture belongs to which text of the batch, both ways",
    reference="HF CLIPModel and CLIPVisionModelWithProjection",
    parity=parity,
    sizes={
        "B/32": Size(151_277_313, "HF's count"),
        "L/14": Size(427_616_513, "HF's count", "l14.yaml"),
        "L/14-336": Size(427_944_193, "HF's count", "l14_336.yaml"),
    },
)
