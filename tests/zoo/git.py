"""GIT beside its HF implementation."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from mixformer.objectives import LanguageObjective
from tests.zoo.harness import Size, System, difference, jittered, reloaded

NUM_FEATURES = 17  # 16 patches and the cls token
PLACEHOLDER = 96


def tiny_git(num_frames: int | None = None) -> Any:
    """A small GIT with noise on every parameter."""
    from transformers import GitConfig, GitForCausalLM

    torch.manual_seed(0)
    vision = {
        "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 16, "patch_size": 4, "layer_norm_eps": 1e-4,
    }
    config = GitConfig(
        vision_config=vision, vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        num_image_with_embedding=num_frames, bos_token_id=5, eos_token_id=6, pad_token_id=0,
    )
    config._attn_implementation = "eager"
    return jittered(GitForCausalLM(config))


def with_pictures(ids: torch.Tensor, mask: torch.Tensor, num_images: int = 1) -> dict[str, torch.Tensor]:
    """Ids and masks with the placeholders of pictures in front, as ours wants them."""
    types = torch.zeros_like(ids).new_ones(len(ids), num_images * NUM_FEATURES)
    return {
        "input_ids": torch.cat([types * PLACEHOLDER, ids], dim=1),
        "attention_mask": torch.cat([types, mask], dim=1),
        "token_type_ids": torch.cat([types, torch.zeros_like(ids)], dim=1),
    }


def sample(num_images: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Text [2, 8], its padding mask, and pictures [2, images, 3, 16, 16]."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(7, 90, (2, 8), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return ids, mask, torch.randn(2, num_images, 3, 16, 16, generator=generator)


def labels_of(batch: dict[str, torch.Tensor], num_images: int = 1) -> torch.Tensor:
    """All real text but its first token, which HF does not learn."""
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, : num_images * NUM_FEATURES + 1] = -100
    return labels


@torch.no_grad()
def parity() -> dict[str, float]:
    """Logits of pictures and text, with padding and of videos, and the loss."""
    found = {}
    for what, frames in (("picture", None), ("video", 3)):
        reference = tiny_git(frames)
        with tempfile.TemporaryDirectory() as folder:
            model = reloaded(reference, Path(folder)).eval()
        num_images = frames or 1
        ids, mask, images = sample(num_images)
        batch = with_pictures(ids, mask, num_images)
        real = batch["attention_mask"].bool()
        pixels = images if frames else images[:, 0]
        theirs = reference(ids, mask, pixel_values=pixels, labels=ids.masked_fill(mask == 0, -100))
        batch["images"] = images.flatten(0, 1)
        if frames:
            batch["frame_ids"] = torch.arange(frames).repeat(2)
        losses = LanguageObjective()(model, {**batch, "labels": labels_of(batch, num_images)})
        found[f"{what}: logits"] = difference(model(**batch)[real], theirs.logits[real])
        found[f"{what}: loss"] = difference(losses["language"], theirs.loss)
    return found


_SOURCE = "HF GitForCausalLM with the released configuration"

SYSTEM = System(
    name="GIT",
    key="git",
    family="joint",
    paper="2205.14100",
    model="models.git:GIT",
    loss="next token of the text, smoothed by 0.1 over the other tokens",
    reference="HF GitForCausalLM",
    parity=parity,
    sizes={
        "GIT-base": Size(176_619_066, _SOURCE),
        "GIT-large": Size(394_196_026, _SOURCE, "large.yaml"),
        "GIT-base for videos": Size(176_623_674, _SOURCE, "video.yaml"),
    },
    chats=True,
    images=True,
)
