"""On a GPU: decoding, prefill, training and experts at the width of a 7B model, against what the device can do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from mixformer import BaseModel, KVCache
from mixformer.decode import CompiledSteps, roomy_capacity
from mixformer.testing import collate, sample_row, tiny_model
from models.cogvlm import CogVLMConfig
from models.eva2_clip import EVA2CLIPEConfig
from models.llama import LLaMA, LLaMAConfig

from .accelerator import (
    attention_flops,
    bytes_per_token,
    compile_for,
    host_waits,
    limit_runs,
    made_on,
    measure_limits,
    moved,
    pick_device,
    product_flops,
    products_alone,
    refused_waits,
    require_memory,
    timed,
)
from .experts import DENSE, EXPERTS, FLOOR, SPLIT, WHOLE, Products, summed_gradients, with_experts
from .harness import Group, Options, Run, case
from .language import inference, random_ids
from .peers import QUICK, Mark, gradients, loss_of

EAGER, COMPILED, ALONE = "mixformer, eager", "mixformer, compiled", "matrix products alone"
COPY, PRODUCT = "of copy bandwidth", "of matrix rate"
LOGITS, GRADIENTS = 0.05, 0.1  # of the largest value, in bf16


def make_llama(options: Options, device: torch.device, num_layers: int = 32) -> LLaMA:
    """LLaMA-7B with so many layers and random bf16 weights."""
    config = LLaMAConfig(**options.pick({"num_layers": num_layers}, QUICK))
    made: LLaMA = config.build(device=device, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    return made.eval()


@case("gpu_limits", "GPU: measured limits")
def gpu_limits(options: Options) -> Iterator[Group]:
    """What the fractions of the other cases on a GPU refer to, measured again in every process: a copy of 4 GiB on the
    device, with the bytes read and those written, and a square bf16 product of size 8192, with two operations for each
    multiply-add."""
    runs = limit_runs(options, pick_device(options))
    yield Group("bf16", runs, (), rounds=20, reference="copy")


def decoding(options: Options, device: torch.device, model: BaseModel, row: dict[str, Any], title: str) -> Group:
    """Steps after a prompt, eager with a cache that grows and as one recorded graph."""
    row = moved(row, device)
    token, num_steps = row["input_ids"][:, -1], options.pick(16, 2)
    capacity = roomy_capacity(row["input_ids"].shape[1] + num_steps)
    grown, fixed = KVCache(model, 1, capacity), KVCache(model, 1, capacity, static=True)
    for cache in (grown, fixed):
        model(**row, cache=cache, last_only=True)
    steps = CompiledSteps(model, fixed)
    if device.type != "cuda":
        steps.compiled = compile_for(device, model)
    limit, weights = measure_limits(options, device).copy, bytes_per_token(model)
    rates = {"TB/s": weights / 1e12, COPY: weights / limit}
    runs = {
        EAGER: timed(
            inference(lambda: model(token[:, None], cache=grown, last_only=True)[:, -1]), num_steps, Mark(grown).back,
            rates=rates,
        ),
        f"{COMPILED}, recorded": timed(lambda: steps(token), num_steps, Mark(fixed).back, rates=rates),
    }
    stored = sum(x.numel() * x.element_size() for x in (*fixed.keys, *fixed.values))
    facts = {
        "GB of weights read per token": weights / 1e9, "GB of keys and values in all slots": stored / 1e9,
        "slots": float(capacity), "TB/s copied": limit / 1e12,
    }
    return Group(title, runs, (EAGER,), rounds=20, tolerance=LOGITS, facts=facts)


@case("gpu_decode", "GPU: decoding")
@torch.no_grad()
def gpu_decode(options: Options) -> Iterator[Group]:
    """LLaMA-7B and CogVLM-17B (224, after a picture) with random bf16 weights, one row, context 512; the mean of 16
    steps launched one behind the other. TB/s are the bytes of the language weights that every step reads (layers,
    final norm, head; not keys and values) over the time of a step."""
    device = pick_device(options)
    require_memory(device, options.pick(20, 0), "LLaMA-7B in bf16")
    llama = make_llama(options, device)
    ids = random_ids(llama.config, 1, options.pick(512, 8))
    yield decoding(options, device, llama, {"input_ids": ids}, "LLaMA-7B")
    del llama
    require_memory(device, options.pick(45, 0), "CogVLM-17B in bf16")
    tower = EVA2CLIPEConfig(hidden_size=16, num_layers=1, num_heads=2, inner_hidden_size=24, image_size=28)
    config = CogVLMConfig(**options.pick({}, {**QUICK, "vision": tower}))
    cogvlm = config.build(device=device, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0)).eval()
    num_image = cogvlm.mixins["image"].num_features + 2
    row = sample_row(cogvlm, 1, options.pick(512 - num_image, 4), torch.Generator().manual_seed(0))
    yield decoding(options, device, cogvlm, row, "CogVLM-17B, text after a picture")


@case("gpu_prefill", "GPU: prefill")
@torch.no_grad()
def gpu_prefill(options: Options) -> Iterator[Group]:
    """LLaMA-7B with random bf16 weights; prompts of 2048 tokens, no cache, logits of the last token of each row. Two
    operations for each multiply-add of the matrix products and of attention; attention is counted causally, over a
    token and those before it. The matrix products alone are counted without attention."""
    device = pick_device(options)
    require_memory(device, options.pick(30, 0), "Prefill of LLaMA-7B in bf16")
    model, limit = make_llama(options, device), measure_limits(options, device).product
    num_tokens, calls = options.pick(2048, 12), options.pick(3, 1)
    for num_rows in (1, 4):
        ids = random_ids(model.config, num_rows, num_tokens).to(device)
        products = product_flops(model, ids.numel(), num_rows)
        rates = rates_of(products + attention_flops(model, num_rows, num_tokens), limit)
        runs = {
            name: timed(inference(lambda run=run, ids=ids: run(ids, last_only=True)), calls, rates=rates)
            for name, run in ((EAGER, model), (COMPILED, compile_for(device, model)))
        }
        by_themselves = products_alone(model, ids.numel(), num_rows)
        runs[ALONE] = timed(by_themselves, calls, rates=rates_of(products, limit), compared=False)
        title, facts = f"{num_rows} x {num_tokens} tokens", {"TFLOP/s of a square product": limit / 1e12}
        yield Group(title, runs, (EAGER,), rounds=15, tolerance=LOGITS, facts=facts)


def rates_of(flops: float, limit: float) -> dict[str, float]:
    """Figures of work that takes so many operations."""
    return {"TFLOP/s": flops / 1e12, PRODUCT: flops / limit}


def training_run(
    model: BaseModel, loss: Callable[[], torch.Tensor], found: Callable[[BaseModel], Any], calls: int,
    rates: dict[str, float] | None = None,
) -> Run:
    """Forward, loss and backward; gradients of before are dropped first."""

    def step() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        return value.detach()

    return timed(
        step, calls, lambda: model.zero_grad(set_to_none=True), output=lambda: (step(), found(model)), rates=rates
    )


@case("gpu_training", "GPU: training")
def gpu_training(options: Options) -> Iterator[Group]:
    """8 layers of LLaMA-7B, random bf16 weights, 4 rows of 1024 tokens: forward, cross-entropy over all tokens at once
    and backward; no optimizer, nothing is computed twice. Operations are three times those of the forward, counted as
    for prefill, with logits of every token. The matrix products alone are counted without attention."""
    device = pick_device(options)
    require_memory(device, options.pick(40, 0), "Training 8 layers of LLaMA-7B in bf16")
    model, limit = make_llama(options, device, 8), measure_limits(options, device).product
    model.train()
    (num_rows, num_tokens), calls = options.pick((4, 1024), (2, 8)), options.pick(3, 1)
    ids = random_ids(model.config, num_rows, num_tokens).to(device)

    def loss() -> torch.Tensor:
        return loss_of(model(ids), ids)

    products = 3 * product_flops(model, ids.numel(), ids.numel())
    rates = rates_of(products + 3 * attention_flops(model, num_rows, num_tokens), limit)
    by_themselves = products_alone(model, ids.numel(), ids.numel(), backward=True)
    runs = {
        EAGER: training_run(model, loss, gradients, calls, rates),
        COMPILED: training_run(model, compile_for(device, loss), gradients, calls, rates),
        ALONE: timed(by_themselves, calls, rates=rates_of(products, limit), compared=False),
    }
    title, facts = f"{num_rows} x {num_tokens} tokens", {"TFLOP/s of a square product": limit / 1e12}
    yield Group(title, runs, (EAGER,), rounds=15, tolerance=GRADIENTS, facts=facts)


@case("gpu_experts", "GPU: visual expert over dense")
def gpu_experts(options: Options) -> Iterator[Group]:
    """4 layers of LLaMA-7B, random bf16 weights, and the same with visual experts, whose weights are copies; 4 rows of
    1024 tokens, of which the 640 behind the first are image tokens (no tower). Plans are made before, as a collator
    does, except where it says otherwise. The split-GEMM floor is as in `expert`."""
    device = pick_device(options)
    require_memory(device, options.pick(40, 0), "Training 4 layers of LLaMA-7B with experts in bf16")
    dense = make_llama(options, device, 4)
    with made_on(device, torch.bfloat16):
        experts = with_experts(dense)
    num_rows, num_tokens, num_image = options.pick((4, 1024, 640), (2, 12, 7))
    ids, calls = random_ids(dense.config, num_rows, num_tokens).to(device), options.pick(3, 1)
    types = torch.zeros_like(ids)
    types[:, 1 : 1 + num_image] = 1
    plans = dense.plan(ids), experts.plan(ids, token_type_ids=types)
    forwards: dict[str, tuple[LLaMA, Callable[[], torch.Tensor]]] = {
        DENSE: (dense, lambda: dense(ids, plan=plans[0])),
        EXPERTS: (experts, lambda: experts(ids, plan=plans[1], token_type_ids=types)),
        f"{EXPERTS}, planned inside": (experts, lambda: experts(ids, token_type_ids=types)),
    }
    for title, backward in (("forward", False), ("training", True)):
        runs: dict[str, Run] = {}
        for name, (model, logits) in forwards.items():
            if backward:
                runs[name] = training_run(model, lambda logits=logits: loss_of(logits(), ids), summed_gradients, calls)
            else:
                runs[name] = timed(inference(logits), calls)
        total, image = num_rows * num_tokens, num_rows * num_image
        for name, counts in ((WHOLE, (total,)), (SPLIT, (total - image, image))):
            with made_on(device, torch.bfloat16):
                products = Products(experts, counts, backward)
            runs[name] = timed(inference(products), calls, compared=False)
        yield Group(
            f"{title}, {num_rows} x {num_tokens} tokens, {num_image} of them image", runs, (DENSE, FLOOR),
            {FLOOR: lambda times: times[DENSE] - times[WHOLE] + times[SPLIT]}, rounds=15,
            tolerance=GRADIENTS if backward else LOGITS,
        )


@case("gpu_waits", "GPU: waiting inside a forward")
@torch.no_grad()
def gpu_waits(options: Options) -> Iterator[Group]:
    """Tiny fp32 models, so that time is launches: a batch of two unequal rows, its plan made before or inside. With the
    plan made before, nothing in a forward may make the host wait for the device, nor in a recorded decoding step. The
    profiler counts operators that need the host to know values, calls that wait, and copies to the host; torch's own
    check must not stop it either."""
    device = pick_device(options)
    for kind in ("llama", "cogvlm", "cogagent"):
        model = tiny_model(kind).to(device).eval()
        generator = torch.Generator().manual_seed(0)
        batch = moved(collate([sample_row(model, 1, 9, generator), sample_row(model, 2, 7, generator)]), device)
        plan = model.plan(**batch)
        cache = KVCache(model, 2, 64, static=True)
        token = model(**batch, cache=cache, last_only=True)[:, -1].argmax(-1)
        steps = CompiledSteps(model, cache)
        if device.type != "cuda":
            steps.compiled = compile_for(device, model)
        calls = {
            "a planned forward": inference(lambda model=model, batch=batch, plan=plan: model(**batch, plan=plan)),
            "a decoding step": lambda steps=steps, token=token: steps(token),
        }
        facts: dict[str, float] = {}
        for what, call in calls.items():
            call()
            found = host_waits(call)
            facts[f"waits in {what}"] = float(found.total())
            facts |= {f"{name} in {what}": float(number) for name, number in found.items()}
            if device.type == "cuda":
                facts[f"{what} is stopped by torch"] = float(refused_waits(call))
        inside = inference(lambda model=model, batch=batch: model(**batch))
        runs = {"planned inside": timed(inside, 10), "planned before": timed(calls["a planned forward"], 10)}
        yield Group(kind, runs, ("planned inside",), rounds=20, facts=facts)
