"""KVCache: what it stores, and that cached runs equal uncached ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mixformer import BaseModel, KVCache
from mixformer.testing import collate, sample_row

Make = Callable[..., BaseModel]
KINDS = ["llama", "cogvlm", "cogvlm2", "cogagent"]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("static", [False, True])
def test_every_chunking_gives_the_uncached_logits(make: Make, kind: str, static: bool) -> None:
    model = make(kind)
    row = sample_row(model, 1, 9, torch.Generator().manual_seed(0))
    length = row["input_ids"].shape[1]
    images = {"images", "cross_images"}
    with torch.no_grad():
        expected = model(**row)
        for first in range(length - 7, length + 1):
            cache = KVCache(model, 1, 30, static=static)
            found, start = [], 0
            for stop in sorted({first, min(first + 3, length), length}):
                part = {
                    key: value if key in images else value[:, start:stop]
                    for key, value in row.items()
                    if start == 0 or key == "input_ids"
                }
                found.append(model(**part, cache=cache))
                start = stop
            close(torch.cat(found, 1), expected)


def test_an_image_that_comes_with_a_later_chunk_equals_one_forward(make: Make) -> None:
    model = make("cogvlm")
    row = sample_row(model, 2, 8, torch.Generator().manual_seed(1), gap=True)
    with torch.no_grad():
        expected = model(**row)
        cut = 1 + 6 + 1
        cache = KVCache(model, 1, 30)
        first = model(
            row["input_ids"][:, :cut],
            token_type_ids=row["token_type_ids"][:, :cut],
            images=row["images"][:1],
            cache=cache,
        )
        rest = model(
            row["input_ids"][:, cut:],
            token_type_ids=row["token_type_ids"][:, cut:],
            images=row["images"][1:],
            cache=cache,
        )
    close(torch.cat([first, rest], 1), expected)


def test_a_span_may_not_be_cut_between_chunks(make: Make) -> None:
    model = make("cogvlm")
    row = sample_row(model, 1, 8)
    with pytest.raises(ValueError, match=r"Row 0 marks 3 image tokens.*multiple of 6. A span may not be cut"):
        model(
            row["input_ids"][:, :4],
            token_type_ids=row["token_type_ids"][:, :4],
            images=row["images"],
            cache=KVCache(model, 1, 20),
        )


def test_positions_and_lengths_are_counted_per_row(make: Make) -> None:
    model = make("cogvlm")
    rows = [sample_row(model, count, length) for count, length in ((1, 5), (0, 9))]
    cache = KVCache(model, 2, 30)
    with torch.no_grad():
        model(**collate(rows), cache=cache)
    # row 0: 5 text tokens, boi and eoi one position each, four features one position together
    assert cache.lengths.tolist() == [11, 9] and cache.length == 11
    assert cache.next_position.tolist() == [5 + 3, 9]
    with torch.no_grad():
        model(torch.ones(2, 2, dtype=torch.long), cache=cache)
    assert cache.lengths.tolist() == [13, 11] and cache.next_position.tolist() == [10, 11]


def test_keys_are_stored_after_rotation_and_values_as_projected(make: Make) -> None:
    model = make("llama", num_layers=1)
    ids = torch.tensor([[4, 9, 2]])
    cache = KVCache(model, 1, 5)
    with torch.no_grad():
        model(ids, cache=cache)
        attention = model.transformer.layers[0].attention
        x = model.transformer.word_embeddings.weight[ids[0]]
        x = (
            x
            * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
            * model.transformer.layers[0].attention_norm.weight
        )
        _, k, v = (x @ attention.qkv.weight.T).chunk(3, dim=-1)
    k, v = (part.view(3, 4, 8).transpose(0, 1) for part in (k, v))
    angle = torch.arange(3.0)[:, None] * 10000.0 ** (-torch.arange(4.0) / 4)
    first, second = k[..., :4], k[..., 4:]
    turned = torch.cat(
        [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1
    )
    close(cache.keys[0][0, :, :3], turned)
    close(cache.values[0][0, :, :3], v)
    assert not cache.keys[0][:, :, 3:].any()


@pytest.mark.parametrize("static", [False, True])
def test_no_room_and_other_batches_are_refused_before_anything_is_written(make: Make, static: bool) -> None:
    model = make()
    cache = KVCache(model, 2, 5, static=static)
    model(torch.ones(2, 4, dtype=torch.long), cache=cache)
    kept = cache.keys[0].clone()
    with pytest.raises(
        ValueError, match=r"holds 5 tokens per row; 4 are used and 2 more do not fit.*capacity=6"
    ):
        model(torch.ones(2, 2, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="made for 2 rows, but the batch has 3"):
        model(torch.ones(3, 1, dtype=torch.long), cache=cache)
    assert cache.length == 4 and torch.equal(cache.keys[0], kept)
    model(torch.ones(2, 1, dtype=torch.long), cache=cache)


@pytest.mark.parametrize("kind", KINDS)
def test_selected_rows_go_on_as_they_were(make: Make, kind: str) -> None:
    model = make(kind)
    generator = torch.Generator().manual_seed(0)
    batch = collate(
        [sample_row(model, count, length, generator) for count, length in ((1, 5), (0, 8), (2, 6))]
    )
    following = torch.tensor([[7], [3], [9]])
    order = torch.tensor([2, 0, 0])
    with torch.no_grad():
        caches = [KVCache(model, 3, 30) for _ in range(2)]
        for cache in caches:
            model(**batch, cache=cache)
        caches[1].select(order)
        close(model(following[order], cache=caches[1]), model(following, cache=caches[0])[order])


def test_cross_keys_are_computed_once(make: Make) -> None:
    model = make("cogagent")
    row = sample_row(model, 1, 6)
    cross = model.get_mixin("cross")
    runs = []
    cross.tower.register_forward_hook(lambda *_: runs.append(1))
    cache = KVCache(model, 1, 30)
    with torch.no_grad():
        model(**row, cache=cache)
        for _ in range(3):
            model(torch.ones(1, 1, dtype=torch.long), cache=cache)
    assert len(runs) == 1


def test_the_logits_of_the_last_slot_alone_are_the_last_ones(make: Make) -> None:
    model = make("cogvlm")
    row = sample_row(model, 1, 6)
    with torch.no_grad():
        out = model.run(**row, last_only=True)
        assert out.logits.shape[1] == 1
        close(out.logits, model(**row)[:, -1:])


def test_a_given_position_id_moves_the_next_one(make: Make) -> None:
    model = make()
    cache = KVCache(model, 1, 10)
    model(torch.ones(1, 3, dtype=torch.long), position_ids=torch.tensor([[4, 5, 6]]), cache=cache)
    assert cache.next_position.tolist() == [7]


@pytest.mark.parametrize("static", [False, True])
def test_a_row_whose_first_chunk_is_all_padding_starts_at_position_zero(make: Make, static: bool) -> None:
    model = make("llama")
    ids, mask = torch.tensor([[3, 1, 4, 1, 5, 9]]), torch.tensor([[0, 0, 0, 0, 1, 1]])
    cache, expected = KVCache(model, 1, 6, static=static), model(ids[:, 4:])
    model(ids[:, :3], mask[:, :3], cache=cache)
    assert cache.next_position.tolist() == [0]
    close(model(ids[:, 3:], mask[:, 3:], cache=cache)[:, 1:], expected)
    assert cache.next_position.tolist() == [2]


@pytest.mark.parametrize("static", [False, True])
def test_a_refused_batch_leaves_no_padding_behind(make: Make, static: bool) -> None:
    model = make("cogvlm")
    ids = torch.tensor([[3, 1, 4, 1, 5, 9]])
    expected, cache = model(ids), KVCache(model, 1, 10, static=static)
    with pytest.raises(ValueError, match="mark no place for them"):
        model(ids, torch.tensor([[0, 0, 0, 1, 1, 1]]), images=torch.zeros(1, 3, 28, 28), cache=cache)
    close(model(ids, cache=cache), expected)


def test_pictures_of_later_turns_join_those_of_their_row(make: Make) -> None:
    model = make("cogagent")
    generator = torch.Generator().manual_seed(0)
    turns = [
        [sample_row(model, count, 6, generator) for count in counts]
        for counts in ((1, 0, 0), (1, 2, 0), (0, 0, 0))
    ]
    caches = [KVCache(model, size, 90) for size in (3, 1, 1, 1)]
    with torch.no_grad():
        for turn in turns:
            together = model(**collate(turn), cache=caches[0])
            for index, row in enumerate(turn):
                alone = model(**row, cache=caches[1 + index])
                close(together[index, -alone.shape[1] :], alone[0])
