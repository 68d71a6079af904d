"""Packing: nothing is lost, and documents of a row do not know of each other."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from mixformer import BaseModel, KVCache, TransformerConfig
from mixformer.connectors import ProjectorConfig
from mixformer.data.packing import PackedTask, first_fit_decreasing, pack, split_batch
from mixformer.mixins import (
    EncoderCrossAttentionMixin,
    ImageMixin,
    LoRAMixin,
    PoolHeadMixin,
    PrefixTuningMixin,
    SlidingWindowMixin,
    TokenTypeMixin,
)
from mixformer.mixins.documents import DocumentsMixin
from mixformer.objectives import LanguageObjective
from mixformer.testing import check_mixin, collate, jitter, sample_row, tiny_model
from mixformer.train import Task, TrainConfig, train
from models.clip import CLIPVisionConfig
from models.git import GITConfig, GITVisionConfig
from models.gpt2 import GPT2Config
from models.llava import LLaVAConfig
from models.simvlm import SimVLMConfig

SIZES: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "inner_hidden_size": 40}
TOWER: dict[str, Any] = {
    "hidden_size": 16, "num_layers": 1, "num_heads": 2, "inner_hidden_size": 24, "image_size": 16, "patch_size": 8,
}


def simvlm() -> BaseModel:
    vision = replace(SimVLMConfig().vision, image_size=32, channels=[4, 8], depths=[1])
    return SimVLMConfig(**SIZES, max_positions=80, vision=vision).build()


MODELS: dict[str, Callable[[], BaseModel]] = {
    "llama": lambda: tiny_model("llama"),
    "llama in a window": lambda: tiny_model("llama", sliding_window=4),
    "gpt2": lambda: GPT2Config(**SIZES, max_positions=40).build(),
    "cogvlm": lambda: tiny_model("cogvlm"),
    "cogvlm2": lambda: tiny_model("cogvlm2"),
    "cogagent": lambda: tiny_model("cogagent"),
    "cogagent in one layer": lambda: tiny_model("cogagent", cross_layers=[1]),
    "llava": lambda: LLaVAConfig(**SIZES, vision=CLIPVisionConfig(**TOWER), adapter=ProjectorConfig(depth=2)).build(),
    "git": lambda: GITConfig(**SIZES, max_positions=40, vision=GITVisionConfig(**TOWER)).build(),
    "simvlm": simvlm,
    "both directions": lambda: tiny_model("cogvlm", causal=False),
}
COUNTS = (1, 0, 2, 0, 1, 0, 0, 1)
LENGTHS = (7, 12, 6, 5, 9, 20, 4, 8)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def made(kind: str, packed: bool = True) -> BaseModel:
    torch.manual_seed(0)
    model = MODELS[kind]()
    jitter(model)
    if packed:
        model.add_mixin("documents", DocumentsMixin())
    return model.eval()


def make_samples(model: BaseModel, counts: Any = COUNTS, lengths: Any = LENGTHS) -> list[dict[str, Any]]:
    """Rows with pictures where the model takes any, some of whose tokens are learnt."""
    generator, samples = torch.Generator().manual_seed(0), []
    for count, length in zip(counts, lengths, strict=True):
        sample = sample_row(model, count, length, generator)
        learnt = torch.rand(sample["input_ids"].shape, generator=generator) < 0.5
        learnt |= torch.arange(learnt.shape[1]) == learnt.shape[1] - 1
        text = sample.get("token_type_ids", torch.zeros_like(sample["input_ids"])) == 0
        sample["labels"] = torch.where(learnt & text, sample["input_ids"], -100)
        if "prefix_lengths" in model.declared:
            sample["prefix_lengths"] = torch.tensor([int(sample.get("token_type_ids", torch.zeros(1, 1)).sum()) + 3])
        samples.append(sample)
    return samples


def room(samples: list[dict[str, Any]]) -> int:
    """A row in which several samples find place."""
    return max(sample["input_ids"].shape[1] for sample in samples) + 11


def inputs(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "labels"}


def worst(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("kind", list(MODELS))
def test_logits_of_packed_samples_are_those_of_each_alone(kind: str) -> None:
    model = made(kind)
    samples = make_samples(model)
    rows = first_fit_decreasing([s["input_ids"].shape[1] for s in samples], room(samples))
    assert len(rows) < len(samples) and max(map(len, rows)) > 2
    batch = pack(samples, room(samples), rows)
    with torch.no_grad():
        logits = model(**inputs(batch))
        for number, row in enumerate(rows):
            for document, index in enumerate(row):
                found = logits[number][batch["document_ids"][number] == document + 1]
                assert worst(found, model(**inputs(samples[index]))[0]) < 1e-5, (kind, index)


@pytest.mark.parametrize("kind", ["llama", "cogvlm", "cogagent", "git"])
def test_loss_and_gradients_of_a_packed_batch_are_the_token_weighted_ones_of_its_samples(kind: str) -> None:
    model, objective = made(kind), LanguageObjective()
    samples = make_samples(model)
    batch, gradients, losses = pack(samples, room(samples)), [], []
    counts = [int((sample["labels"][:, 1:] != -100).sum()) for sample in samples]
    assert int((batch["labels"] != -100).sum()) == sum(counts)
    for packed in (True, False):
        model.zero_grad()
        if packed:
            loss = objective(model, batch)["language"]
        else:
            parts = [objective(model, sample)["language"] * n for n, sample in zip(counts, samples, strict=True)]
            loss = torch.stack(parts).sum() / sum(counts)
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["llama", "cogagent"])
def test_prefix_tuning_and_adapters_work_on_packed_rows(kind: str) -> None:
    model = made(kind, packed=False)
    model.add_mixin("tuned", PrefixTuningMixin(3))
    model.add_mixin("segments", TokenTypeMixin())
    model.add_mixin("lora", LoRAMixin(["*"], rank=2))
    jitter(model)
    model.add_mixin("documents", DocumentsMixin())
    samples = make_samples(model.eval())
    for sample in samples:
        sample["segment_ids"] = sample["input_ids"] % 2
    rows = first_fit_decreasing([s["input_ids"].shape[1] for s in samples], room(samples))
    batch = pack(samples, room(samples), rows)
    with torch.no_grad():
        found = model(**inputs(batch))[batch["document_ids"] > 0]
        expected = torch.cat([model(**inputs(samples[index]))[0] for row in rows for index in row])
    assert worst(found, expected) < 1e-5


@pytest.mark.parametrize("kind", ["cogvlm", "cogagent"])
def test_a_model_without_document_ids_is_bit_for_bit_what_it_was(kind: str) -> None:
    model, plain = made(kind), made(kind, packed=False)
    batch = collate([inputs(sample) for sample in make_samples(model)])
    with torch.no_grad():
        assert torch.equal(model(**batch), plain(**batch))


@pytest.mark.parametrize("kind", ["llama", "cogvlm", "cogagent"])
def test_the_mixin_has_every_property(kind: str) -> None:
    check_mixin(DocumentsMixin, lambda: tiny_model(kind))


def test_the_mixin_has_every_property_with_documents() -> None:
    def documents(ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"document_ids": 1 + (torch.arange(ids.shape[1]) >= ids.shape[1] - 3).long()[None]}

    report = check_mixin(
        DocumentsMixin, lambda: tiny_model("cogvlm", causal=False), extra_inputs=documents
    )
    assert isinstance(report["a padded batch equals its rows"], float)


@pytest.mark.parametrize("kind", ["llama", "cogvlm"])
def test_compiled_packed_batches_take_few_graphs_and_equal_eager(kind: str) -> None:
    model, chosen = made(kind), random.Random(0)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for number in range(8):
            counts = [chosen.randint(0, 1) for _ in range(5)]
            samples = make_samples(model, counts, [chosen.randint(4, 15) for _ in range(5)])
            batch = inputs(pack(samples, room(samples) + number))
            plan = model.plan(**batch, dynamic=True)
            given = {name: value for name, value in batch.items() if name in model.declared}
            found = compiled(batch["input_ids"], plan=plan, **given)
            torch.testing.assert_close(found, model(**batch), rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 4


# ---------------------------------------------------------------- nothing is lost


def test_first_fit_decreasing_fills_bins_as_the_rule_says() -> None:
    assert first_fit_decreasing([4, 8, 1, 4, 2, 1], 10) == [[0, 2, 3, 5], [1, 4]]
    assert first_fit_decreasing([], 5) == []
    assert first_fit_decreasing([5, 5], 5) == [[0], [1]]
    with pytest.raises(ValueError, match="Sample 1 has 6 tokens, a packed row 5"):
        first_fit_decreasing([1, 6], 5)


@pytest.mark.parametrize("seed", range(20))
def test_no_token_is_lost_or_doubled_and_no_span_is_cut(seed: int) -> None:
    draws = random.Random(seed)
    model = made("cogvlm")
    size, samples = model.get_mixin("image").num_features + 2, []
    for index in range(draws.randint(1, 30)):
        types = [0] * draws.randint(1, 5)
        for _ in range(draws.randint(0, 2)):
            types += [1] * size + [0] * draws.randint(0, 3)
        types.append(0)
        ids = torch.arange(len(types))[None] + 1000 * (index + 1)
        pictures = sum(types) // size
        sample = {"input_ids": ids, "token_type_ids": torch.tensor([types]), "labels": ids.clone()}
        if pictures:
            numbers = torch.arange(pictures) + 10.0 * (index + 1)
            sample["images"] = numbers[:, None, None, None].expand(-1, 3, 2, 2)
        samples.append(sample)
    length = max(sample["input_ids"].shape[1] for sample in samples) + draws.randint(0, 40)
    batch = pack(samples, length)
    assert batch["input_ids"].shape[1] == length
    real = batch["document_ids"] > 0
    assert torch.equal(real, batch["attention_mask"].bool())
    assert Counter(batch["input_ids"][real].tolist()) == Counter(
        token for sample in samples for token in sample["input_ids"][0].tolist()
    )
    assert not batch["input_ids"][~real].any() and (batch["labels"][~real] == -100).all()
    met: list[float] = []
    for row, documents in zip(batch["input_ids"], batch["document_ids"], strict=True):
        for number in range(1, int(documents.max()) + 1):
            held = row[documents == number]
            own = samples[int(held[0]) // 1000 - 1]
            assert torch.equal(held, own["input_ids"][0])
            slots = (documents == number).nonzero().flatten()
            assert int(slots[-1] - slots[0]) == len(slots) - 1
            met += own["images"][:, 0, 0, 0].tolist() if "images" in own else []
    firsts = torch.cat([torch.ones(len(real), 1, dtype=torch.bool), batch["document_ids"].diff(dim=1) != 0], 1)
    assert (batch["labels"][firsts] == -100).all()
    assert torch.equal(batch["labels"][real & ~firsts], batch["input_ids"][real & ~firsts])
    assert met == (batch["images"][:, 0, 0, 0].tolist() if "images" in batch else [])
    again = pack(samples, length)
    assert all(torch.equal(value, again[name]) for name, value in batch.items())


@pytest.mark.parametrize("kind", ["cogagent", "simvlm"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_splitting_a_padded_batch_gives_its_rows(kind: str, side: str) -> None:
    samples = make_samples(made(kind))
    batch = collate(samples, side)
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    batch["_samples"] = [f"file:{index}" for index in range(len(samples))]
    for index, (found, expected) in enumerate(zip(split_batch(batch), samples, strict=True)):
        assert found.pop("_samples") == [f"file:{index}"]
        assert found.pop("attention_mask").all()
        assert "token_type_ids" in expected or not found.pop("token_type_ids").any()
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_tokens_that_are_masked_within_a_sample_stay() -> None:
    ids, mask = torch.arange(1, 8)[None], torch.tensor([[0, 1, 0, 1, 0, 0, 0]])
    types = torch.tensor([[0, 0, 0, 0, 1, 1, 0]])
    batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types, "images": torch.ones(1, 2, 4)}
    (sample,) = split_batch(batch)
    assert sample["input_ids"].tolist() == [[2, 3, 4, 5, 6]]
    assert pack([sample], 6)["attention_mask"].tolist() == [[1, 0, 1, 0, 0, 0]]


# ---------------------------------------------------------------- what cannot be packed


def ids_of(*row: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(len(row))[None], "document_ids": torch.tensor([row])}


@pytest.mark.parametrize("row", [(1, 1, 3, 3), (1, 2, 1, 0), (2, 2, 1, 1), (0, 2, 2, 2), (1, 0, 1, 1), (1, -1, 2, 2)])
def test_documents_must_be_numbered_in_their_order(row: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"Row 0 of document_ids .* number its documents 1, 2"):
        made("llama")(**ids_of(*row))


def test_what_belongs_to_rows_is_refused() -> None:
    model = made("cogagent")
    sample = inputs(make_samples(model, (1,), (6,))[0])
    with pytest.raises(ValueError, match="no plan with `dynamic`"):
        model.plan(**sample, document_ids=torch.ones_like(sample["input_ids"]), dynamic=True)
    model = made("llama")
    with pytest.raises(ValueError, match="cannot be continued"):
        model(**ids_of(1, 1, 2), cache=KVCache(model, 1, 8))
    with pytest.raises(ValueError, match=r"document_ids \(1, 3\) must have the shape of input_ids \(1, 4\)"):
        model(torch.zeros(1, 4, dtype=torch.int64), document_ids=torch.ones(1, 3, dtype=torch.int64))
    model = made("llama", packed=False)
    model.add_mixin("encoder", EncoderCrossAttentionMixin())
    with pytest.raises(ValueError, match="Mixin 'encoder' attends to features of whole rows"):
        model.add_mixin("documents", DocumentsMixin())
    model.del_mixin("encoder")
    model.add_mixin("pooled", PoolHeadMixin("cls"))
    with pytest.raises(ValueError, match="Mixin 'pooled' gives one result for each row"):
        model.add_mixin("documents", DocumentsMixin())
    agent = made("cogagent", packed=False)
    for name in ("image", "vision_expert", "vision_expert_mlp"):
        agent.del_mixin(name)
    with pytest.raises(ValueError, match="Mixin 'cross' attends to features of whole rows"):
        agent.add_mixin("documents", DocumentsMixin())


def test_pictures_that_lie_in_two_documents_or_in_none_are_refused() -> None:
    model = made("cogvlm")
    sample = inputs(make_samples(model, (1,), (6,))[0])
    documents = torch.ones_like(sample["input_ids"])
    documents[:, 4:] = 2
    with pytest.raises(ValueError, match=r"Picture 0 of the batch lies in documents \[1, 2\]"):
        model(**sample, document_ids=documents)
    documents[:, 4:] = 1
    documents[sample["token_type_ids"] == 1] = 0
    documents[:, -1:] = 2
    documents[:, :1] = 1
    documents[documents.cumsum(1) > 1] = 2
    documents[sample["token_type_ids"] == 1] = 0
    with pytest.raises(ValueError, match=r"lies in documents \[0\]"):
        model(**sample, document_ids=documents)


def test_prefix_lengths_of_documents_must_fit_them() -> None:
    model = made("simvlm")
    with pytest.raises(ValueError, match=r"must be \[b, documents\], here at least \(1, 2\); got shape \(1,\)"):
        model(**ids_of(1, 1, 2), prefix_lengths=torch.tensor([2]))
    with pytest.raises(ValueError, match=r"\[\[2, 2\]\] do not fit documents of \[\[2, 1\]\] tokens"):
        model(**ids_of(1, 1, 2), prefix_lengths=torch.tensor([[2, 2]]))


def test_a_mixin_of_pictures_that_is_added_afterwards_is_refused() -> None:
    model = made("llama")
    tower = CLIPVisionConfig(**TOWER)
    model.add_mixin("late", ImageMixin(tower, ProjectorConfig(), False, "counted"))
    sample = inputs(make_samples(model, (1,), (6,))[0])
    with pytest.raises(ValueError, match="Mixin 'late' was added after 'documents'"):
        model(**sample, document_ids=torch.ones_like(sample["input_ids"]))


def test_a_window_that_is_added_afterwards_works() -> None:
    model, sample = made("llama"), {"input_ids": torch.arange(9)[None]}
    model.add_mixin("window", SlidingWindowMixin(3))
    alone = torch.cat([model(part)[0] for part in sample["input_ids"].split((4, 5), 1)])
    documents = torch.tensor([[1] * 4 + [2] * 5])
    torch.testing.assert_close(model(**sample, document_ids=documents)[0], alone, rtol=1e-5, atol=1e-5)


def test_inputs_of_whole_rows_cannot_be_split() -> None:
    ids = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"'next_sentence_labels' \(\(2,\)\) has no value for each token"):
        split_batch({"input_ids": ids, "next_sentence_labels": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"1 images\) do not fit their places: rows have \[0, 0\]"):
        split_batch({"input_ids": ids, "images": torch.zeros(1, 3, 2, 2)})
    with pytest.raises(ValueError, match="2 images, 1 cross_images"):
        types = torch.tensor([[1, 1, 0, 0]] * 2)
        pictures = {"images": torch.zeros(2, 3, 2, 2), "cross_images": torch.zeros(1, 3, 2, 2)}
        split_batch({"input_ids": ids, "token_type_ids": types, **pictures})
    with pytest.raises(ValueError, match="no samples"):
        pack([], 4)


# ---------------------------------------------------------------- the task


class Numbers(Task):
    """Batches of two rows of random length, whose tokens are all different."""

    def __init__(self, most: int = 9, end: int | None = None) -> None:
        self.most, self.end, self.next = most, end, 0

    def batches(self) -> Iterator[Any]:
        number = 0
        while self.end is None or number < self.end:
            draws = random.Random(number)
            lengths = [draws.randint(1, self.most) for _ in range(2)]
            ids = torch.zeros(2, max(lengths), dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, length in enumerate(lengths):
                ids[row, :length] = torch.arange(length) + 100 * (2 * number + row + 1)
                mask[row, :length] = 1
            number += 1
            yield {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


class ResumableNumbers(Numbers):
    """The same with a cursor."""

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next = state["next"]

    def batches(self) -> Iterator[Any]:
        for batch in islice(super().batches(), self.next, None):
            self.next += 1
            yield batch


def tokens(batches: list[dict[str, Any]]) -> Counter[int]:
    return Counter(token for batch in batches for token in batch["input_ids"][batch["document_ids"] > 0].tolist())


def test_a_packed_task_gives_every_sample_once() -> None:
    found = list(PackedTask(Numbers(end=40), length=16, rows=3, buffer=10).batches())
    given = [batch["input_ids"][batch["attention_mask"] == 1].tolist() for batch in Numbers(end=40).batches()]
    assert tokens(found) == Counter(token for part in given for token in part)
    assert all(batch["input_ids"].shape == (3, 16) for batch in found[:-1])
    filled = sum(int(batch["attention_mask"].sum()) for batch in found[:-1]) / (len(found) - 1) / 48
    assert filled > 0.85


@pytest.mark.parametrize("kind", [Numbers, ResumableNumbers])
@pytest.mark.parametrize("stop", [0, 1, 2, 3, 7, 12])
def test_a_packed_task_goes_on_where_it_stopped(kind: type[Numbers], stop: int) -> None:
    def packed() -> PackedTask:
        return PackedTask(kind(most=20), length=16, rows=2, buffer=9, too_long="skip")

    expected = list(islice(packed().batches(), 16))
    task = packed()
    list(islice(task.batches(), stop))
    state = copy.deepcopy(task.state_dict())
    again = packed()
    again.load_state_dict(state)
    for found, right in zip(again.batches(), expected[stop:], strict=False):
        assert all(torch.equal(value, right[name]) for name, value in found.items())
    whole = packed()
    list(islice(whole.batches(), 16))
    assert again.skipped == whole.skipped > 0


def test_batches_do_not_depend_on_the_number_of_processes() -> None:
    whole = list(islice(PackedTask(Numbers(), length=16, rows=4, buffer=10).batches(), 12))
    for size in (1, 2, 4):
        parts = []
        for rank in range(size):
            task = PackedTask(Numbers(), length=16, rows=4, buffer=10)
            task.shard(rank, size)
            parts.append(list(islice(task.batches(), 12)))
        for right, *found in zip(whole, *parts, strict=True):
            assert torch.equal(right["input_ids"], torch.cat([part["input_ids"] for part in found]))
    with pytest.raises(ValueError, match="which 3 processes cannot share evenly"):
        PackedTask(Numbers(), length=16, rows=4).shard(0, 3)


def test_samples_that_are_too_long_are_an_error_or_counted() -> None:
    with pytest.raises(ValueError, match=r"A sample has .* tokens and a packed row 8"):
        next(PackedTask(Numbers(most=20), length=8).batches())
    task = PackedTask(Numbers(most=20, end=30), length=8, buffer=7, too_long="skip")
    found = tokens(list(task.batches()))
    lengths = [int(n) for batch in Numbers(most=20, end=30).batches() for n in batch["attention_mask"].sum(1)]
    assert task.skipped == sum(length > 8 for length in lengths) > 0
    assert sum(found.values()) == sum(length for length in lengths if length <= 8)


class Named(Numbers):
    """The same with names."""

    def batches(self) -> Iterator[dict[str, Any]]:
        done = 0
        for batch in super().batches():
            rows = range(done + 1, done + 1 + len(batch["input_ids"]))
            done = rows[-1]
            yield {**batch, "_samples": [f"file:{number}" for number in rows]}


def test_samples_that_are_too_long_are_named(caplog: pytest.LogCaptureFixture) -> None:
    lengths = [int(n) for batch in Numbers(most=20, end=9).batches() for n in batch["attention_mask"].sum(1)]
    long = {f"file:{number}": length for number, length in enumerate(lengths, start=1) if length > 8}
    with pytest.raises(ValueError, match=r"file:\d+ has \d+ tokens and a packed row 8") as caught:
        list(PackedTask(Named(most=20, end=9), length=8).batches())
    name, _, tokens_found, *_ = str(caught.value).split()
    assert long[name] == int(tokens_found)
    list(PackedTask(Named(most=20, end=9), length=8, buffer=7, too_long="skip").batches())
    assert long and caplog.messages == [
        f"skipped unusable sample {name} ({number} so far): it has {length} tokens, and a packed row 8."
        for number, (name, length) in enumerate(long.items(), start=1)
    ]


def test_data_of_which_nothing_fits_stops_the_run() -> None:
    class Endless(Task):
        def batches(self) -> Iterator[dict[str, Any]]:
            while True:
                yield {"input_ids": torch.ones(1, 9, dtype=torch.int64), "_samples": ["file:1"]}

    with pytest.raises(ValueError, match="No sample fits into a packed row of 8"):
        next(PackedTask(Endless(), length=8, too_long="skip").batches())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"length": 0}, "length is 0"), ({"length": 4, "buffer": 0}, "buffer is 0"), ({"too_long": "cut"}, "'cut'")],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedTask(Numbers(), **{"length": 8, **options})


def test_training_on_packed_rows_leaves_the_model_as_it_was_composed() -> None:
    model = tiny_model("llama", vocab_size=7000)
    before = list(model.mixins)
    task = PackedTask(Numbers(end=30), length=24, rows=2)
    task.prepare(model, None)
    assert isinstance(model.get_mixin("documents"), DocumentsMixin)
    losses = train(model, task.batches(), TrainConfig(steps=2, progress=False), task.loss)
    assert losses["language"] > 0
    task.finish(model)
    assert list(model.mixins) == before


def test_the_model_sees_positions_from_zero_and_a_block_of_mask_for_each_document() -> None:
    config = TransformerConfig(
        vocab_size=31, hidden_size=16, num_layers=1, num_heads=2, positions="learned", max_positions=9
    )
    model = config.build()
    model.add_mixin("documents", DocumentsMixin())
    batch = ids_of(0, 1, 1, 1, 2, 2, 3, 0)
    plan = model.plan(**batch, attention_mask=(batch["document_ids"] > 0))
    assert plan.position_ids is not None and plan.position_ids.tolist() == [[0, 0, 1, 2, 0, 1, 0, 0]]
    mask = model.hooks.attention_mask_forward(plan.mask, plan)
    slots = torch.arange(8)
    documents = batch["document_ids"][0]
    expected = torch.tril(torch.ones(8, 8)).bool() & F.one_hot(documents).matmul(F.one_hot(documents).T).bool()
    assert torch.equal(mask.allowed(slots, slots)[0], expected)


@pytest.mark.parametrize("kind", ["llama", "llama in a window", "gpt2", "cogvlm2", "both directions"])
@pytest.mark.parametrize("hole", [False, True])
def test_attention_document_by_document_is_the_masked_one_and_runs_where_masks_are_causal(
    kind: str, hole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, causal = made(kind), []
    samples = make_samples(model)
    batch = inputs(pack(samples, room(samples)))
    if hole:
        batch["attention_mask"][0, 1] = 0  # a token of a document that nobody may see
    attention = F.scaled_dot_product_attention

    def seen(*args: Any, **kwargs: Any) -> torch.Tensor:
        causal.append(kwargs["is_causal"])
        return attention(*args, **kwargs)

    with torch.no_grad():
        monkeypatch.setattr("mixformer.transformer.F.scaled_dot_product_attention", seen)
        found = model(**batch)
        number = sum(causal)
        model.get_mixin("documents").attends = False
        expected = model(**batch)
    documents = sum(len(row.unique_consecutive()) for row in batch["document_ids"])  # padding behind them is one more
    apart = kind in ("llama", "gpt2", "cogvlm2") and not hole
    assert number == apart * documents * model.config.num_layers
    real = batch["document_ids"] > 0
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-6)
