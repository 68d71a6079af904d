"""Queues of prompts: the answers are those of one prompt at a time, and no row is run for nothing."""

from __future__ import annotations

import gc
import itertools
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from mixformer import BaseMixin, BaseModel, KVCache, wrap
from mixformer.generate import generate
from mixformer.slot_cache import SlotCache
from mixformer.slots import Slots, generate_queue, prompt_seed
from mixformer.testing import jitter, sample_row

Make = Callable[..., BaseModel]
Row = dict[str, Any]
KINDS = ["llama", "cogvlm", "cogvlm2", "cogagent"]
STOPS = [3, 7, 20]


def lively(make: Make, kind: str = "llama") -> BaseModel:
    """A tiny model whose answers differ from prompt to prompt."""
    model = make(kind)
    jitter(model, seed=1, scale=0.3)
    return model


def sample_rows(model: BaseModel, count: int, seed: int = 0, longest: int = 40) -> list[Row]:
    """Prompts of unequal lengths with no, one or two pictures."""
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    pictures = (0, 1, 2) if "images" in model.declared else (0,)
    return [sample_row(model, choose.choice(pictures), choose.randint(2, longest), generator) for _ in range(count)]


def alone(model: BaseModel, rows: list[Row], limits: list[int], **options: Any) -> list[list[int]]:
    """Every answer by itself, without any cache."""
    pairs = zip(rows, limits, strict=True)
    return [generate(model, row, limit, cache=False, **options)[0].tolist() for row, limit in pairs]


def in_order(answers: Iterator[tuple[int, torch.Tensor]]) -> list[list[int]]:
    found = {index: tokens.tolist() for index, tokens in answers}
    assert sorted(found) == list(range(len(found)))
    return [found[index] for index in range(len(found))]


def watch_calls(model: BaseModel) -> list[tuple[int, int]]:
    """(rows, tokens) of every call from now on."""
    calls: list[tuple[int, int]] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(tuple((args[0] if args else kwargs["input_ids"]).shape)),
        with_kwargs=True,
    )
    return calls


# ---------------------------------------------------------------- equality


@pytest.mark.parametrize("kind", KINDS)
def test_a_queue_answers_as_one_prompt_at_a_time(make: Make, kind: str) -> None:
    model = lively(make, kind)
    rows, limits = sample_rows(model, 16, longest=30), [1, 4, 9, 20] * 4
    expected = alone(model, rows, limits, stop_tokens=STOPS)
    stopped = [len(tokens) < limit for tokens, limit in zip(expected, limits, strict=True)]
    assert any(stopped) and not all(stopped) and len(set(map(tuple, expected))) > 12
    for num_slots in (1, 3, 20):
        queue = generate_queue(model, rows, num_slots=num_slots, max_new_tokens=limits, stop_tokens=STOPS)
        assert in_order(queue) == expected


@pytest.mark.parametrize("seed", range(6))
def test_prompts_may_arrive_at_any_time(make: Make, seed: int) -> None:
    choose = random.Random(seed)
    model = lively(make, choose.choice(KINDS))
    rows = sample_rows(model, 14, seed, longest=choose.choice([8, 60]))
    limits = [choose.choice([1, 2, 5, 25]) for _ in rows]
    slots, found, number = Slots(model, choose.randint(1, 6), stop_tokens=STOPS), {}, 0
    while number < len(rows) or slots.num_busy:
        for _ in range(choose.choice([0, 0, 0, 1, 1, 3, 8])):
            if number < len(rows):
                slots.add(number, rows[number], limits[number])
                number += 1
        assert len(slots.rows) <= slots.num_slots
        found.update(slots.step())
    assert in_order(iter(found.items())) == alone(model, rows, limits, stop_tokens=STOPS)
    assert slots.num_free == slots.num_slots and slots.cache.batch_size == 0
    assert not slots.cache.memo and slots.cache.usual_positions


