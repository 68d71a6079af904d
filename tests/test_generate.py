"""Generation, compared with loops and enumerations written out here."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mixformer import BaseMixin, BaseModel, KVCache, TransformerConfig, wrap
from mixformer.generate import generate, min_p, repetition_penalty, stream, top_k, top_p
from mixformer.testing import collate, sample_row
from models.cogagent import CogAgent, CogAgentConfig
from models.eva2_clip import EVA2CLIPEConfig, EVA2CLIPLConfig

Make = Callable[..., BaseModel]

SPAN = 6


def jitter(model: torch.nn.Module, scale: float = 0.2) -> Any:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def agent() -> CogAgent:
    tower = {"hidden_size": 16, "num_heads": 2, "inner_hidden_size": 24}
    config = CogAgentConfig(
        vocab_size=40, hidden_size=32, num_layers=2, num_heads=4, inner_hidden_size=48,
        vision=EVA2CLIPEConfig(num_layers=1, image_size=28, **tower),
        cross_vision=EVA2CLIPLConfig(num_layers=2, num_layers_run=1, image_size=56, stored_head_size=8, **tower),
    )
    return jitter(CogAgent(config, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def small() -> BaseModel:
    return jitter(TransformerConfig(vocab_size=5, hidden_size=16, num_layers=2, num_heads=2).build(), 0.5)


def row(length: int, image: bool, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    batch = {"input_ids": torch.randint(3, 40, (1, length), generator=generator)}
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    if image:
        batch["token_type_ids"][:, 1 : 1 + SPAN] = 1
        batch["images"] = torch.randn(1, 3, 28, 28, generator=generator)
        batch["cross_images"] = torch.randn(1, 3, 56, 56, generator=generator)
    return batch


def padded(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    length = max(one["input_ids"].shape[1] for one in rows)
    batch: dict[str, torch.Tensor] = {}
    for name in ("input_ids", "token_type_ids"):
        batch[name] = torch.cat([torch.nn.functional.pad(one[name], (length - one[name].shape[1], 0)) for one in rows])
    ones = [torch.ones_like(one["input_ids"]) for one in rows]
    batch["attention_mask"] = torch.cat([torch.nn.functional.pad(one, (length - one.shape[1], 0)) for one in ones])
    for name in ("images", "cross_images"):
        batch[name] = torch.cat([one[name] for one in rows if name in one])
    return batch


@torch.no_grad()
def greedy(model: BaseModel, batch: dict[str, torch.Tensor], count: int) -> list[int]:
    ids, types = batch["input_ids"], batch["token_type_ids"]
    rest = {name: value for name, value in batch.items() if "images" in name}
    new = []
    for _ in range(count):
        token = model(ids, token_type_ids=types, **rest)[0, -1].argmax()
        new.append(int(token))
        ids = torch.cat([ids, token.view(1, 1)], 1)
        types = torch.cat([types, torch.zeros(1, 1, dtype=types.dtype)], 1)
    return new


def test_greedy_equals_a_loop_over_whole_sequences(agent: CogAgent) -> None:
    batch = row(11, True, 0)
    assert generate(agent, batch, max_new_tokens=8)[0].tolist() == greedy(agent, batch, 8)
    assert generate(agent, batch, max_new_tokens=8, cache=False)[0].tolist() == greedy(agent, batch, 8)


def test_unequal_prompts_with_and_without_images_equal_one_at_a_time(agent: CogAgent) -> None:
    rows = [row(11, True, 1), row(5, False, 2), row(14, True, 3), row(9, False, 4)]
    together = generate(agent, padded(rows), max_new_tokens=6)
    assert together.tolist() == [greedy(agent, one, 6) for one in rows]
    assert torch.equal(generate(agent, padded(rows), max_new_tokens=6, cache=False), together)


def test_prefill_computes_the_logits_of_one_slot_only(small: BaseModel) -> None:
    shapes = []

    class Watch(BaseMixin):
        @wrap
        def final_forward(self, hidden_states, ctx, old_impl):
            shapes.append(tuple(hidden_states.shape))
            return old_impl(hidden_states)

    small.add_mixin("watch", Watch())
    try:
        generate(small, {"input_ids": torch.randint(0, 5, (2, 7))}, max_new_tokens=3)
    finally:
        small.del_mixin("watch")
    assert shapes == [(2, 1, 16)] * 3


def test_a_conversation_goes_on_from_its_cache(agent: CogAgent) -> None:
    first, more = row(11, True, 6), torch.tensor([[4, 9, 17]])
    cache = KVCache(agent, 1, 40)
    answer = generate(agent, first, max_new_tokens=4, cache=cache)
    follow = generate(agent, {"input_ids": torch.cat([answer[:, -1:], more], 1)}, max_new_tokens=4, cache=cache)
    whole = {**first, "input_ids": torch.cat([first["input_ids"], answer, more], 1)}
    whole["token_type_ids"] = torch.nn.functional.pad(first["token_type_ids"], (0, 7))
    assert follow[0].tolist() == greedy(agent, whole, 4)


def test_a_stopped_row_is_filled_and_the_others_go_on(agent: CogAgent) -> None:
    rows = [row(11, True, 1), row(5, False, 2)]
    free = generate(agent, padded(rows), max_new_tokens=6)
    first, second = free.tolist()
    place = next(i for i in range(1, 6) if first[i] not in first[:i] and first[i] not in second)
    stopped = generate(agent, padded(rows), max_new_tokens=6, stop_tokens=first[place], pad_token=39)
    assert stopped[0].tolist() == first[: place + 1] + [39] * (5 - place)
    assert torch.equal(stopped[1], free[1])


def test_generation_ends_when_every_row_has_stopped(small: BaseModel) -> None:
    tokens = list(stream(small, {"input_ids": torch.tensor([[1, 2]])}, 50, stop_tokens=[0, 1, 2, 3, 4]))
    assert len(tokens) == 1


def test_filters_keep_what_their_definitions_keep() -> None:
    logits = torch.randn(3, 11, generator=torch.Generator().manual_seed(0)) * 2
    none = torch.zeros(3, 0, dtype=torch.int64)
    for row_index in range(3):
        probabilities = logits[row_index].softmax(0).tolist()
        order = sorted(range(11), key=lambda i: -probabilities[i])
        kept_mass, mass = set(), 0.0
        for index in order:
            kept_mass.add(index)
            mass += probabilities[index]
            if mass >= 0.7:
                break
        kept = {i for i in range(11) if torch.isfinite(top_p(0.7)(none, logits)[row_index, i])}
        assert kept == kept_mass
        kept = {i for i in range(11) if torch.isfinite(top_k(4)(none, logits)[row_index, i])}
        assert kept == set(order[:4])
        kept = {i for i in range(11) if torch.isfinite(min_p(0.2)(none, logits)[row_index, i])}
        assert kept == {i for i in range(11) if probabilities[i] >= 0.2 * max(probabilities)}


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    logits = torch.tensor([[2.0, -2.0, 3.0, -3.0]])
    out = repetition_penalty(2.0)(torch.tensor([[0, 1, 0]]), logits)
    assert out.tolist() == [[1.0, -4.0, 3.0, -3.0]]


def test_sampling_frequencies_follow_the_softmax(small: BaseModel) -> None:
    ids = torch.tensor([[1, 3, 2]])
    with torch.no_grad():
        expected = (small(ids)[0, -1] / 1.5).softmax(0)
    generator = torch.Generator().manual_seed(0)
    batch = {"input_ids": ids.expand(4000, -1)}
    drawn = generate(small, batch, 1, sample={"temperature": 1.5}, generator=generator)
    assert torch.allclose(drawn.flatten().bincount(minlength=5) / 4000, expected, atol=0.03)
    greedy_tokens = generate(small, batch, 1)
    assert torch.equal(generate(small, batch, 1, sample={"top_k": 1}), greedy_tokens)


def test_own_processors_are_plain_callables(small: BaseModel) -> None:
    def forbid(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        logits[:, [0, 1, 2, 4]] = -torch.inf
        return logits

    assert generate(small, {"input_ids": torch.tensor([[1]])}, 4, processors=[forbid]).tolist() == [[3] * 4]


def test_wide_beams_find_the_likeliest_of_all_sequences(small: BaseModel) -> None:
    ids = torch.tensor([[1, 3], [4, 0]])
    found = generate(small, {"input_ids": ids}, 3, num_beams=125)
    for index in range(2):
        best, best_score = None, -1e9
        for tail in itertools.product(range(5), repeat=3):
            whole = torch.cat([ids[index], torch.tensor(tail)])[None]
            with torch.no_grad():
                logp = small(whole[:, :-1]).log_softmax(-1)[0, -3:]
            score = float(sum(logp[i, token] for i, token in enumerate(tail)))
            if score > best_score:
                best, best_score = list(tail), score
        assert found[index].tolist() == best


def test_beams_work_with_pictures_and_padding(agent: CogAgent) -> None:
    rows = [row(11, True, 1), row(5, False, 2)]
    together = generate(agent, padded(rows), 5, num_beams=3)
    for one, expected in zip(rows, together, strict=True):
        assert generate(agent, one, 5, num_beams=3)[0].tolist() == expected.tolist()


def test_right_padding_is_refused(agent: CogAgent) -> None:
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.int64), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    with pytest.raises(ValueError, match=r"padded on the right.*Pad prompts on the left"):
        generate(agent, batch, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"sample": {"temprature": 1.0}}, "Unknown sampling option 'temprature'"),
        ({"sample": {"temperature": 0.0}}, "temperature is 0.0"),
        ({"num_beams": 2, "cache": False}, "Beam search keeps a cache"),
    ],
)
def test_wrong_options_are_named(small: BaseModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(small, {"input_ids": torch.tensor([[1]])}, **options)


def test_a_cache_without_room_says_how_large_it_must_be(small: BaseModel) -> None:
    with pytest.raises(ValueError, match="capacity=9"):
        generate(small, {"input_ids": torch.ones(1, 9, dtype=torch.int64)}, 2, cache=KVCache(small, 1, 8))


@pytest.mark.parametrize("kind", ["llama", "cogvlm", "cogagent"])
def test_compiled_generation_gives_the_tokens_of_eager_and_never_recompiles(
    make: Make, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(kind)
    counter = CompileCounterWithBackend("eager")
    real_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda each, **options: real_compile(each, backend=counter, **options))
    torch._dynamo.reset()
    generator, graphs = torch.Generator().manual_seed(0), []
    for lengths in ((7, 7), (6, 9)):
        rows = [sample_row(model, int(kind != "llama"), length, generator) for length in lengths]
        batch = collate(rows)
        found = generate(model, batch, 8, compile=True)
        assert torch.equal(found, generate(model, batch, 8))
        graphs.append(counter.frame_count)
    assert graphs == [1, 1]


def test_compiling_without_a_cache_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="compile needs a cache"):
        generate(make("llama"), {"input_ids": torch.ones(1, 3, dtype=torch.long)}, 2, False, compile=True)


def test_compiled_steps_refuse_a_cache_that_grows(make: Make) -> None:
    model = make("llama")
    with pytest.raises(ValueError, match=r"static=True"):
        generate(model, {"input_ids": torch.ones(1, 3, dtype=torch.long)}, 2, KVCache(model, 1, 9), compile=True)


def test_compiled_steps_end_where_the_cache_is_full(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    real_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda each, **options: real_compile(each, backend="eager", **options))
    model, ids = make("llama"), torch.tensor([[1, 4, 2]])
    cache = KVCache(model, 1, 5, static=True)
    assert generate(model, {"input_ids": ids}, 3, cache, compile=True).shape == (1, 3)
    cache = KVCache(model, 1, 5, static=True)
    with pytest.raises(ValueError, match="The cache holds 5 tokens per row; 5 are used"):
        generate(model, {"input_ids": ids}, 4, cache, compile=True)
