"""Training: rows that are packed or padded, and features of a frozen tower that are kept or computed again."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mixformer import BaseModel
from mixformer.config import read_settings
from mixformer.connectors import ProjectorConfig
from mixformer.data.feature_cache import CachedTower, FeatureCache
from mixformer.data.packing import first_fit_decreasing, pack
from mixformer.mixins.documents import DocumentsMixin
from mixformer.objectives import LanguageObjective, Trained
from mixformer.testing import collate, jitter, sample_row, tiny_model
from mixformer.train.roles import select_parameters
from models.clip import CLIPVisionConfig
from models.cogvlm import CogVLM, CogVLMConfig
from models.eva2_clip import EVA2CLIPEConfig
from models.llava import LLaVA, LLaVAConfig

from .harness import Group, Options, Run, case
from .loading import ROOT
from .peers import FULL, QUICK, gradients

Batch = dict[str, Any]
USEFUL = "useful tokens/s"
MINI = ROOT / "examples" / "configs" / "cogagent-mini.yaml"


def trained(
    model: BaseModel, batches: Callable[[], list[Batch]], objective: LanguageObjective | None = None,
    rates: dict[str, float] | None = None, after: Callable[[], object] | None = None,
) -> Run:
    """Loss over all tokens and its gradients, batch by batch.

    Args:
        model: whose parameters that take gradients are trained.
        batches: gives them; within the clock.
        objective: the loss.
        rates: as of `Run`.
        after: called after each step, outside the clock.
    """
    chosen = objective or LanguageObjective()

    def step() -> torch.Tensor:
        made = batches()
        counts = [chosen.count(batch) for batch in made]
        losses = []
        for batch, count in zip(made, counts, strict=True):
            loss = chosen(model, batch)["language"] * (count / sum(counts))
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def reset() -> None:
        model.zero_grad(set_to_none=True)
        if after is not None:
            after()

    return Run(step, reset, lambda: (step(), gradients(model)), rates=rates or {})


def log_normal(median: float, number: int, draws: torch.Generator) -> list[int]:
    """Evenly spaced quantiles of a log-normal distribution, of standard deviation 1 in the logarithm, in any order."""
    order = torch.randperm(number, generator=draws)
    return [int(value) for value in median * torch.special.ndtri((order + 0.5) / number).exp()]


def mixed_samples(model: LLaVA, number: int, longest: int) -> list[Batch]:
    """Samples as of instruction data: one in sixteen is text alone, the others are a picture and text.

    Lengths of texts are log-normal; the median is half of the longest sample alone, 3/32 of it beside a picture. The
    second half of each text is learnt. Pictures are ready features.

    Args:
        model: decides how many tokens a picture takes.
        number: of samples, a multiple of 16.
        longest: tokens that no sample exceeds.
    """
    draws = torch.Generator().manual_seed(29)  # an order with average padding
    image: Any = model.get_mixin("image")
    alone = log_normal(longest / 2, number // 16, draws)
    beside = log_normal(longest * 3 / 32, number - len(alone), draws)
    samples = []
    for index in range(number):
        pictures = int(index % 16 != 8)
        taken = pictures * image.num_features
        length = min(longest - taken, max(4, (beside if pictures else alone).pop()))
        sample = sample_row(model, pictures, length, draws)
        if pictures:
            sample["images"] = torch.randn(1, image.num_features, image.feature_size, generator=draws)
        learnt = torch.arange(taken + length) >= taken + length // 2
        sample["labels"] = sample["input_ids"].masked_fill(~learnt, -100)
        samples.append(sample)
    return samples


def padded(samples: Sequence[Batch], width: int | None = None) -> Batch:
    """One batch of the samples, padded on the right to the longest of them or to `width`."""
    given = list(samples)
    if width is not None:  # a row of padding only, which is taken out again
        given.append({name: torch.zeros(1, width, dtype=torch.int64) for name in ("input_ids", "labels")})
    batch = collate(given, "right")
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    return {name: value if name == "images" else value[: len(samples)] for name, value in batch.items()}


@case("packing", "Training on samples of mixed length")
def packing(options: Options) -> Iterator[Group]:
    """Loss and gradients of one set of samples, eight rows at a time; making the batches is within the time, and all
    give the same numbers. Lengths are a quarter of LLaVA-1.5's: 144 tokens for a picture (576 there), at most 512 in a
    sample (2048 there, what its recipe pads to at most), and one sample in sixteen is text alone. Texts are log-normal
    with a standard deviation of 1 in the logarithm, cut at 512 tokens in all; the medians, 48 tokens beside a picture
    and 256 alone, are ours, not counted in its data. The model is LLaVA with 4 layers; the features of its frozen tower
    are ready, so that the language model is what is timed; it trains, and so does the projector. Samples are padded to
    512; or to the longest of their eight, as they come; or the same after sorting all by length, which makes batches of
    alike samples; or they are packed into rows of 512. Useful tokens are those of samples."""
    sizes = {**options.pick(FULL, QUICK), "num_layers": options.pick(4, 1)}
    number, longest, rows = options.pick((32, 512, 8), (16, 64, 4))
    tower = CLIPVisionConfig(
        hidden_size=options.pick(128, 16), num_layers=1, num_heads=2, inner_hidden_size=24,
        image_size=options.pick(168, 56), patch_size=14,
    )
    config = LLaVAConfig(**sizes, vision=tower, adapter=ProjectorConfig(depth=2), image_token_id=None)
    model = LLaVA(config, generator=torch.Generator().manual_seed(0))
    jitter(model, scale=0.01)
    freeze(model, LLaVA.stages["tune"])
    model.add_mixin("documents", DocumentsMixin())
    samples = mixed_samples(model, number, longest)
    lengths = [sample["input_ids"].shape[1] for sample in samples]

    def grouped(items: Sequence[Any]) -> list[Any]:
        return [items[start : start + rows] for start in range(0, len(items), rows)]

    def by_length() -> list[Batch]:
        return sorted(samples, key=lambda sample: -sample["input_ids"].shape[1])

    made: dict[str, Callable[[], list[Batch]]] = {
        f"padded to {longest}": lambda: [padded(some, longest) for some in grouped(samples)],
        f"padded to the longest of {rows}": lambda: [padded(some) for some in grouped(samples)],
        "the same, sorted by length": lambda: [padded(some) for some in grouped(by_length())],
        "packed": lambda: [pack(samples, longest, some) for some in grouped(first_fit_decreasing(lengths, longest))],
    }
    facts = {"samples": float(number), "useful tokens": float(sum(lengths))}
    for name, make in made.items():
        facts[f"tokens run, {name}"] = float(sum(batch["input_ids"].numel() for batch in make()))
    runs = {name: trained(model, make, rates={USEFUL: float(sum(lengths))}) for name, make in made.items()}
    quartiles = torch.tensor(lengths).float().quantile(torch.tensor([0.25, 0.5, 0.75])).int().tolist()
    title = f"{min(lengths)} to {max(lengths)} tokens, quartiles {', '.join(map(str, quartiles))}"
    baselines = tuple(made)[:2]
    yield Group(title, runs, baselines, rounds=4, warmup=0, facts=facts, ratios_of=(USEFUL,))


def freeze(model: BaseModel, stage: Trained) -> None:
    """Let only what a stage trains take gradients."""
    names = select_parameters(model, stage.trainable)
    names -= select_parameters(model, stage.frozen) if stage.frozen else set()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


def forget(folder: str) -> None:
    """Take the files of a folder out of the page cache, where the system can."""
    if hasattr(os, "posix_fadvise"):
        for path in Path(folder).rglob("*.features"):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)


def with_kept_features(title: str, model: BaseModel, batch: Batch, names: dict[str, str]) -> Iterator[Group]:
    """The competitors of one model.

    Args:
        title: of the group.
        model: its towers are frozen.
        batch: with pictures.
        names: {input: mixin whose tower reads it}.
    """
    mixins: dict[str, Any] = {key: model.get_mixin(name) for key, name in names.items()}
    towers = {key: mixin.tower for key, mixin in mixins.items()}
    with tempfile.TemporaryDirectory() as folder:
        cached = {key: CachedTower(tower, FeatureCache(folder), names[key]) for key, tower in towers.items()}

        def read() -> Batch:
            return {**batch, **{key: tower(batch[key]) for key, tower in cached.items()}}

        ready = read()
        runs = {
            "computed": trained(model, lambda: [batch]),
            "read from disk": trained(model, lambda: [read()], after=lambda: forget(folder)),
            "read from the page cache": trained(model, lambda: [read()]),
            "at hand": trained(model, lambda: [ready]),
        }
        weights = {"towers": sum(weight.numel() for tower in towers.values() for weight in tower.parameters())}
        weights["the rest"] = sum(weight.numel() for weight in model.parameters()) - weights["towers"]
        facts = {f"million parameters, {name}": count / 1e6 for name, count in weights.items()}
        facts["KiB of features per picture"] = sum(ready[key][0].numel() * 4 / 1024 for key in names)
        yield Group(title, runs, ("computed",), rounds=8, warmup=1, facts=facts)


@case("cached_features", "Training with features of a frozen tower")
def cached_features(options: Options) -> Iterator[Group]:
    """Loss and gradients of one batch, the towers frozen: their features computed in every step, read from disk (the
    files are taken out of the page cache before), read from the page cache, or at hand. Reading includes hashing the
    pixels and checking the files. First in the proportions of CogVLM-17B at 224, an eighth of its width and a quarter
    of its depth, for tower, language model and experts alike: 2 rows of a picture (257 tokens) and 32 tokens of text;
    experts and adapter train, as in its pretraining. Then cogagent-mini as it is, with its two towers: 8 rows of two
    pictures and 48 tokens of text; all but the towers train."""
    sizes = options.pick(FULL, QUICK)
    wide: dict[str, Any] = options.pick(
        {"hidden_size": 224, "num_layers": 16, "num_heads": 14, "inner_hidden_size": 1920, "image_size": 224},
        {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "inner_hidden_size": 24, "image_size": 28},
    )
    config = CogVLMConfig(**sizes, vision=EVA2CLIPEConfig(**wide))
    model: BaseModel = CogVLM(config, generator=torch.Generator().manual_seed(0))
    freeze(model, CogVLM.stages["pretrain"])
    batch = pictured(model, *options.pick((2, 33), (2, 6)))
    yield from with_kept_features("proportions of CogVLM-17B", model, batch, {"images": "image"})
    mini: Any = tiny_model() if options.quick else read_settings(file=MINI, sections=()).model.build()
    freeze(mini, Trained(["*"], ["mixins.image.tower.*", "mixins.cross.tower.*"]))
    batch = pictured(mini, *options.pick((8, 48), (2, 6)))
    names = {"images": "image", "cross_images": "cross"}
    yield from with_kept_features("the two towers of cogagent-mini", mini, batch, names)


def pictured(model: BaseModel, num_rows: int, num_tokens: int) -> Batch:
    """Rows of a picture and text; the text is learnt. Parameters are moved away from their initial values."""
    jitter(model, scale=0.01)
    draws = torch.Generator().manual_seed(0)
    batch = collate([sample_row(model, 1, num_tokens, draws) for _ in range(num_rows)])
    batch["labels"] = batch["input_ids"].masked_fill(batch["token_type_ids"] == 1, -100)
    return batch
