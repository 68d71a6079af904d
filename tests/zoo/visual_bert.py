"""VisualBERT beside its HF implementation."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from mixformer.objectives import MaskedLanguageObjective
from tests.zoo.harness import Size, System, difference, jittered, reloaded

PLACEHOLDER = 1
FEATURE_SIZE = 20


def tiny_visual_bert() -> Any:
    """A small VisualBERT with noise on every parameter."""
    from transformers import VisualBertConfig, VisualBertForPreTraining

    torch.manual_seed(0)
    config = VisualBertConfig(
        vocab_size=97, hidden_size=32, visual_embedding_dim=FEATURE_SIZE, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        layer_norm_eps=1e-5, pad_token_id=0,
    )
    return jittered(VisualBertForPreTraining(config))


def sample() -> dict[str, torch.Tensor]:
    """HF's inputs: two texts of 8 and 5 tokens in two segments, 6 and 4 regions, labels of both losses."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 90, (2, 8), generator=generator)
    mask, regions_mask = torch.ones(2, 8, dtype=torch.int64), torch.ones(2, 6, dtype=torch.int64)
    mask[1, 5:], regions_mask[1, 4:] = 0, 0
    labels = torch.full((2, 14), -100)
    labels[0, 2], labels[0, 5], labels[1, 3] = 11, 70, 33
    return {
        "input_ids": ids, "attention_mask": mask, "token_type_ids": torch.tensor([[0] * 4 + [1] * 4] * 2),
        "visual_embeds": torch.randn(2, 6, FEATURE_SIZE, generator=generator),
        "visual_attention_mask": regions_mask, "labels": labels, "sentence_image_labels": torch.tensor([0, 1]),
    }


def as_ours(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same for our model: regions are placeholders behind the text."""
    regions = torch.ones_like(batch["visual_attention_mask"])
    text_types = torch.zeros_like(batch["input_ids"])
    return {
        "input_ids": torch.cat([batch["input_ids"], regions * PLACEHOLDER], dim=1),
        "attention_mask": torch.cat([batch["attention_mask"], batch["visual_attention_mask"]], dim=1),
        "token_type_ids": torch.cat([text_types, regions], dim=1),
        "segment_ids": torch.cat([batch["token_type_ids"], regions], dim=1),
        "images": batch["visual_embeds"],
    }


@torch.no_grad()
def parity() -> dict[str, float]:
    """Word logits of texts and regions, sentence logits and both losses; words that regions show."""
    reference = tiny_visual_bert()
    with tempfile.TemporaryDirectory() as folder:
        model = reloaded(reference, Path(folder))
    batch = sample()
    ours = as_ours(batch)
    real = ours["attention_mask"].bool()
    words = torch.tensor([[[1, 4, -1], [0, -1, -1], [2, 3, 6], [7, -1, -1], [5, 5, 1], [1, -1, -1]]] * 2)
    found = {}
    for what, extra in (("regions", {}), ("regions with words", {"image_text_alignment": words})):
        theirs, out = reference(**batch, **extra), model.run(**ours, **extra)
        found[f"{what}: words"] = difference(out.logits[real], theirs.prediction_logits[real])
        found[f"{what}: sentence"] = difference(out.outputs["sentence"], theirs.seq_relationship_logits)
        labels = {"labels": batch["labels"], "next_sentence_labels": batch["sentence_image_labels"]}
        losses = MaskedLanguageObjective()(model, {**ours, **extra, **labels})
        found[f"{what}: loss"] = difference(torch.stack(list(losses.values())).sum(), theirs.loss)
    return found


_SOURCE = "HF VisualBertForPreTraining with the released configurations"

SYSTEM = System(
    name="VisualBERT",
    key="visual_bert",
    family="joint",
    paper="1908.03557",
    model="models.visual_bert:VisualBERT",
    loss="masked words, and whether text and picture belong together",
    reference="HF VisualBertForPreTraining",
    parity=parity,
    sizes={
        "VQA, COCO": Size(112_074_812, _SOURCE),
        "NLVR2": Size(111_288_380, _SOURCE, "nlvr2.yaml"),
        "VCR": Size(110_895_164, _SOURCE, "vcr.yaml"),
    },
)
