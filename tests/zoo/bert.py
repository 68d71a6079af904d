"""BERT beside its HF implementation."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from mixformer.objectives import MaskedLanguageObjective
from tests.zoo.harness import Size, System, difference, jittered, reloaded


def tiny_bert(kind: str = "BertForPreTraining", **options: Any) -> Any:
    """A small BERT with noise on every parameter."""
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "max_position_embeddings": 40, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return jittered(getattr(transformers, kind)(transformers.BertConfig(**{**sizes, **options})))


def sample(side: str) -> dict[str, torch.Tensor]:
    """Ids [2, 12] of two segments; the second row is padded on a side."""
    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(1))
    mask, segments = torch.ones_like(ids), (torch.arange(12) > 6).long().expand(2, -1).clone()
    place = slice(None, 3) if side == "left" else slice(-3, None)
    ids[1, place], mask[1, place], segments[1, place] = 0, 0, 0
    return {"input_ids": ids, "attention_mask": mask, "segment_ids": segments}


def their_inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch under HF's names, with the positions that we count where padding is on the left."""
    theirs = dict(batch)
    theirs["token_type_ids"] = theirs.pop("segment_ids")
    theirs["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    return theirs


def rows_alone(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Each row without its padding; HF reads the first slot as the first token, padding or not."""
    masks = batch["attention_mask"].bool()
    return [{name: x[index : index + 1, mask] for name, x in batch.items()} for index, mask in enumerate(masks)]


@torch.no_grad()
def parity() -> dict[str, float]:
    """Word and sentence logits, both losses, hidden states, padding on either side, and the model without sentences."""
    reference = tiny_bert()
    with tempfile.TemporaryDirectory() as folder:
        model = reloaded(reference, Path(folder))
    found: dict[str, float] = {}
    for side in ("left", "right"):
        batch = sample(side)
        real = batch["attention_mask"].bool()
        theirs = reference(**their_inputs(batch), output_hidden_states=True)
        out = model.run(**batch, hidden_layers=("embeddings", 0, "final"))
        hidden = dict(zip(("embeddings", 0, "final"), theirs.hidden_states, strict=True))
        alone = [reference(**their_inputs(row)).seq_relationship_logits for row in rows_alone(batch)]
        found |= {
            f"words, padding on the {side}": difference(out.logits[real], theirs.prediction_logits[real]),
            f"sentences, padding on the {side}": difference(out.outputs["sentence"], torch.cat(alone)),
            f"hidden states, padding on the {side}": max(
                difference(out.hidden[place][real], hidden[place][real]) for place in hidden
            ),
        }
    masked = (torch.rand(real.shape, generator=torch.Generator().manual_seed(2)) < 0.3) & real
    labels, sentences = batch["input_ids"].masked_fill(~masked, -100), torch.tensor([0, 1])
    batch["input_ids"] = batch["input_ids"].masked_fill(masked, 4)
    theirs = reference(**their_inputs(batch), labels=labels, next_sentence_label=sentences)
    losses = MaskedLanguageObjective()(model, {**batch, "labels": labels, "next_sentence_labels": sentences})
    found["loss"] = difference(losses["masked_language"] + losses["next_sentence"], theirs.loss)
    ids = sample("right")["input_ids"]
    found["words, one segment"] = difference(model(ids), reference(ids).prediction_logits)
    words = tiny_bert("BertForMaskedLM", type_vocab_size=3)
    with tempfile.TemporaryDirectory() as folder:
        model = reloaded(words, Path(folder))
    batch = sample("right")
    batch["segment_ids"][0, :2] = 2
    real = batch["attention_mask"].bool()
    found["words, no sentence head"] = difference(model(**batch)[real], words(**their_inputs(batch)).logits[real])
    return found


_SOURCE = "HF BertForPreTraining's count"

SYSTEM = System(
    name="BERT",
    key="bert",
    family="base",
    paper="1810.04805",
    model="models.bert:BERT",
    loss="masked words, and whether the second segment follows the first",
    reference="HF BertForPreTraining, BertForMaskedLM",
    parity=parity,
    sizes={
        "BERT-base": Size(110_106_428, _SOURCE),
        "BERT-large": Size(336_226_108, _SOURCE, "large.yaml"),
    },
)
