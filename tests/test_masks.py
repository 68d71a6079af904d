"""Masks: each description against a loop over its definition, and how they are lowered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mixformer import BaseMixin, BaseModel, TransformerConfig, wrap
from mixformer.masks import Causal, Documents, Full, LastImage, LoweredMask, Mask, Padding, Prefix, WholePrefix, lower

LENGTHS = [2, 5]
VALID = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]]).bool()
DOCUMENTS = [[0, 0, 1, 1, 1, 2, 2], [3, 3, 3, 3, 3, 3, 4]]
IMAGES = [[0, 1, 1, 0, 2, 2, 0], [1, 1, 0, 0, 0, 2, 0]]


def latest(row: int, query: int) -> int:
    seen = [image for image in IMAGES[row][: query + 1] if image]
    return seen[-1] if seen else 0


CASES: dict[str, tuple[Mask, Callable[[int, int, int], bool]]] = {
    "full": (Full(), lambda row, q, k: True),
    "causal": (Causal(), lambda row, q, k: k <= q),
    "prefix": (Prefix(torch.tensor(LENGTHS)), lambda row, q, k: k < LENGTHS[row]),
    "whole prefix": (WholePrefix(torch.tensor(LENGTHS)), lambda row, q, k: max(q, k) < LENGTHS[row]),
    "padding": (Padding(VALID), lambda row, q, k: bool(VALID[row, k]) or k == q),
    "documents": (
        Documents(torch.tensor(DOCUMENTS)),
        lambda row, q, k: DOCUMENTS[row][q] == DOCUMENTS[row][k],
    ),
    "last_image": (
        LastImage(torch.tensor(IMAGES)),
        lambda row, q, k: IMAGES[row][k] == 0 or IMAGES[row][k] == latest(row, q),
    ),
    "prefix_lm": (Causal() | Prefix(torch.tensor(LENGTHS)), lambda row, q, k: k <= q or k < LENGTHS[row]),
    "packed": (
        Causal() & Documents(torch.tensor(DOCUMENTS)),
        lambda row, q, k: k <= q and DOCUMENTS[row][q] == DOCUMENTS[row][k],
    ),
    "nested": (
        (Causal() & Padding(VALID)) | (Prefix(torch.tensor(LENGTHS)) & Padding(VALID)),
        lambda row, q, k: (k <= q or k < LENGTHS[row]) and (bool(VALID[row, k]) or k == q),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("offset", "num_queries"), [(0, 7), (3, 4), (6, 1), (2, 3)])
def test_a_description_allows_what_its_definition_says(name: str, offset: int, num_queries: int) -> None:
    mask, rule = CASES[name]
    num_keys = offset + num_queries
    for place in (offset, torch.tensor(offset)):
        lowered = lower(mask, num_queries, num_keys, place, torch.device("cpu"))
        assert not (lowered.is_causal and num_queries != num_keys)
        for row in range(2):
            for query in range(num_queries):
                for key in range(num_keys):
                    if lowered.tensor is None:
                        allowed = not lowered.is_causal or key <= query
                    else:
                        allowed = bool(lowered.tensor.expand(2, 1, num_queries, num_keys)[row, 0, query, key])
                    assert allowed == rule(row, offset + query, key), (row, query, key)


def test_no_tensor_is_made_where_none_is_needed() -> None:
    device = torch.device("cpu")
    assert lower(Full(), 3, 3, 0, device) == LoweredMask()
    assert lower(Causal(), 3, 3, 0, device) == LoweredMask(is_causal=True)
    assert lower(Causal(), 1, 8, 7, device) == LoweredMask()
    assert lower(Causal(), 3, 8, 5, device).tensor is not None


@pytest.mark.parametrize("mask", [Full(), Causal(), Causal() & Padding(VALID)])
def test_prepended_keys_are_seen_by_all(mask: Mask) -> None:
    q, k = torch.zeros(2, 4, 7, 8), torch.zeros(2, 2, 7, 8)
    plain = lower(mask, 7, 7, 0, torch.device("cpu"))
    longer = plain.prepend(3, q, k)
    assert not longer.is_causal
    seen = torch.ones(2, 1, 7, 10).bool() if longer.tensor is None else longer.tensor.expand(2, 1, 7, 10)
    expected = (
        torch.ones(7, 7).bool() if isinstance(mask, Full) else mask.allowed(torch.arange(7), torch.arange(7))
    )
    assert seen[..., :3].all()
    assert torch.equal(seen[:, 0, :, 3:], expected.expand(2, 7, 7))


def test_keys_prepended_to_a_bias_get_none() -> None:
    q, k, bias = torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8), torch.randn(1, 2, 4, 4)
    longer = LoweredMask(bias).prepend(3, q, k).tensor
    assert longer is not None and not longer[..., :3].any() and torch.equal(longer[..., 3:], bias)


class Spy(BaseMixin):
    """Records what attention is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int, bool, bool]] = []

    @wrap
    def attention_fn(self, q: Any, k: Any, v: Any, mask: Any, layer: Any, ctx: Any, old_impl: Any) -> Any:
        self.seen.append((q.shape[2], k.shape[2], mask.is_causal, mask.tensor is not None))
        return old_impl(q, k, v, mask)


