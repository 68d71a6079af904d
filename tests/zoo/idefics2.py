"""Idefics2 beside HF's, with pictures of several sizes in a batch."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from models.idefics2 import Idefics2
from tests.zoo.harness import Size, System, difference, jittered, reloaded

IMAGE = 96
PICTURES = [(24, 24), (13, 24), (24, 9), (17, 18)]
"""Height and width of the pictures in pixels; patches have 4, the square of positions has 24."""


def tiny_hf(**perceiver: Any) -> Any:
    """A small HF Idefics2 with noise on every parameter, and epsilons so large that a wrong one shows."""
    from transformers import Idefics2Config, Idefics2ForConditionalGeneration

    torch.manual_seed(0)
    text = {
        "model_type": "mistral", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 2e-3,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 24, "image_size": 24, "intermediate_size": 40, "num_attention_heads": 2,
        "num_hidden_layers": 2, "patch_size": 4, "layer_norm_eps": 5e-3,
    }
    resampler = {
        "hidden_size": 32, "rms_norm_eps": 1e-2, "resampler_n_latents": 3, "resampler_depth": 2,
        "resampler_n_heads": 4, "resampler_head_dim": 6, "num_key_value_heads": 2, **perceiver,
    }
    config = Idefics2Config(
        image_token_id=IMAGE, text_config=text, vision_config=vision, perceiver_config=resampler
    )
    return jittered(Idefics2ForConditionalGeneration(config))


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures [4, 3, 24, 24] with their own pixels at the top left, and the mask of those [4, 24, 24]."""
    generator = torch.Generator().manual_seed(2)
    images, mask = torch.zeros(4, 3, 24, 24), torch.zeros(4, 24, 24, dtype=torch.int64)
    for i, (height, width) in enumerate(PICTURES):
        images[i, :, :height, :width] = torch.randn(3, height, width, generator=generator)
        mask[i, :height, :width] = 1
    return images, mask


def by_row(tensor: torch.Tensor) -> torch.Tensor:
    """[4, ...] -> [2, 3, ...] as HF wants it: three pictures in the first row, one and two of zeros in the second."""
    rows = tensor.new_zeros(2, 3, *tensor.shape[1:])
    rows[0], rows[1, 0] = tensor[:3], tensor[3]
    return rows


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [2, 19], three pictures of 3 tokens in the first row and one in the second, and the padding."""
    ids = torch.randint(1, IMAGE, (2, 19), generator=torch.Generator().manual_seed(3))
    ids[0, 2:8] = ids[0, 11:14] = ids[1, 7:10] = IMAGE
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return ids, mask


@torch.no_grad()
def parity() -> dict[str, float]:
    """Pictures of one size and of several, and text alone: features, logits, the loss."""
    reference = tiny_hf()
    with tempfile.TemporaryDirectory() as folder:
        model = reloaded(reference, Path(folder) / "hf")
    images, own = padded()
    ids, mask = batch()
    labels, real = ids.masked_fill((ids == IMAGE) | (mask == 0), -100), mask.bool()
    labels[1, 5] = -100  # what comes after padding is learnt from a slot that says nothing
    given = {"input_ids": ids, "attention_mask": mask}
    theirs = reference(
        **given, pixel_values=by_row(images), pixel_attention_mask=by_row(own), labels=labels
    )
    ours = {**given, "images": images, "pixel_attention_mask": own}
    losses = Idefics2.objective(model, {**ours, "labels": labels})
    features = model.get_mixin("image").encode(images, pixel_attention_mask=own)
    square = reference(**given, pixel_values=by_row(images))
    wide = torch.randn(4, 3, 9, 22, generator=torch.Generator().manual_seed(4))
    no_square = reference(**given, pixel_values=by_row(wide))
    text = ids.clamp(max=IMAGE - 1)
    return {
        "image features": difference(features.flatten(0, 1), theirs.image_hidden_states),
        "logits": difference(model(**ours)[real], theirs.logits[real]),
        "loss": difference(losses["language"], theirs.loss),
        "logits without a mask of pixels": difference(model(**given, images=images)[real], square.logits[real]),
        "logits of wide pictures": difference(model(**given, images=wide)[real], no_square.logits[real]),
        "logits of text": difference(model(text, mask)[real], reference(text, mask).logits[real]),
    }


SYSTEM = System(
    name="Idefics2",
    key="idefics2",
    family="splice",
    paper="2405.02246",
    model="models.idefics2:Idefics2",
    loss="next token of text, not at pictures",
    reference="HF Idefics2",
    parity=parity,
    sizes={"Idefics2-8B": Size(8_402_768_112, "HF Idefics2 of the published sizes")},
    chats=True,
    images=True,
)