def test_slots_that_hold_no_token_are_passed_over(make: Make) -> None:
    model = lively(make, "cogvlm")
    rows = sample_rows(model, 6)
    padded = []
    for number, row in enumerate(rows):
        length = row["input_ids"].shape[1]
        # Empty slots at the front, and in every other row two before the last token.
        places = torch.arange(length) + number
        places[-1] += 2 * (number % 2)
        wider = {**row, "attention_mask": torch.ones_like(row["input_ids"])}
        for name in {"input_ids", "attention_mask", "token_type_ids"} & wider.keys():
            empty = torch.zeros(1, int(places[-1]) + 1, dtype=torch.int64)
            wider[name] = empty.index_copy(1, places, wider[name])
        padded.append(wider)
    assert in_order(generate_queue(model, padded, num_slots=3, max_new_tokens=7)) == alone(model, rows, [7] * 6)


def test_positions_that_a_prompt_brings_go_on(make: Make) -> None:
    model = lively(make)
    rows = sample_rows(model, 6)
    for row in rows[::2]:
        row["position_ids"] = 3000 + 2 * torch.arange(row["input_ids"].shape[1])[None]
    expected = [generate(model, row, 8)[0].tolist() for row in rows]
    far = KVCache(model, 1, 60)
    with torch.no_grad():
        model(torch.tensor([[5, 1]]), position_ids=torch.tensor([[6000, 6001]]), cache=far)
    expected.append(generate(model, {"input_ids": torch.tensor([[4, 8]])}, 8, far.copy())[0].tolist())
    rows.append({"input_ids": torch.tensor([[4, 8]]), "cache": far})
    assert expected[:6] != alone(model, [{"input_ids": row["input_ids"]} for row in rows[:6]], [8] * 6)
    assert in_order(generate_queue(model, rows, num_slots=2, max_new_tokens=8)) == expected
    assert in_order(generate_queue(model, rows[6:], num_slots=2, max_new_tokens=8)) == expected[6:]


def test_a_state_that_a_mixin_keeps_in_the_memo_stays_with_its_row(make: Make) -> None:
    class Average(BaseMixin):
        """Adds the mean of all embeddings so far, which the memo keeps, one more at every step."""

        @wrap
        def word_embedding_forward(self, input_ids, ctx, old_impl):
            x = old_impl(input_ids)
            real = torch.ones_like(input_ids) if ctx.attention_mask is None else ctx.attention_mask
            memo = ctx.cache.memo
            past, valid = x * real[..., None], real.bool()
            if "average.past" in memo:
                past = torch.cat([memo["average.past"], past], 1)
                valid = torch.cat([memo["average.valid"], valid], 1)
            memo["average.past"], memo["average.valid"] = past, valid
            return x + 2 * past.sum(1, keepdim=True) / valid.sum(1)[:, None, None]

    model = lively(make)
    model.add_mixin("average", Average())
    rows, limits = sample_rows(model, 12), [2, 11, 5, 3] * 3
    expected = [generate(model, row, limit)[0].tolist() for row, limit in zip(rows, limits, strict=True)]
    assert in_order(generate_queue(model, rows, num_slots=4, max_new_tokens=limits)) == expected


# ---------------------------------------------------------------- where rows lie


def test_a_prompt_longer_than_all_that_runs_takes_its_place_beside_it(make: Make) -> None:
    model = lively(make, "cogagent")
    rows = [sample_row(model, pictures, length) for pictures, length in ((1, 3), (0, 50), (2, 120))]
    slots, found = Slots(model, 3), {}
    for number, row in enumerate(rows):
        slots.add(number, row, 20)
        for _ in range(4):
            found.update(slots.step())
        assert slots.cache.length == rows[number]["input_ids"].shape[1] + 4
    while slots.num_busy:
        found.update(slots.step())
    assert in_order(iter(found.items())) == alone(model, rows, [20] * 3)


def test_attention_does_not_go_on_over_what_a_long_row_leaves(make: Make) -> None:
    model = lively(make)
    slots, found = Slots(model, 2), {}
    slots.add(0, sample_row(model, 0, 300), 3)
    slots.add(1, sample_row(model, 0, 20), 8)
    lengths = []
    while slots.num_busy:
        found.update(slots.step())
        lengths.append(slots.cache.length)
    assert lengths == [301, 302, 23, 24, 25, 26, 27]
    short = sample_row(model, 0, 5)
    slots.add(2, short, 4)
    slots.admit()
    assert slots.cache.length == 5 and slots.cache.valid is None


