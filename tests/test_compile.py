"""What `torch.compile` sees: whole graphs, few of them, and the results of eager."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mixformer import BaseModel, KVCache
from mixformer.mixins import LoRAMixin
from mixformer.testing import Row, collate, sample_row

Make = Callable[..., BaseModel]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64):
        yield
    torch._dynamo.reset()


def batches(model: BaseModel, count: int = 20) -> Iterator[Row]:
    """Batches of one to four rows, 0 to 2 images a row, and many lengths; some without images, some without padding."""
    chosen, generator = random.Random(0), torch.Generator().manual_seed(0)
    takes_images = "images" in model.declared
    for index in range(count):
        num_rows = (1, 3, 2, 1, 4)[index % 5]
        most = 0 if index % 4 == 3 or not takes_images else 2
        length = chosen.randint(6, 15)
        rows = []
        for _ in range(num_rows):
            num_tokens = length if index % 3 == 0 else chosen.randint(6, 15)
            num_images = most if index % 3 == 0 else chosen.randint(0, most)
            rows.append(sample_row(model, num_images, num_tokens, generator))
        yield collate(rows)


def compiled_with(
    model: BaseModel, backend: str
) -> tuple[Callable[..., torch.Tensor], CompileCounterWithBackend]:
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, fullgraph=True, backend=counter), counter


def given(model: BaseModel, batch: Row) -> dict[str, torch.Tensor]:
    return {name: value for name, value in batch.items() if name in model.declared}


@pytest.mark.parametrize(("kind", "most"), [("llama", 2), ("cogvlm", 6), ("cogvlm2", 6), ("cogagent", 6)])
def test_twenty_batches_take_few_graphs_and_equal_eager(make: Make, kind: str, most: int) -> None:
    model = make(kind)
    compiled, counter = compiled_with(model, "eager")
    shapes = set()
    with torch.no_grad():
        for batch in batches(model):
            plan = model.plan(**batch, dynamic=True)
            found = compiled(batch["input_ids"], plan=plan, **given(model, batch))
            torch.testing.assert_close(found, model(**batch), rtol=1e-5, atol=1e-5)
            shapes.add((*batch["input_ids"].shape, len(batch.get("images", ()))))
    assert len(shapes) > 12
    assert counter.frame_count <= most


def test_training_batches_take_few_graphs_and_give_the_gradients_of_eager(make: Make) -> None:
    model = make("cogvlm", num_layers=1)
    model.add_mixin("lora", LoRAMixin(["qkv:q", "vision_expert.*"], rank=2))
    compiled, counter = compiled_with(model, "aot_eager")
    for batch in batches(model, 5):
        plan = model.plan(**batch, dynamic=True)
        gradients = []
        for run in (
            lambda b=batch, p=plan: compiled(b["input_ids"], plan=p, **given(model, b)),
            lambda b=batch: model(**b),
        ):
            model.zero_grad()
            run().square().mean().backward()
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-5, msg=name)
    assert counter.frame_count <= 6


@pytest.mark.parametrize("kind", ["llama", "cogvlm", "cogagent"])
def test_decode_steps_with_a_static_cache_never_recompile(make: Make, kind: str) -> None:
    model = make(kind)
    compiled, counter = compiled_with(model, "eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for num_images in (0, 1):
            rows = [sample_row(model, num_images, length, generator) for length in (6, 9)]
            batch = collate(rows)
            caches = [KVCache(model, 2, 40, static=static) for static in (True, False)]
            logits = [model(**batch, cache=cache)[:, -1:] for cache in caches]
            before, graphs = counter.frame_count, []
            for _ in range(6):
                ids = logits[0].argmax(-1)
                plan = model.plan(ids, cache=caches[0])
                logits = [compiled(ids, plan=plan, cache=caches[0]), model(ids, cache=caches[1])]
                torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)
                graphs.append(counter.frame_count - before)
            assert graphs[0] <= 1 and graphs[-1] == graphs[0], graphs


def test_checkpointed_layers_compile_whole(make: Make) -> None:
    model = make("cogvlm", checkpoint_activations=True)
    batch = next(batches(model))
    compiled, _ = compiled_with(model, "aot_eager")
    compiled(
        batch["input_ids"], plan=model.plan(**batch, dynamic=True), **given(model, batch)
    ).mean().backward()
    found = model.transformer.layers[0].mlp.up.weight.grad.clone()
    model.zero_grad()
    model(**batch).mean().backward()
    torch.testing.assert_close(found, model.transformer.layers[0].mlp.up.weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_equals_eager_for_changing_sizes(make: Make) -> None:
    model = make("cogvlm", num_layers=1)
    compiled, counter = compiled_with(model, "inductor")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for images, tokens in (((2, 2), 7), ((1, 1, 1), 9)):
            rows: list[Any] = [sample_row(model, count, tokens, generator) for count in images]
            batch = collate(rows)
            found = compiled(
                batch["input_ids"], plan=model.plan(**batch, dynamic=True), **given(model, batch)
            )
            torch.testing.assert_close(found, model(**batch), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
