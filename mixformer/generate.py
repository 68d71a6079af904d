"""Generation: greedy, sampling and beam search over one prefill and cached steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from mixformer import prefix
from mixformer.cache import KVCache
from mixformer.decode import CompiledSteps, roomy_capacity
from mixformer.model import BaseModel

LogitsProcessor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def temperature(value: float) -> LogitsProcessor:
    """Divide logits; below 1 is sharper."""
    return lambda tokens, logits: logits / value


def top_k(count: int) -> LogitsProcessor:
    """Keep the `count` likeliest tokens."""

    def process(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        smallest = logits.topk(min(count, logits.shape[-1])).values[..., -1:]
        return logits.masked_fill(logits < smallest, -torch.inf)

    return process


def top_p(mass: float) -> LogitsProcessor:
    """Keep the smallest set of likeliest tokens whose probability reaches `mass` (arXiv:1904.09751)."""

    def process(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        ordered, index = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities >= mass
        return logits.masked_fill(torch.zeros_like(beyond).scatter(-1, index, beyond), -torch.inf)

    return process


def min_p(fraction: float) -> LogitsProcessor:
    """Keep tokens at least `fraction` as likely as the likeliest (arXiv:2407.01082)."""

    def process(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        probabilities = logits.softmax(-1)
        return logits.masked_fill(probabilities < fraction * probabilities.amax(-1, keepdim=True), -torch.inf)

    return process


def repetition_penalty(penalty: float) -> LogitsProcessor:
    """Make generated tokens less likely: positive logits divided, negative multiplied (arXiv:1909.05858)."""

    def process(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        seen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, tokens, True)
        return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)

    return process


def generate(
    model: BaseModel,
    batch: Mapping[str, Any],
    max_new_tokens: int = 256,
    cache: bool | KVCache = True,
    *,
    num_beams: int = 1,
    stop_tokens: int | Sequence[int] = (),
    **options: Any,
) -> torch.Tensor:
    """Continue every row of a batch.

    Args:
        model: a language model.
        batch: what the processor returns: input_ids [b, s] padded on the left, attention_mask, images, ...
        max_new_tokens: at most so many.
        cache: keep keys and values (the result is the same without); or a KVCache to go on from.
        num_beams: beams per row; 1 for none. Beams search greedily by summed log-probability over length.
        stop_tokens: ids that end a row (included in what is returned).
        **options: as of `stream`.

    Returns:
        [b, new] the new tokens; rows that stopped early are filled with `pad_token`.

    Raises:
        ValueError: padding on the right, sizes below one, or a cache without room.
    """
    if num_beams > 1:
        return _beam_search(model, batch, max_new_tokens, cache, num_beams, as_tuple(stop_tokens), **options)
    steps = list(stream(model, batch, max_new_tokens, cache, stop_tokens=stop_tokens, **options))
    return torch.stack(steps, dim=1)


@torch.no_grad()
def stream(
    model: BaseModel,
    batch: Mapping[str, Any],
    max_new_tokens: int = 256,
    cache: bool | KVCache = True,
    *,
    compile: bool = False,
    share_prefix: bool = False,
    stop_tokens: int | Sequence[int] = (),
    pad_token: int = 0,
    sample: dict[str, float] | None = None,
    processors: Sequence[LogitsProcessor] = (),
    generator: torch.Generator | None = None,
) -> Iterator[torch.Tensor]:
    """Yield the next token of every row, [b], as it is generated; ends when every row has stopped.

    Args:
        model: a language model.
        batch: as of `generate`.
        max_new_tokens: at most so many.
        cache: as of `generate`.
        compile: run every further token through one compiled graph over a static cache (see `CompiledSteps`).
        share_prefix: run what all rows begin with, pictures included, once for all of them.
        stop_tokens: ids that end a row.
        pad_token: what rows that have stopped are filled with.
        sample: draw instead of taking the likeliest: any of temperature, top_k, top_p, min_p,
            repetition_penalty, applied in the order repetition, temperature, top_k, top_p, min_p.
        processors: further callables (tokens [b, n], logits [b, v]) -> logits, before those of `sample`.
        generator: of the draws.
    """
    prompt = checked_prompt(batch, max_new_tokens)
    processors = [*processors, *sampling_processors(sample or {})]
    stops = torch.tensor(as_tuple(stop_tokens), dtype=torch.int64, device=prompt["input_ids"].device)
    steps = _Steps(model, prompt, max_new_tokens, cache, compile, share_prefix)
    tokens = prompt["input_ids"].new_zeros(len(prompt["input_ids"]), 0)
    done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    logits = steps.start()
    while True:
        for process in processors:
            logits = process(tokens, logits)
        if sample is None:
            token = logits.argmax(-1)
        else:
            token = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        token = torch.where(done, pad_token, token)
        done = done | torch.isin(token, stops)
        yield token
        tokens = torch.cat([tokens, token[:, None]], dim=1)
        if bool(done.all()) or tokens.shape[1] == max_new_tokens:
            return
        logits = steps.next(token)


class _Steps:
    """Logits of the next token after the prompt and after each further token, with or without a cache."""

    def __init__(
        self, model: BaseModel, prompt: dict[str, Any], num_new: int, cache: bool | KVCache, compiled: bool = False,
        share_prefix: bool = False,
    ) -> None:
        self.model, self.prompt = model, prompt
        self.compiled: CompiledSteps | None = None
        if (compiled and cache is False) or (share_prefix and cache is not True):
            raise ValueError("compile needs a cache, and share_prefix one of its own: leave `cache` at True.")
        num_rows, length = prompt["input_ids"].shape
        self.cache: KVCache | None = None
        if isinstance(cache, KVCache):
            self.cache = cache
        elif share_prefix:
            self.cache, self.prompt = prefix.share_prefix(model, prompt, num_new)
            if compiled:
                self.cache = self.cache.copy(capacity=roomy_capacity(self.cache.capacity), static=True)
        elif cache:
            capacity = length + num_new
            self.cache = KVCache(model, num_rows, roomy_capacity(capacity) if compiled else capacity, static=compiled)
        if compiled:
            assert self.cache is not None
            self.compiled = CompiledSteps(model, self.cache)

    def start(self) -> torch.Tensor:
        """[b, v] fp32 after the prompt."""
        return self.model(**self.prompt, cache=self.cache, last_only=True)[:, -1].float()

    def next(self, token: torch.Tensor) -> torch.Tensor:
        """[b, v] fp32 after one more token per row, [b]."""
        if self.compiled is not None:
            return self.compiled(token).float()
        if self.cache is not None:
            return self.model(token[:, None], cache=self.cache, last_only=True)[:, -1].float()
        for name, fill in (("input_ids", token), ("attention_mask", 1), ("token_type_ids", 0)):
            if self.prompt.get(name) is not None:
                old = self.prompt[name]
                new = torch.as_tensor(fill, dtype=old.dtype, device=old.device).expand(len(old))
                self.prompt[name] = torch.cat([old, new[:, None]], dim=1)
        return self.start()


@torch.no_grad()
def _beam_search(
    model: BaseModel,
    batch: Mapping[str, Any],
    max_new_tokens: int,
    cache: bool | KVCache,
    num_beams: int,
    stop_tokens: tuple[int, ...],
    pad_token: int = 0,
    length_penalty: float = 1.0,
) -> torch.Tensor:
    if cache is not True:
        raise ValueError("Beam search keeps a cache of its own; leave `cache` at True.")
    prompt = checked_prompt(batch, max_new_tokens)
    steps = _Steps(model, prompt, max_new_tokens, True)
    logits = F.log_softmax(steps.start(), dim=-1)
    num_rows, num_vocab = logits.shape
    device = logits.device
    stops = torch.tensor(stop_tokens, dtype=torch.int64, device=device)
    first = torch.arange(num_rows, device=device)[:, None] * num_beams
    assert steps.cache is not None
    steps.cache.select(torch.arange(num_rows, device=device).repeat_interleave(num_beams))
    logits = logits[:, None].expand(-1, num_beams, -1)
    scores = logits.new_full((num_rows, num_beams), -torch.inf)
    scores[:, 0] = 0
    tokens = prompt["input_ids"].new_zeros(num_rows, num_beams, 0)
    lengths = tokens.new_zeros(num_rows, num_beams)
    done = torch.zeros_like(lengths, dtype=torch.bool)
    while True:
        frozen = torch.full_like(logits, -torch.inf)
        frozen[..., pad_token] = 0
        total = scores[..., None] + torch.where(done[..., None], frozen, logits)
        grown = (lengths + (~done).long())[..., None]
        best = (total / grown**length_penalty).flatten(1).topk(num_beams).indices
        beam, token = best // num_vocab, best % num_vocab
        scores = total.flatten(1).gather(1, best)
        lengths, done = grown[..., 0].gather(1, beam), done.gather(1, beam)
        tokens = torch.cat([tokens.gather(1, beam[..., None].expand(-1, -1, tokens.shape[2])), token[..., None]], 2)
        done = done | torch.isin(token, stops)
        if bool(done.all()) or tokens.shape[2] == max_new_tokens:
            break
        steps.cache.select((first + beam).flatten())
        logits = F.log_softmax(steps.next(token.flatten()), dim=-1).view(num_rows, num_beams, num_vocab)
    winner = (scores / lengths**length_penalty).argmax(1)
    return tokens[torch.arange(num_rows, device=device), winner]


def sampling_processors(sample: dict[str, float]) -> list[LogitsProcessor]:
    """The processors of sampling options, in the order in which they apply.

    Raises:
        ValueError: an unknown option, or one that is not above 0.
    """
    makers: dict[str, Callable[[Any], LogitsProcessor]] = {
        "repetition_penalty": repetition_penalty, "temperature": temperature, "top_k": top_k, "top_p": top_p,
        "min_p": min_p,
    }
    unknown = sorted(set(sample) - set(makers))
    if unknown:
        raise ValueError(f"Unknown sampling option '{unknown[0]}'. The options are: {', '.join(makers)}.")
    for name, value in sample.items():
        if value <= 0:
            raise ValueError(f"{name} is {value}; it must be above 0. For the likeliest token, leave `sample` out.")
    return [makers[name](int(sample[name]) if name == "top_k" else sample[name]) for name in makers if name in sample]


def checked_prompt(batch: Mapping[str, Any], max_new_tokens: int) -> dict[str, Any]:
    """The inputs of a batch that are there.

    Raises:
        ValueError: nothing to generate, or padding on the right.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
    mask = batch.get("attention_mask")
    if mask is not None and not bool(mask[:, -1].all()):
        raise ValueError("The batch is padded on the right, so its last slot is no token. Pad prompts on the left.")
    return {name: value for name, value in batch.items() if value is not None}


def as_tuple(stop_tokens: int | Sequence[int]) -> tuple[int, ...]:
    """One stop token or several, as several."""
    return (stop_tokens,) if isinstance(stop_tokens, int) else tuple(stop_tokens)