@pytest.mark.parametrize("static", [False, True])
def test_sdpa_is_told_causal_only_for_equal_lengths(make: Callable[..., BaseModel], static: bool) -> None:
    from mixformer import KVCache

    model = make("llama", num_layers=1)
    spy = Spy()
    model.add_mixin("spy", spy)
    cache = KVCache(model, 1, 12, static=static)
    for size in (4, 3, 1):
        model(torch.ones(1, size, dtype=torch.long), cache=cache)
    assert spy.seen == [(4, 4, True, False), (3, 7, False, True), (1, 8, False, False)]


def test_compiled_steps_over_a_static_cache_attend_over_fixed_shapes(make: Callable[..., BaseModel]) -> None:
    from mixformer import KVCache

    model = make("llama", num_layers=1)
    spy = Spy()
    model.add_mixin("spy", spy)
    cache = KVCache(model, 1, 12, static=True)
    step = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        model(torch.ones(1, 4, dtype=torch.long), cache=cache)
        for _ in range(2):
            step(torch.ones(1, 1, dtype=torch.long), cache=cache)
    assert spy.seen[1:] == [(1, 12, False, True)] * 2


class PrefixLM(BaseMixin):
    """Bidirectional over the first tokens."""

    inputs = ("prefix_lengths",)

    @wrap
    def attention_mask_forward(self, mask: Any, ctx: Any, old_impl: Any) -> Any:
        return old_impl(mask) | Prefix(ctx.require("prefix_lengths"))


def test_a_mixin_can_change_the_mask_of_every_layer() -> None:
    config = TransformerConfig(vocab_size=11, hidden_size=16, num_heads=2, num_layers=1)
    model, bidirectional = (
        BaseModel(config),
        BaseModel(TransformerConfig(**{**vars(config), "causal": False})),
    )
    bidirectional.load_state_dict(model.state_dict())
    model.add_mixin("prefix_lm", PrefixLM())
    ids = torch.randint(11, (2, 5))
    full = model(ids, prefix_lengths=torch.tensor([5, 5]))
    torch.testing.assert_close(full, bidirectional(ids), rtol=1e-5, atol=1e-6)
    part = model(ids, prefix_lengths=torch.tensor([0, 3]))
    model.del_mixin("prefix_lm")
    torch.testing.assert_close(part[0], model(ids)[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(part[1, :3], bidirectional(ids[1:, :3])[0], rtol=1e-5, atol=1e-6)


def test_a_wrong_mask_shape_says_what_it_must_be(make: Callable[..., BaseModel]) -> None:
    with pytest.raises(
        ValueError, match=r"must have the shape of input_ids, \(1, 4\); got \(1, 3\).*attention_mask_forward"
    ):
        make()(torch.ones(1, 4, dtype=torch.long), torch.ones(1, 3))


def test_padding_never_gives_a_softmax_of_nothing() -> None:
    lowered = lower(Causal() & Padding(VALID), 7, 7, 0, torch.device("cpu"))
    assert lowered.tensor is not None and lowered.tensor.any(-1).all()
    x = torch.randn(2, 1, 7, 4)
    assert F.scaled_dot_product_attention(x, x, x, attn_mask=lowered.tensor).isfinite().all()
