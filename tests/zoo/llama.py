"""LLaMA, Mistral and Qwen2 beside their HF implementations."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from mixformer import KVCache
from mixformer.objectives import LanguageObjective
from tests.zoo.harness import Size, System, difference, jittered, reloaded

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "LLaMA": ("Llama", {}),
    "LLaMA with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "LLaMA with wide heads": ("Llama", {"head_dim": 12, "attention_bias": True}),
    "LLaMA 3": ("Llama", {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}}),
    "LLaMA, linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}}),
    "LLaMA, yarn": ("Llama", {
        "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16,
        },
    }),
    "LLaMA, dynamic": ("Llama", {
        "max_position_embeddings": 8, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    }),
    "Mistral": ("Mistral", {"sliding_window": None, "head_dim": 12}),
    "Mistral with a window": ("Mistral", {"sliding_window": 4}),
    "Qwen2": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "Qwen2 with a tied head": ("Qwen2", {"tie_word_embeddings": True}),
}


def reference_of(variant: str) -> Any:
    """A small reference with noise on every parameter."""
    import transformers

    family, options = VARIANTS[variant]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, "pad_token_id": 0, **options})
    return jittered(getattr(transformers, f"{family}ForCausalLM")(config))


def sample() -> torch.Tensor:
    """Token ids [2, 14]."""
    return torch.randint(2, 97, (2, 14), generator=torch.Generator().manual_seed(1))


def padded(ids: torch.Tensor, side: str, num_padded: int = 5) -> dict[str, torch.Tensor]:
    """Ids whose last row is padded on a side, with the mask, and the positions that HF would count in `generate`."""
    ids, mask = ids.clone(), torch.ones_like(ids)
    place = slice(None, num_padded) if side == "left" else slice(-num_padded, None)
    ids[-1, place], mask[-1, place] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


def cached(model: Any, ids: torch.Tensor, sizes: tuple[int, ...], **inputs: Any) -> torch.Tensor:
    """Logits of a sequence that is run in chunks of these sizes; further inputs go with the first."""
    cache, found = KVCache(model, len(ids), ids.shape[1]), []
    for index, chunk in enumerate(ids.split(list(sizes), dim=1)):
        found.append(model(chunk, cache=cache, **(inputs if index == 0 else {})))
    return torch.cat(found, dim=1)


def their_cached(reference: Any, ids: torch.Tensor, sizes: tuple[int, ...], **inputs: Any) -> torch.Tensor:
    """The same by the reference; further inputs go with every chunk."""
    found, past = [], None
    for chunk in ids.split(list(sizes), dim=1):
        out = reference(input_ids=chunk, past_key_values=past, use_cache=True, **inputs)
        past = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, dim=1)


@torch.no_grad()
def compare_language(model: Any, reference: Any, alone: bool = False, **inputs: Any) -> dict[str, float]:
    """Logits, hidden states, loss, cached steps and padding of a causal model and its reference.

    Args:
        model: ours.
        reference: theirs.
        alone: padded rows are compared with the same rows alone, as the reference would let the longest row of the
            batch, and of batches before, change the others.
        inputs: further ones of both.
    """
    ids, chunks = sample(), (6, 1, 4, 1, 1, 1)
    theirs = reference(ids, labels=ids, output_hidden_states=True, **inputs)
    out = model.run(ids, hidden_layers=("embeddings", 0, "final"), **inputs)
    hidden = dict(zip(("embeddings", 0, "final"), theirs.hidden_states, strict=True))
    losses = LanguageObjective()(model, {"input_ids": ids, "labels": ids, **inputs})
    found = {
        "logits": difference(out.logits, theirs.logits),
        "hidden states": max(difference(out.hidden[place], hidden[place]) for place in hidden),
        "loss": difference(losses["language"], theirs.loss),
    }
    stepped = their_cached(reference, ids, chunks, **inputs)
    found["cached steps"] = difference(cached(model, ids, chunks, **inputs), stepped)
    for side in ("left", "right"):
        batch = padded(ids, side)
        real = batch["attention_mask"].bool()
        ours = model(batch["input_ids"], batch["attention_mask"], **inputs)
        if alone:
            reference(ids[:, :2])  # a short row makes it forget the longer ones
            ours, expected = ours[-1][real[-1]], reference(ids[-1:, real[-1]]).logits[0]
        else:
            ours, expected = ours[real], reference(**batch, **inputs).logits[real]
        found[f"padding on the {side}"] = difference(ours, expected)
    return found


def parity() -> dict[str, float]:
    """Every variant."""
    found = {}
    for variant in VARIANTS:
        reference = reference_of(variant)
        with tempfile.TemporaryDirectory() as folder:
            model = reloaded(reference, Path(folder))
        results = compare_language(model, reference, alone="dynamic" in variant)
        found |= {f"{variant}: {what}": value for what, value in results.items()}
    return found


_SOURCE = "HF's count of the released configuration"

SYSTEM = System(
    name="LLaMA, Mistral, Qwen2",
    key="llama",
    family="base",
    paper="2302.13971",
    model="models.llama:LLaMA",
    loss="next token",
    reference="HF LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM",
    parity=parity,
    sizes={
        "LLaMA-7B": Size(6_738_415_616, _SOURCE),
        "LLaMA-65B": Size(65_285_660_672, _SOURCE, "65b.yaml"),
        "LLaMA-2-70B": Size(68_976_648_192, _SOURCE, "llama2_70b.yaml"),
        "LLaMA-3.1-8B": Size(8_030_261_248, _SOURCE, "llama3_8b.yaml"),
        "Mistral-7B": Size(7_241_732_096, _SOURCE, "mistral_7b.yaml"),
        "Qwen2-7B": Size(7_615_616_512, _SOURCE, "qwen2_7b.yaml"),
        "Qwen2-0.5B": Size(494_032_768, _SOURCE, "qwen2_0.5b.yaml"),
        "InternLM2-7B": Size(7_737_708_544, "HF's count of a LLaMA of the released sizes", "internlm2_7b.yaml"),
    },
    chats=True,
)