def test_what_ended_rows_leave_at_the_front_is_used_again(make: Make) -> None:
    model = lively(make)
    rows, limits = sample_rows(model, 40, longest=30), [12, 3, 8] * 13 + [12]
    lengths = []
    model.register_forward_hook(
        lambda module, args, kwargs, out: lengths.append((kwargs["cache"].num_keys(0), kwargs["cache"].capacity)),
        with_kwargs=True,
    )
    in_order(generate_queue(model, rows, num_slots=3, max_new_tokens=limits))
    longest = max(row["input_ids"].shape[1] + limit for row, limit in zip(rows, limits, strict=True))
    assert len(lengths) > 100
    assert max(length for length, _ in lengths) <= longest + 64 + 16
    assert max(capacity for _, capacity in lengths) <= longest + 2 * 64


def test_room_is_made_as_answers_grow_and_not_for_the_longest_allowed(make: Make) -> None:
    model = lively(make)
    row = {"input_ids": torch.tensor([[4, 9]])}
    slots = Slots(model, 2)
    slots.add(0, row, 100_000)
    slots.add(1, {"input_ids": torch.tensor([[4, 9, 5, 8, 12]])}, 300)
    found = []
    while not found:
        found = slots.step()
    assert 305 <= slots.cache.capacity < 500
    assert found[0][1].tolist() == generate(model, {"input_ids": torch.tensor([[4, 9, 5, 8, 12]])}, 300)[0].tolist()


def test_a_row_that_is_not_finite_leaves_nothing_to_the_next(make: Make) -> None:
    class Break(BaseMixin):
        @wrap
        def word_embedding_forward(self, input_ids, ctx, old_impl):
            broken = (input_ids == 60) & (input_ids.shape[1] > 1)  # in prompts, not in answers
            return torch.where(broken[..., None], torch.nan, old_impl(input_ids))

    model = lively(make)
    rows = [{"input_ids": 2 + torch.arange(length)[None]} for length in (26, 25, 9, 14, 4, 11)]
    limits = [40, 6, 6, 6, 6, 6]
    expected = alone(model, rows, limits)
    model.add_mixin("break", Break())
    rows[1]["input_ids"][0, 0] = 60
    found = in_order(generate_queue(model, rows, num_slots=2, max_new_tokens=limits))
    assert found[1] != expected[1] and found[2:] == expected[2:]


# ---------------------------------------------------------------- memos


def test_memos_are_filled_with_zeros_and_promises_hold_for_all_rows_only(make: Make) -> None:
    cache, model = SlotCache(make()), make()
    memos = [
        {"a.k": torch.full((1, 2, 3), 1.0), "a.valid": torch.ones(1, 3, dtype=torch.bool), "a.all": True, "width": 5},
        {"a.k": torch.full((1, 2, 5), 2.0), "a.valid": torch.ones(1, 5, dtype=torch.bool), "a.all": True, "width": 5},
        {},
    ]

    def join(memo: dict[str, Any]) -> None:
        cache.make_place(1, 4)
        part = cache.new_rows(model, 1, 4, None)
        model(torch.ones(1, 4, dtype=torch.long), cache=part)
        part.memo = memo
        cache.join(part, [4], 0)

    join(memos[0])
    assert cache.memo["a.all"] is True
    join(memos[0])
    assert cache.memo["a.all"] is True and cache.memo["a.k"].shape == (2, 2, 3)
    join(memos[1])
    assert cache.memo["a.k"][:, 0].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [2, 2, 2, 2, 2]]
    assert cache.memo["a.valid"].sum(1).tolist() == [3, 3, 5] and cache.memo["a.all"] is False
    cache.keep([2, 1])
    assert cache.memo["a.valid"].sum(1).tolist() == [5, 3] and cache.memo["width"] == 5
    cache.keep([1])
    assert cache.memo["a.all"] is True and cache.memo["a.valid"].tolist() == [[True] * 3]
    join(memos[2])
    assert cache.memo["a.k"][:, 1].tolist() == [[1, 1, 1], [0, 0, 0]] and cache.memo["a.all"] is False
    with pytest.raises(ValueError, match=r"memo 'width' differs cannot run side by side"):
        join({"width": 6})
    join({key: memos[0][key] for key in ("a.k", "a.valid")})
    cache.keep([0, 2])
    assert cache.memo["a.k"].shape == (2, 2, 3) and cache.memo["a.all"] is False
    cache.keep([])
    assert cache.memo == {}


