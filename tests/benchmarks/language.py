"""Language model alone: prefill, training, decoding, time to first token, and the overhead of a tiny model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from mixformer import KVCache
from mixformer.decode import CompiledSteps

from .floor import Cache, FloorLLaMA
from .harness import Group, Options, Run, case
from .peers import (
    FULL,
    QUICK,
    FloorMark,
    Mark,
    Peers,
    floor_gradients,
    gradients,
    hf_gradients,
    loss_of,
    make_peers,
)
from .sat_peer import sat_gradients

NO_COMPILER = {"compiled": "torch.compile needs a C++ compiler, and there is none"}


def inference(function: Callable[[], Any]) -> Callable[[], Any]:
    """Without gradients."""
    return torch.no_grad()(function)


def random_ids(config: Any, num_rows: int, num_tokens: int) -> torch.Tensor:
    """[b, s] token ids."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(config.vocab_size, (num_rows, num_tokens), generator=generator)


def last_logits(peers: Peers, ids: torch.Tensor) -> dict[str, Run]:
    """Logits of the last token, from everyone."""
    runs = {
        "floor": Run(inference(lambda: peers.floor(ids, last_only=True))),
        "mixformer": Run(inference(lambda: peers.ours(ids, last_only=True))),
    }
    if peers.hf is not None:
        runs["HF"] = Run(inference(lambda: peers.hf(ids, use_cache=False, logits_to_keep=1).logits))
    sat = peers.sat
    if sat is not None:
        runs["SAT"] = Run(inference(lambda: sat.logits(ids, last_only=True)))
    return runs


def products_alone(floor: FloorLLaMA, num_tokens: int) -> Callable[[], None]:
    """The matrix products of a forward with the last token's logits, and nothing else."""
    linears = [module for module in floor.layers.modules() if isinstance(module, nn.Linear)]
    inputs = {linear.in_features: torch.randn(1, num_tokens, linear.in_features) for linear in linears}
    last = torch.randn(1, 1, floor.head.in_features)

    def run() -> None:
        for linear in linears:
            F.linear(inputs[linear.in_features], linear.weight)
        F.linear(last, floor.head.weight)

    return inference(run)


@case("prefill", "Prefill")
def prefill(options: Options) -> Iterator[Group]:
    """A prompt of 512 tokens, no cache, logits of its last token."""
    peers = make_peers(options.pick(FULL, QUICK))
    ids = random_ids(peers.ours.config, 1, options.pick(512, 16))
    runs = last_logits(peers, ids)
    runs["matrix products alone"] = Run(products_alone(peers.floor, ids.shape[1]), compared=False)
    yield Group("512 tokens, eager", runs, rounds=30, skipped=peers.skipped)


@case("training", "Training")
def training(options: Options) -> Iterator[Group]:
    """Forward, cross-entropy and backward of a batch of 2 rows of 256 tokens; all weights train."""
    peers = make_peers(options.pick(FULL, QUICK))
    ids = random_ids(peers.ours.config, 2, options.pick(256, 8))

    def run(model: nn.Module, logits: Callable[[], torch.Tensor], grads: Callable[[], dict[str, torch.Tensor]]) -> Run:
        model.train()

        def step() -> torch.Tensor:
            loss = loss_of(logits(), ids)
            loss.backward()
            return loss.detach()

        return Run(step, lambda: model.zero_grad(set_to_none=True), lambda: (step(), grads()))

    runs = {
        "floor": run(peers.floor, lambda: peers.floor(ids), lambda: floor_gradients(peers)),
        "mixformer": run(peers.ours, lambda: peers.ours(ids), lambda: gradients(peers.ours)),
    }
    if peers.hf is not None:
        runs["HF"] = run(peers.hf, lambda: peers.hf(ids, use_cache=False).logits, lambda: hf_gradients(peers))
    sat = peers.sat
    if sat is not None:
        runs["SAT"] = run(sat.model, lambda: sat.logits(ids), lambda: sat_gradients(sat, peers.ours))
    yield Group("2 x 256 tokens, eager", runs, rounds=20, skipped=peers.skipped)


