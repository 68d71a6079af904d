"""Routes: each token group through its branch, and nested routers intersect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mixformer import BaseMixin, BaseModel, Context, wrap
from mixformer.routes import Routes
from mixformer.testing import sample_row


def routed(**groups: list[int]) -> Context:
    ctx = Context()
    for name, index in groups.items():
        ctx.routes.add(name, torch.tensor(index, dtype=torch.long), 12)
    return ctx


def test_each_group_takes_its_branch_and_keeps_its_place() -> None:
    ctx = routed(image=[1, 2, 7], audio=[4, 11])
    x = torch.arange(24.0).view(2, 6, 2)
    found = ctx.route(x, text=lambda t: t, image=lambda t: t + 100, audio=lambda t: -t)
    expected = x.clone().view(12, 2)
    for token in range(12):
        if token in (1, 2, 7):
            expected[token] += 100
        if token in (4, 11):
            expected[token] *= -1
    assert torch.equal(found, expected.view(2, 6, 2))


def test_tuples_of_other_widths_come_back_with_the_leading_axes() -> None:
    ctx = routed(image=[0, 5])
    x = torch.randn(3, 4, 2)
    wide, narrow = ctx.route(
        x, text=lambda t: (t.repeat(1, 2), t[:, :1]), image=lambda t: (t.repeat(1, 2) * 2, t[:, :1])
    )
    assert wide.shape == (3, 4, 4) and torch.equal(narrow, x[..., :1])


@pytest.mark.parametrize("length", [1, 20])
@pytest.mark.parametrize("names", [["image", "text"], ["text", "image", "audio", "image"], ["text", "text", "image"]])
def test_long_runs_and_short_ones_are_split_and_joined_alike(names: list[str], length: int) -> None:
    owners = [name for name in names for _ in range(length)]
    places = {name: [place for place, owner in enumerate(owners) if owner == name] for name in set(names)}
    ctx = Context()
    for name in ("image", "audio"):
        ctx.routes.add(name, torch.tensor(places.get(name, []), dtype=torch.long), len(owners))
    weights = {name: torch.randn(3, 4, requires_grad=True) for name in places}
    branches = {name: (lambda t, w=weight: (t @ w[:, :1], t @ w[:, 1:])) for name, weight in weights.items()}
    x = torch.randn(len(owners), 3, requires_grad=True)
    narrow, wide = ctx.route(x, **branches)
    expected = torch.stack([token @ weights[owner] for token, owner in zip(x, owners, strict=True)])
    torch.testing.assert_close(torch.cat([narrow, wide], 1), expected)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(ctx.route(x, **branches), 1), expected)
    grad = torch.randn_like(expected)
    inputs = [x, *weights.values()]
    found = torch.autograd.grad((narrow, wide), inputs, (grad[:, :1], grad[:, 1:]))
    torch.testing.assert_close(found, torch.autograd.grad(expected, inputs, grad))
    runs = ctx.routes.split(tuple((name,) for name in ctx.routes.present), ctx.routes.present).runs
    assert (runs is not None) == (length > 16)


def test_a_group_without_a_branch_goes_with_text() -> None:
    ctx = routed(image=[1, 2], audio=[3])
    x = torch.zeros(12, 1)
    seen: list[int] = []

    def count(tokens: torch.Tensor) -> torch.Tensor:
        seen.append(len(tokens))
        return tokens + 1

    assert ctx.route(x, text=lambda t: t, image=count).sum() == 2 and seen == [2]
    assert ctx.route(x, text=count, image=lambda t: t).sum() == 10 and seen == [2, 10]


def test_absent_groups_cost_nothing() -> None:
    ctx = routed(image=[])
    x = torch.randn(2, 6, 3)

    def text(tokens: torch.Tensor) -> torch.Tensor:
        assert tokens is x
        return tokens

    assert ctx.route(x, text=text, image=lambda t: 1 / 0) is x
    only = routed(image=list(range(12)))
    assert only.route(x, text=lambda t: 1 / 0, image=lambda t: t) is x


def test_a_router_under_a_router_sees_the_intersection() -> None:
    ctx = routed(image=[1, 2, 7], audio=[4])
    x = torch.zeros(12, 1)

    def inner(tokens: torch.Tensor) -> torch.Tensor:
        return ctx.route(tokens, text=lambda t: t + 1, audio=lambda t: t + 10, image=lambda t: t + 1000)

    found = ctx.route(x, text=inner, image=lambda t: t - 1).flatten().tolist()
    expected = [-1.0 if i in (1, 2, 7) else 10.0 if i == 4 else 1.0 for i in range(12)]
    assert found == expected and ctx.selection is None


def test_a_size_mismatch_is_refused() -> None:
    ctx = routed(image=[1, 2])
    with pytest.raises(
        ValueError, match=r"ctx.route got 11 tokens, but the current selection \(text, image\) has 12"
    ):
        ctx.route(torch.zeros(11, 1), text=lambda t: t, image=lambda t: t)

    def shorter(tokens: torch.Tensor) -> torch.Tensor:
        return ctx.route(tokens[1:], text=lambda t: t, audio=lambda t: t)

    with pytest.raises(
        ValueError, match=r"ctx.route got 9 tokens, but the current selection \(text\) has 10"
    ):
        ctx.route(torch.zeros(12, 1), text=shorter, image=lambda t: t)


def test_the_text_branch_is_required() -> None:
    with pytest.raises(ValueError, match="needs a `text` branch"):
        routed(image=[1]).route(torch.zeros(12, 1), image=lambda t: t)


def test_groups_may_not_overlap_or_repeat() -> None:
    routes = Routes()
    routes.add("image", torch.tensor([1, 2]), 6)
    with pytest.raises(ValueError, match="'image' exists already"):
        routes.add("image", torch.tensor([3]), 6)
    with pytest.raises(ValueError, match="'text' exists already"):
        routes.add("text", torch.tensor([3]), 6)
    with pytest.raises(
        ValueError, match="route 'audio' belong to another route already; spans must not overlap"
    ):
        routes.add("audio", torch.tensor([2, 3]), 6)
    assert routes.present == ("text", "image")


class TextOnly(BaseMixin):
    """Doubles the MLP of text tokens, whoever is above or below."""

    @wrap
    def mlp_forward(self, hidden_states: Any, layer: Any, ctx: Any, old_impl: Any) -> Any:
        return ctx.route(hidden_states, text=lambda x: 2 * old_impl(x), image=old_impl)


@pytest.mark.parametrize("below", [True, False])
def test_a_token_scoped_wrap_means_the_same_below_and_above_an_expert(
    make: Callable[..., BaseModel], below: bool
) -> None:
    model = make("cogvlm", num_layers=1)
    row = sample_row(model, 1, 6, torch.Generator().manual_seed(0))
    seen: dict[str, Any] = {}

    class Keep(BaseMixin):
        @wrap
        def mlp_forward(self, hidden_states: Any, layer: Any, ctx: Any, old_impl: Any) -> Any:
            seen["x"], seen["y"] = hidden_states, old_impl(hidden_states)
            return seen["y"]

    if below:
        expert = model.del_mixin("vision_expert_mlp")
        model.add_mixin("text_only", TextOnly())
        model.add_mixin("vision_expert_mlp", expert)
    else:
        model.add_mixin("text_only", TextOnly())
    model.add_mixin("keep", Keep())
    layer: Any = model.transformer.layers[0]
    with torch.no_grad():
        model(**row)
        text, image = 2 * layer.mlp(seen["x"]), layer.mixins["vision_expert_mlp"](seen["x"])
    types = row["token_type_ids"][0].tolist()
    for slot, kind in enumerate(types):
        is_image = kind == 1 and (slot + 1 < len(types) and types[slot + 1] == 1)  # eoi counts as text
        expected = image if is_image else text
        torch.testing.assert_close(seen["y"][0, slot], expected[0, slot], rtol=1e-5, atol=1e-6)