def test_a_row_without_picture_gets_exactly_nothing_from_cross_attention(make: Make) -> None:
    seen = []

    class Watch(BaseMixin):
        @wrap
        def cross_attention_forward(self, hidden_states, layer, ctx, old_impl):
            out = old_impl(hidden_states)
            seen.append(None if out is None else [bool(row.any()) for row in out])
            return out

    model = lively(make, "cogagent")
    model.add_mixin("watch", Watch())
    rows = [sample_row(model, pictures, 6) for pictures in (1, 0, 2)]
    found = in_order(generate_queue(model, rows, num_slots=3, max_new_tokens=[5, 9, 3]))
    steps = [sorted(out) if out else out for out in seen[2 * 2 :: 2]]  # behind two prefills, of two layers each
    assert steps == [[False, True, True]] * 2 + [[False, True]] * 2 + [None] * 4
    model.del_mixin("watch")
    assert found == alone(model, rows, [5, 9, 3])


# ---------------------------------------------------------------- work


def test_every_row_of_every_call_is_a_token_of_an_answer(make: Make) -> None:
    model = lively(make)
    rows, limits = sample_rows(model, 12, longest=20), [24, 2, 3, 2] * 3
    calls = watch_calls(model)
    in_order(generate_queue(model, rows, num_slots=4, max_new_tokens=limits))
    assert sum(num_rows for num_rows, _ in calls) == sum(limits)
    steps = [call for call in calls if call[1] == 1]
    batches = 3 * (24 - 1)
    assert len(steps) < 0.6 * batches


def test_prompts_that_come_together_run_together_if_they_are_alike(make: Make) -> None:
    model = lively(make, "cogvlm")
    lengths = [(0, 5), (0, 9), (1, 6), (0, 200), (1, 8), (0, 30)]
    calls = watch_calls(model)
    slots = Slots(model, 8)
    for number, (pictures, length) in enumerate(lengths):
        slots.add(number, sample_row(model, pictures, length), 3)
    slots.admit()
    assert sorted(calls) == [(1, 200), (2, 14), (3, 30)]


def test_prompts_are_asked_for_when_a_slot_is_free_and_not_before(make: Make) -> None:
    model = lively(make)
    taken = []

    def endless() -> Iterator[Row]:
        for number in itertools.count():
            taken.append(number)
            yield {"input_ids": torch.tensor([[number % 50, 9, 4]])}

    queue = generate_queue(model, endless(), num_slots=3, max_new_tokens=itertools.cycle([1, 5, 2, 9]))
    assert taken == []
    for given, _ in enumerate(itertools.islice(queue, 30)):
        assert len(taken) <= given + 3
    assert 30 <= len(taken) <= 33


def test_an_abandoned_queue_leaves_nothing_behind(make: Make) -> None:
    model = lively(make)
    queue: Any = generate_queue(model, sample_rows(model, 8), num_slots=3, max_new_tokens=[2, 50] * 4)
    next(queue)
    assert torch.is_grad_enabled()
    slots = weakref.ref(queue.gi_frame.f_locals["slots"])
    assert slots() is not None
    queue.close()
    del queue
    gc.collect()
    assert slots() is None
    assert model(torch.tensor([[1, 2]])).requires_grad


def test_pictures_are_let_go_once_they_are_read(make: Make) -> None:
    model = lively(make, "cogvlm")
    row = sample_row(model, 1, 5)
    slots, picture = Slots(model, 2), weakref.ref(row["images"])
    slots.add(0, row, 5)
    del row
    assert picture() is not None
    slots.step()
    gc.collect()
    assert picture() is None