def decode_eager(peers: Peers, prompt: torch.Tensor, token: torch.Tensor) -> dict[str, Run]:
    """One step after a prompt, with caches that grow."""
    capacity = prompt.shape[1] + 8
    theirs, own = Cache(peers.floor, 1, capacity), KVCache(peers.ours, 1, capacity)
    peers.floor(prompt, theirs, last_only=True)
    peers.ours(prompt, cache=own, last_only=True)
    runs = {
        "floor": Run(inference(lambda: peers.floor(token, theirs)), FloorMark(theirs).back),
        "mixformer": Run(inference(lambda: peers.ours(token, cache=own, last_only=True)), Mark(own).back),
    }
    if peers.hf is not None:
        from transformers import DynamicCache

        cache = DynamicCache()
        peers.hf(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        length = prompt.shape[1]
        runs["HF"] = Run(
            inference(lambda: peers.hf(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits),
            lambda: cache.crop(length - cache.get_seq_length()),
        )
    sat = peers.sat
    if sat is not None:
        memory = sat.remembered(prompt)[1]
        runs["SAT"] = Run(inference(lambda: sat.step(token, memory)))
    return runs


def decode_compiled(peers: Peers, prompt: torch.Tensor, token: torch.Tensor) -> dict[str, Run]:
    """One step after a prompt, compiled, with caches of fixed size; ours as `generate(compile=True)` does it."""
    capacity = prompt.shape[1] + 64
    theirs, own = Cache(peers.floor, 1, capacity), KVCache(peers.ours, 1, capacity, static=True)
    peers.floor(prompt, theirs, last_only=True)
    peers.ours(prompt, cache=own, last_only=True)
    step = torch.compile(peers.floor.step, fullgraph=True)
    steps = CompiledSteps(peers.ours, own)
    return {
        "floor, compiled": Run(inference(lambda: step(token, theirs)), FloorMark(theirs).back),
        "mixformer, compiled": Run(lambda: steps(token[:, 0])[:, None], Mark(own).back),
    }


@case("decode", "Decoding")
@torch.no_grad()
def decode(options: Options) -> Iterator[Group]:
    """One new token after a context. Eager caches grow in place; compiled ones have a fixed size (context + 64) and
    attention runs over all of it. The time holds the step alone; the cache is set back between steps."""
    peers = make_peers(options.pick(FULL, QUICK))
    for context in options.pick((64, 960), (6, 12)):
        ids = random_ids(peers.ours.config, 1, context + 1)
        prompt, token = ids[:, :-1], ids[:, -1:]
        runs = decode_eager(peers, prompt, token)
        yield Group(f"context {context}, eager", runs, rounds=40, calls=10, skipped=peers.skipped)
        if options.quick:
            continue
        if shutil.which("g++") is None:
            yield Group(f"context {context}, compiled", {"floor": runs["floor"]}, skipped=NO_COMPILER)
            continue
        compiled = decode_compiled(peers, prompt, token)
        runs = {**compiled, "floor": runs["floor"], "mixformer": runs["mixformer"]}
        baselines = ("floor, compiled", "floor")
        yield Group(f"context {context}, compiled", runs, baselines, rounds=40, calls=10)


@case("ttft", "Time to first token")
def first_token(options: Options) -> Iterator[Group]:
    """From a prompt of 960 tokens to its next token: making a cache with room for 64 more, filling it, and the logits
    of the last token."""
    peers = make_peers(options.pick(FULL, QUICK))
    ids = random_ids(peers.ours.config, 1, options.pick(960, 12))
    capacity = ids.shape[1] + 64
    runs = {
        "floor": Run(inference(lambda: peers.floor(ids, Cache(peers.floor, 1, capacity), last_only=True))),
        "mixformer": Run(inference(lambda: peers.ours(ids, cache=KVCache(peers.ours, 1, capacity), last_only=True))),
    }
    if peers.hf is not None:
        runs["HF"] = Run(inference(lambda: peers.hf(ids, use_cache=True, logits_to_keep=1).logits))
    sat = peers.sat
    if sat is not None:
        runs["SAT"] = Run(inference(lambda: sat.remembered(ids)[0]))
    yield Group("960 tokens, eager", runs, rounds=20, skipped=peers.skipped)


def num_graphs(call: Callable[[], Any]) -> int:
    """Into how many graphs `torch.compile` cuts a call."""
    from torch._dynamo.testing import CompileCounter  # seconds, so only here

    counter = CompileCounter()
    torch.compile(call, backend=counter)()
    torch._dynamo.reset()
    return counter.frame_count


@case("tiny", "Overhead of a tiny model", threads=1)
def tiny(options: Options) -> Iterator[Group]:
    """Hidden size 64, 4 layers, 4 heads, 16 tokens, one thread: next to no arithmetic, so that what is left is the
    cost of Python and of dispatch. Graphs: into how many pieces `torch.compile` cuts the call."""
    sizes = {"vocab_size": 256, "hidden_size": 64, "num_layers": 4, "num_heads": 4, "inner_hidden_size": 172}
    peers = make_peers({**sizes, "max_positions": 512})
    ids = random_ids(peers.ours.config, 1, 16)
    runs = last_logits(peers, ids)
    facts = {} if options.quick else {f"graphs of {name}": float(num_graphs(run.call)) for name, run in runs.items()}
    skipped = dict(peers.skipped)
    if shutil.which("g++") is None:
        skipped |= NO_COMPILER
    elif not options.quick:
        floor, ours = torch.compile(peers.floor, fullgraph=True), torch.compile(peers.ours, fullgraph=True)
        runs["floor, compiled"] = Run(inference(lambda: floor(ids, last_only=True)))
        runs["mixformer, compiled"] = Run(inference(lambda: ours(ids, last_only=True)))
    yield Group("16 tokens", runs, rounds=60, calls=20, warmup=5, skipped=skipped, facts=facts)
