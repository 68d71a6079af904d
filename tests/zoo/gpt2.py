"""GPT-2 beside its HF implementation, with and without cross attention."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.zoo.harness import Size, System, difference, jittered, reloaded
from tests.zoo.llama import cached, compare_language, sample, their_cached

NUM_FEATURES = 5


def tiny_gpt2(**options: Any) -> Any:
    """A small GPT-2 with noise on every parameter."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 96,
    }
    return jittered(GPT2LMHeadModel(GPT2Config(**{**sizes, **options})))


def features() -> dict[str, torch.Tensor]:
    """Encoder features of two rows, the second with fewer of them."""
    generator = torch.Generator().manual_seed(2)
    mask = torch.ones(2, NUM_FEATURES, dtype=torch.int64)
    mask[1, 3:] = 0
    return {
        "encoder_hidden_states": torch.randn(2, NUM_FEATURES, 32, generator=generator),
        "encoder_attention_mask": mask,
    }


@torch.no_grad()
def parity() -> dict[str, float]:
    """Language modelling alone; and with features, in one forward and step by step."""
    found = {}
    for what, options in (("plain", {}), ("narrow MLP", {"n_inner": 40}), ("cross", {"add_cross_attention": True})):
        reference = tiny_gpt2(**options)
        with tempfile.TemporaryDirectory() as folder:
            model = reloaded(reference, Path(folder))
        results = compare_language(model, reference)
        if what == "cross":
            given = features()
            results |= {f"{name}, features": x for name, x in compare_language(model, reference, **given).items()}
            whole = {"encoder_hidden_states": given["encoder_hidden_states"]}
            ids, chunks = sample(), (3, 1, 9, 1)
            stepped = their_cached(reference, ids, chunks, **whole)
            results["cached steps, all features"] = difference(cached(model, ids, chunks, **whole), stepped)
        found |= {f"{what}: {name}": value for name, value in results.items()}
    return found


_SOURCE = "HF GPT2LMHeadModel's count"

SYSTEM = System(
    name="GPT-2",
    key="gpt2",
    family="base",
    paper="Radford et al., 2019",
    model="models.gpt2:GPT2",
    loss="next token",
    reference="HF GPT2LMHeadModel",
    parity=parity,
    sizes={
        "GPT-2 small": Size(124_439_808, _SOURCE),
        "GPT-2 medium": Size(354_823_168, _SOURCE, "medium.yaml"),
        "GPT-2 large": Size(774_030_080, _SOURCE, "large.yaml"),
        "GPT-2 XL": Size(1_557_611_200, _SOURCE, "xl.yaml"),
        "GPT-2 small with cross attention": Size(152_806_656, _SOURCE, "cross_attention.yaml"),
    },
    chats=True,
)