# ---------------------------------------------------------------- shared beginnings


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_go_on_from_a_cache_that_they_share(make: Make, kind: str) -> None:
    model = lively(make, kind)
    pictures = 0 if kind == "llama" else 1
    first, other = (sample_row(model, pictures, length, torch.Generator().manual_seed(2)) for length in (9, 6))
    shared, padded = KVCache(model, 1, 40), KVCache(model, 1, 60, static=True)
    with torch.no_grad():
        model(**first, cache=shared)
        mask = torch.ones_like(other["input_ids"])
        mask[0, 0] = 0
        model(**other, attention_mask=mask, cache=padded)
    before = [keys.clone() for keys in (*shared.keys, *padded.keys)]
    generator = torch.Generator().manual_seed(0)
    lengths = (3, 12, 1, 7, 3, 18, 2, 5, 9, 1)
    rows = [{"input_ids": torch.randint(61, (1, length), generator=generator)} for length in lengths]
    caches = [shared, shared, padded, shared, None, padded, shared, shared, None, padded]
    prompts = [row if cache is None else {**row, "cache": cache} for row, cache in zip(rows, caches, strict=True)]
    limits = [6, 2, 9, 4, 5] * 2
    expected = [
        generate(model, row, limit, True if cache is None else cache.copy(capacity=80))[0].tolist()
        for row, cache, limit in zip(rows, caches, limits, strict=True)
    ]
    calls = watch_calls(model)
    assert in_order(generate_queue(model, prompts, num_slots=4, max_new_tokens=limits)) == expected
    assert max(num_tokens for _, num_tokens in calls) == 18
    assert all(torch.equal(old, new) for old, new in zip(before, (*shared.keys, *padded.keys), strict=True))
    assert shared.length == first["input_ids"].shape[1] and padded.length == other["input_ids"].shape[1]


# ---------------------------------------------------------------- sampling


SAMPLE = {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "repetition_penalty": 5.0}


