"""What can be counted without a clock: kernels, tokens moved between experts, logits, tokens run."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mixformer import BaseMixin, BaseModel, KVCache, generate, wrap
from mixformer.routes import TEXT
from mixformer.testing import collate, sample_row

ROOT = Path(__file__).parents[1]
Make = Callable[..., BaseModel]
ROUTED_SITES = 3  # qkv, dense and the MLP


class Kernels(TorchDispatchMode):
    """Every operator that runs, in order, and how many rows each `index_select` gave."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.selected: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.append(str(func.overloadpacket))
        if func.overloadpacket is torch.ops.aten.index_select:
            self.selected.append(len(result))
        return result


def layer_kernels(model: BaseModel, hidden_states: torch.Tensor, ctx: Any) -> Kernels:
    layer: Any = model.transformer.layers[0]
    with Kernels() as kernels:
        layer(hidden_states, ctx)
    return kernels


def started(model: BaseModel, batch: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    """Hidden states before the first layer and the context that layers see."""
    seen: dict[str, Any] = {}

    class Spy(BaseMixin):
        @wrap
        def layer_forward(self, hidden_states: Any, layer: Any, ctx: Any, old_impl: Any) -> Any:
            seen.setdefault("input", hidden_states.detach())
            seen["ctx"] = ctx
            return old_impl(hidden_states)

    model.add_mixin("spy", Spy())
    with torch.no_grad():
        model(**batch)
    model.del_mixin("spy")
    return seen["input"], seen["ctx"]


def test_a_routed_site_moves_every_token_once_to_its_expert_and_once_back(make: Make) -> None:
    model = make("cogvlm")
    batch = collate([sample_row(model, 1, 9), sample_row(model, 2, 7)])
    hidden_states, ctx = started(model, batch)
    num_tokens = batch["input_ids"].numel()
    with torch.no_grad():
        kernels = layer_kernels(model, hidden_states, ctx)
    sizes = [len(ctx.routes.groups[name]) for name in (TEXT, "image")]
    assert kernels.selected == [*sizes, num_tokens] * ROUTED_SITES


def test_gradients_of_a_routed_site_move_every_token_once_as_well(make: Make) -> None:
    model = make("cogvlm")
    batch = collate([sample_row(model, 1, 9), sample_row(model, 2, 7)])
    hidden_states, ctx = started(model, batch)
    layer: Any = model.transformer.layers[0]
    output = layer(hidden_states.requires_grad_(), ctx)
    with Kernels() as kernels:
        output.sum().backward()
    sizes = [len(ctx.routes.groups[name]) for name in (TEXT, "image")]
    assert Counter(kernels.selected) == Counter([*sizes, batch["input_ids"].numel()] * ROUTED_SITES)
    assert not {"aten.index_add", "aten.index_put", "aten.index_add_", "aten.index_put_"} & set(kernels.names)


def test_without_pictures_experts_and_cross_attention_run_no_kernel(make: Make) -> None:
    plain, *others = (make(kind, rope_tables="released") for kind in ("llama", "cogvlm", "cogagent"))
    ids = torch.tensor([[1, 4, 2, 8], [5, 7, 3, 3]])
    with torch.no_grad():
        with Kernels() as expected:
            plain(ids)
        for model in others:
            with Kernels() as found:
                model(ids)
            assert found.names == expected.names


def test_decode_steps_run_no_kernel_for_experts(make: Make) -> None:
    plain, model = (make(kind, rope_tables="released") for kind in ("llama", "cogvlm"))
    row = sample_row(model, 1, 6)
    caches = [KVCache(each, 1, 30) for each in (plain, model)]
    token = torch.tensor([[3]])
    with torch.no_grad():
        plain(row["input_ids"], cache=caches[0])
        model(**row, cache=caches[1])
        with Kernels() as expected:
            plain(token, cache=caches[0])
        with Kernels() as found:
            model(token, cache=caches[1])
    assert found.names == expected.names


def test_decode_steps_about_pictures_in_every_row_need_no_cross_mask(make: Make) -> None:
    model = make("cogagent")
    rows = [sample_row(model, 1, length) for length in (6, 6)]
    cache = KVCache(model, 2, 30)
    with torch.no_grad():
        model(**collate(rows), cache=cache)
        with Kernels() as kernels:
            model(torch.tensor([[3], [4]]), cache=cache)
    assert "aten.where" not in kernels.names and "aten.bitwise_not" not in kernels.names


@pytest.mark.parametrize("kind", ["llama", "cogvlm"])
def test_a_prompt_costs_the_logits_of_its_last_token_only(make: Make, kind: str) -> None:
    model, shapes = make(kind), []

    class Spy(BaseMixin):
        @wrap
        def final_forward(self, hidden_states: Any, ctx: Any, old_impl: Any) -> Any:
            shapes.append(tuple(hidden_states.shape[:2]))
            return old_impl(hidden_states)

    model.add_mixin("spy", Spy())
    generate(model, collate([sample_row(model, 0, 5), sample_row(model, 0, 8)]), 3)
    assert shapes == [(2, 1)] * 3


def test_shapes_alone_need_no_compiler() -> None:
    build = "from models.cogagent import CogAgent; CogAgent(device='meta')"
    code = f"import sys; {build}; print('torch._dynamo' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "False"
