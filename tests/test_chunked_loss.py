"""The loss of supervised tokens a chunk at a time is the loss of all logits at once, and never holds those."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mixformer.mixins import LoRAMixin
from mixformer.objectives import LanguageObjective
from mixformer.train import Task, TrainConfig, train
from models.bert import BERT, BERTConfig
from models.gpt2 import GPT2, GPT2Config
from models.llama import LLaMA, LLaMAConfig

SIZES: dict[str, Any] = {"vocab_size": 97, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "inner_hidden_size": 24}


def make(kind: str) -> Any:
    generator = torch.Generator().manual_seed(3)
    if kind == "tied":
        return GPT2(GPT2Config(**SIZES, max_positions=32), generator=generator)
    model = LLaMA(LLaMAConfig(**SIZES), generator=generator)
    if kind == "adapted head":
        model.add_mixin("lora", LoRAMixin(["head", "qkv"], rank=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def make_batch(seed: int = 0, supervised: float = 0.5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(97, (3, 14), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    learnt = (torch.rand(ids.shape, generator=generator) < supervised) & (mask == 1)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~learnt, -100)}


def with_gradients(objective: LanguageObjective, model: Any, batch: Any) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = objective(model, batch)["language"]
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["tied", "own head", "adapted head"])
@pytest.mark.parametrize(
    "options", [{}, {"smoothing": 0.1}, {"smoothing": 0.1, "smooth_over": "all"}, {"ignored_ids": (3, 5)}]
)
def test_loss_and_gradients_in_chunks_equal_those_of_all_logits(kind: str, options: dict[str, Any]) -> None:
    model, batch = make(kind), make_batch()
    expected, gradients = with_gradients(LanguageObjective(**options), model, batch)
    for chunk in (1, 4, 1000):
        found, chunked = with_gradients(LanguageObjective(**options, chunk=chunk), model, batch)
        assert found == pytest.approx(expected, abs=1e-6)
        assert set(chunked) == set(gradients)
        for name, gradient in gradients.items():
            torch.testing.assert_close(chunked[name], gradient, rtol=0, atol=1e-6)


def test_the_loss_in_chunks_is_the_mean_written_out() -> None:
    model, batch = make("own head"), make_batch(1)
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"])
        found = LanguageObjective(chunk=3)(model, batch)["language"]
    losses = [
        -float(logits[row, slot].double().log_softmax(-1)[batch["labels"][row, slot + 1]])
        for row in range(3) for slot in range(13) if batch["labels"][row, slot + 1] >= 0
    ]
    assert found.item() == pytest.approx(sum(losses) / len(losses), abs=1e-6)


def test_a_batch_with_nothing_to_learn_gives_zero_and_the_same_gradients() -> None:
    model, batch = make("own head"), make_batch(supervised=0.0)
    expected, gradients = with_gradients(LanguageObjective(), model, batch)
    found, chunked = with_gradients(LanguageObjective(chunk=4), model, batch)
    assert found == expected == 0.0
    assert set(chunked) == set(gradients)
    assert not any(gradient.any() for gradient in chunked.values())


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return out


@pytest.mark.parametrize(("chunk", "limit"), [(4, 4 * 997), (8, 8 * 997), (None, 3 * 14 * 997)])
def test_no_tensor_is_larger_than_the_logits_of_a_chunk(chunk: int | None, limit: int) -> None:
    sizes = {**SIZES, "hidden_size": 2, "num_heads": 1, "vocab_size": 997, "inner_hidden_size": 4}
    model = LLaMA(LLaMAConfig(**sizes), generator=torch.Generator().manual_seed(3))
    batch = make_batch(supervised=1.0)
    with LargestTensor() as seen:
        LanguageObjective(chunk=chunk)(model, batch)["language"].backward()
    assert seen.largest == limit


def test_no_logits_are_kept_for_the_backward_pass() -> None:
    model, batch = make("own head"), make_batch()
    kept: list[tuple[int, ...]] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    def logits(chunk: int | None) -> list[tuple[int, ...]]:
        kept.clear()
        weight = (SIZES["hidden_size"], SIZES["vocab_size"])
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            LanguageObjective(chunk=chunk)(model, batch)
        return [shape for shape in kept if shape[-1:] == weight[1:] and shape != weight]

    assert logits(None) and not logits(4)


def test_the_loop_takes_the_loss_in_chunks_and_leaves_the_model_as_it_was() -> None:
    class Batches(Task):
        def batches(self) -> Any:
            return iter([make_batch(seed) for seed in range(8)])

    plain, chunked = make("own head"), make("own head")
    options: dict[str, Any] = {"steps": 4, "accumulate": 2, "warmup_steps": 1, "learning_rate": 1e-2, "progress": False}
    train(plain, Batches(), TrainConfig(**options))
    head, rows = chunked.get_mixin("head").linear, []
    handle = head.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].numel() // 16))
    train(chunked, Batches(), TrainConfig(**options, loss_chunk=5))
    handle.remove()
    assert max(rows) == 5
    assert "objective" not in vars(chunked) and chunked.objective is LLaMA.objective
    for a, b in zip(plain.parameters(), chunked.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


def test_dropout_at_the_head_is_the_same_in_the_second_pass() -> None:
    model = make("own head")
    seen: list[torch.Tensor] = []

    def drop(module: Any, inputs: Any, out: torch.Tensor) -> torch.Tensor:
        seen.append(F.dropout(out, 0.5).detach())
        return F.dropout(out, 0.5)

    model.get_mixin("head").linear.register_forward_hook(drop)
    LanguageObjective(chunk=1000)(model, make_batch())["language"].backward()
    first, again = seen[-2:]
    assert torch.equal(first, again)


def test_models_whose_head_needs_the_whole_sequence_and_other_objectives_are_refused() -> None:
    model = BERT(BERTConfig(**SIZES, max_positions=32))
    with pytest.raises(ValueError, match=r"cannot be taken in chunks: .* at the head, by sentence"):
        LanguageObjective(chunk=4)(model, make_batch())
    with pytest.raises(ValueError, match="trained by MaskedLanguageObjective, which needs all logits"):
        train(model, [make_batch()], TrainConfig(steps=1, loss_chunk=4, progress=False))
    with pytest.raises(ValueError, match=r"chunk is 0; it must be at least 1"):
        LanguageObjective(chunk=0)
    labels = make_batch()
    labels["labels"] = labels["labels"][:, 1:]
    with pytest.raises(ValueError, match=r"shape \(3, 13\) do not fit hidden states of shape \(3, 14, 16\)"):
        LanguageObjective(chunk=4)(make("tied"), labels)