def never_twice(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Forbids the last token; its outcome depends on the order of the tokens."""
    return logits.scatter(-1, tokens[:, -1:], -torch.inf)


def test_draws_are_those_of_the_prompt_alone(make: Make) -> None:
    model = lively(make, "cogvlm")
    rows, limits = sample_rows(model, 10), [3, 30, 1, 15, 6] * 2
    expected = [
        generate(
            model, row, limit, sample=SAMPLE, processors=[never_twice], stop_tokens=STOPS,
            generator=torch.Generator().manual_seed(prompt_seed(5, index)),
        )[0].tolist()
        for index, (row, limit) in enumerate(zip(rows, limits, strict=True))
    ]
    for num_slots in (1, 3, 10):
        queue = generate_queue(
            model, rows, num_slots=num_slots, max_new_tokens=limits, sample=SAMPLE, processors=[never_twice],
            stop_tokens=STOPS, seed=5,
        )
        assert in_order(queue) == expected


def test_equal_prompts_draw_differently_and_seeds_repeat(make: Make) -> None:
    model = lively(make)
    rows = [{"input_ids": torch.tensor([[4, 9, 2]])}] * 4

    def run(seed: int | None) -> list[list[int]]:
        return in_order(generate_queue(model, rows, max_new_tokens=8, sample={"temperature": 3.0}, seed=seed))

    assert len({tuple(tokens) for tokens in run(1)}) == 4
    assert run(1) == run(1) and run(1) != run(2)
    torch.manual_seed(3)
    first = run(None)
    second = run(None)
    torch.manual_seed(3)
    assert run(None) == first != second


def test_every_seed_and_index_has_a_stream_of_its_own() -> None:
    seeds = {prompt_seed(seed, index) % 2**32 for seed in range(-20, 20) for index in range(20)}
    assert len(seeds) == 800


# ---------------------------------------------------------------- mistakes


def test_a_wrong_prompt_is_named_once_the_others_have_their_answers(make: Make) -> None:
    model = lively(make, "cogvlm")
    rows = sample_rows(model, 10)
    rows[4] = {**rows[4], "token_type_ids": torch.ones_like(rows[4]["input_ids"])}
    taken, found, limits = [], {}, [3, 9, 2, 12, 5, 7, 4, 4, 4, 4]
    queue = generate_queue(
        model, (taken.append(number) or row for number, row in enumerate(rows)), num_slots=3, max_new_tokens=limits
    )
    with pytest.raises(ValueError, match=r"^prompt 4: Row 0 marks|^prompt 4: token_type_ids have room"):
        for index, tokens in queue:
            found[index] = tokens.tolist()
    assert sorted(found) == [index for index in taken if index != 4] and len(taken) < 8
    expected = alone(model, [rows[index] for index in found], [limits[index] for index in found])
    assert list(found.values()) == expected


def test_a_wrong_prompt_among_others_that_start_with_it_is_the_one_named(make: Make) -> None:
    model = lively(make, "cogagent")
    rows = [sample_row(model, 1, length) for length in (5, 6, 7)]
    rows[1]["cross_images"] = torch.cat([rows[1]["cross_images"]] * 2)
    found = {}
    slots = Slots(model, 3)
    for number, row in enumerate(rows):
        slots.add(number, row, 4)
    with pytest.raises(ValueError, match=r"^prompt 1: 2 cross_images were given for 1 image place"):
        slots.step()
    while slots.num_busy:
        found.update(slots.step())
    assert [found[0].tolist(), found[2].tolist()] == alone(model, [rows[0], rows[2]], [4, 4])


def test_a_source_of_prompts_that_fails_does_so_after_the_answers(make: Make) -> None:
    model = lively(make)
    rows = sample_rows(model, 3)

    def broken() -> Iterator[Row]:
        yield from rows
        raise OSError("no such picture")

    found = []
    with pytest.raises(OSError, match="no such picture"):
        for index, _ in generate_queue(model, broken(), num_slots=2, max_new_tokens=[9, 3, 5]):
            found.append(index)
    assert sorted(found) == [0, 1, 2]


@pytest.mark.parametrize(
    ("prompt", "options", "error", "message"),
    [
        ({"input_ids": torch.ones(2, 3, dtype=torch.int64)}, {}, ValueError, r"prompt 0: .*one row.*got \(2, 3\)"),
        ({"input_ids": torch.ones(1, 0, dtype=torch.int64)}, {}, ValueError, r"prompt 0: .*got \(1, 0\)"),
        ({}, {}, ValueError, r"prompt 0: .*got None"),
        ("Hello", {}, TypeError, "prompt 0 is a str. Give a batch of one row"),
        ({"input_ids": torch.tensor([[1, 2]]), "pixels": 1}, {}, TypeError, "prompt 0: .*no input 'pixels'"),
        (None, {"max_new_tokens": 0}, ValueError, "prompt 0: max_new_tokens is 0"),
        (None, {"max_new_tokens": []}, ValueError, "max_new_tokens ends after 0 numbers"),
        (None, {"num_slots": 0}, ValueError, "num_slots is 0; it must be at least 1"),
        (None, {"sample": {"temprature": 1.0}}, ValueError, "Unknown sampling option 'temprature'"),
        (None, {"sample": {"repetition_penalty": 0.0}}, ValueError, "repetition_penalty is 0.0"),
    ],
)
def test_mistakes_are_named(make: Make, prompt: Any, options: dict[str, Any], error: type, message: str) -> None:
    good = {"input_ids": torch.tensor([[1, 2]])}
    with pytest.raises(error, match=message):
        list(generate_queue(make(), [good if prompt is None else prompt], **options))


def test_a_cache_of_several_rows_and_a_batch_in_place_of_prompts_are_refused(make: Make) -> None:
    model = make()
    row = {"input_ids": torch.tensor([[1, 2]])}
    with pytest.raises(ValueError, match=r"prompt 0: Its cache has 2 rows"):
        list(generate_queue(model, [{**row, "cache": KVCache(model, 2, 9)}]))
    with pytest.raises(TypeError, match="prompts is one batch"):
        generate_queue(model, row)  # type: ignore[arg-type]
