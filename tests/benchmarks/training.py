"""Training: rows that are packed or padded, and features of a frozen tower that are kept or computed again."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from mixformer.data.feature_cache import CachedTower, FeatureCache
from mixformer.data.packing import first_fit_decreasing, pack
from mixformer.mixins.documents import DocumentsMixin
from mixformer.objectives import LanguageObjective
from mixformer.testing import collate, jitter, sample_row
from models.cogvlm import CogVLM, CogVLMConfig
from models.eva2_clip import EVA2CLIPEConfig
from models.llama import LLaMA, LLaMAConfig

from .harness import Group, Options, Run, case
from .peers import FULL, QUICK, gradients

Batch = dict[str, Any]
OBJECTIVE = LanguageObjective()
ROWS = 4


def mixed_lengths(number: int, longest: int) -> list[int]:
    """Lengths of samples, log-normal with a median of an eighth of the longest one; one has that length."""
    draws = torch.randn(number - 1, generator=torch.Generator().manual_seed(0))
    lengths = (draws * 0.8).exp() * longest / 8
    return [longest, *(int(length) for length in lengths.clamp(longest // 64 + 2, longest))]


def padded(samples: Sequence[Batch], width: int | None = None) -> Batch:
    """One batch of the samples, padded on the right to the longest of them or to `width`."""
    given = [sample for sample in samples]
    if width is not None:  # a row of padding only, which is taken out again
        given.append({name: torch.zeros(1, width, dtype=torch.int64) for name in ("input_ids", "labels")})
    batch = collate(given, "right")
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    return {name: value[: len(samples)] for name, value in batch.items()}


def trained(model: Any, batches: Callable[[], list[Batch]]) -> Run:
    """Loss over all tokens and its gradients, batch by batch."""

    def step() -> torch.Tensor:
        made = batches()
        counts = [OBJECTIVE.count(batch) for batch in made]
        losses = []
        for batch, count in zip(made, counts, strict=True):
            loss = OBJECTIVE(model, batch)["language"] * (count / sum(counts))
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    return Run(step, lambda: model.zero_grad(set_to_none=True), lambda: (step(), gradients(model)))


@case("packing", "Training on samples of mixed length")
def packing(options: Options) -> Iterator[Group]:
    """Loss and gradients of one set of samples, four rows at a time: padded to the longest sample of the set, padded to
    the longest of each four, and packed into rows as long as the longest sample, the packing itself included. All are
    the same numbers. Lengths are log-normal with a median of an eighth of the longest; useful tokens are those of
    samples. Useful tokens/s go with the inverse of the time, since all runs have the same useful tokens."""
    sizes = {**options.pick(FULL, QUICK), "num_layers": options.pick(4, 1)}
    number, longest = options.pick((48, 512), (10, 64))
    model = LLaMA(LLaMAConfig(**sizes), generator=torch.Generator().manual_seed(0))
    model.add_mixin("documents", DocumentsMixin())
    lengths, draws = mixed_lengths(number, longest), torch.Generator().manual_seed(1)
    samples = []
    for length in lengths:
        ids = torch.randint(sizes["vocab_size"], (1, length), generator=draws)
        samples.append({"input_ids": ids, "labels": ids})

    def by_four(items: Sequence[Any]) -> list[Any]:
        return [items[start : start + ROWS] for start in range(0, len(items), ROWS)]

    runs = {
        "padded to the longest of all": lambda: [padded(four, longest) for four in by_four(samples)],
        "padded to the longest of four": lambda: [padded(four) for four in by_four(samples)],
        "packed": lambda: [pack(samples, longest, four) for four in by_four(first_fit_decreasing(lengths, longest))],
    }
    tokens = {name: sum(batch["input_ids"].numel() for batch in make()) for name, make in runs.items()}
    facts = {"useful tokens": sum(lengths), **{f"tokens run, {name}": float(count) for name, count in tokens.items()}}
    title = f"{number} samples of {min(lengths)} to {longest} tokens"
    made = {name: trained(model, make) for name, make in runs.items()}
    yield Group(title, made, ("padded to the longest of all",), rounds=7, warmup=1, facts=facts)


@case("cached_features", "Training with features of a frozen tower")
def cached_features(options: Options) -> Iterator[Group]:
    """One step of CogVLM without the optimiser, four rows with a picture of 224 pixels (257 tokens) and 32 tokens of
    text each, the tower frozen: its features computed in every step, or read from disk (in the page cache), the
    hashing of pixels and the checksums included, or at hand. The tower is an eighth as wide as the released one and has
    a quarter of its layers; the language model has 4 layers with experts."""
    sizes = {**options.pick(FULL, QUICK), "num_layers": options.pick(4, 1)}
    wide: dict[str, Any] = options.pick(
        {"hidden_size": 224, "num_layers": 16, "num_heads": 14, "inner_hidden_size": 1920, "image_size": 224},
        {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "inner_hidden_size": 24, "image_size": 28},
    )
    config = CogVLMConfig(**sizes, vision=EVA2CLIPEConfig(**wide))
    model = CogVLM(config, generator=torch.Generator().manual_seed(0))
    jitter(model, scale=0.01)
    tower, draws = model.get_mixin("image").tower.requires_grad_(False), torch.Generator().manual_seed(0)
    batch = collate([sample_row(model, 1, options.pick(33, 6), draws) for _ in range(ROWS)])
    batch["labels"] = batch["input_ids"].masked_fill(batch["token_type_ids"] == 1, -100)
    with tempfile.TemporaryDirectory() as folder:
        cached = CachedTower(tower, FeatureCache(folder))
        features = cached(batch["images"])
        runs = {
            "computed": trained(model, lambda: [batch]),
            "read from disk": trained(model, lambda: [{**batch, "images": cached(batch["images"])}]),
            "at hand": trained(model, lambda: [{**batch, "images": features}]),
        }
        yield Group(f"{ROWS} pictures", runs, ("computed",), rounds=9, warmup=1)
