"""The training loop: AdamW, warm-up and cosine, clipping, accumulation, logging, and a safe stop."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from mixformer.hooks import did_you_mean

Losses = dict[str, torch.Tensor]
LossFunction = Callable[[Any, Any], Losses]


@dataclass
class TrainConfig:
    """Options of the loop.

    Attributes:
        steps: optimiser steps.
        learning_rate: the highest rate.
        warmup_steps: steps of linear warm-up.
        final_rate: fraction of `learning_rate` that the cosine ends at.
        weight_decay: of matrices; vectors are not decayed.
        betas: of AdamW.
        clip: largest norm of the gradient.
        accumulate: batches per optimiser step.
        trainable: glob patterns over parameter names; all that match are trained, the rest is frozen.
        frozen: glob patterns of parameters that stay frozen although `trainable` matches them.
        rate_factors: {glob pattern: factor} on the learning rate of some parameters.
        autocast: `bfloat16` for mixed precision, None for none.
        attention_backend: `products` composes attention of matrix products, faster in training on CPUs than torch's
            own kernels; `auto` leaves the choice to torch.
        log_every: steps between lines of the log.
        log_path: JSON-lines file that is appended to.
        state_path: file with weights and optimiser that is replaced whole every `save_every` steps and at the end.
        save_every: steps between saves; 0 for the end only.
        resume: go on from `state_path` if it exists.
        progress: show a progress bar.
    """

    steps: int = 1000
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    final_rate: float = 0.02
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    accumulate: int = 1
    trainable: list[str] = field(default_factory=lambda: ["*"])
    frozen: list[str] = field(default_factory=list)
    rate_factors: dict[str, float] = field(default_factory=dict)
    autocast: str | None = None
    attention_backend: str = "auto"
    log_every: int = 20
    log_path: str | None = None
    state_path: str | None = None
    save_every: int = 0
    resume: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"TrainConfig.{name} is {getattr(self, name)}; it must be at least 1.")
        if self.autocast not in (None, "bfloat16"):
            raise ValueError(f"TrainConfig.autocast is {self.autocast!r}; choose bfloat16, or leave it out.")
        if self.attention_backend not in ("auto", "products"):
            raise ValueError(f"TrainConfig.attention_backend is {self.attention_backend!r}; choose auto or products.")


def select_parameters(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """Names of the parameters that match one of the glob patterns.

    Raises:
        ValueError: a pattern matches nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    chosen: set[str] = set()
    for pattern in patterns:
        matching = {name for name in names if fnmatchcase(name, pattern)}
        if not matching:
            raise ValueError(
                f"The selector '{pattern}' matches none of the {len(names)} parameters.{did_you_mean(pattern, names)} "
                f"Selectors are glob patterns over names such as '{names[0] if names else ''}'."
            )
        chosen |= matching
    return chosen


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Factor on the rate at a step (from 0): linear warm-up, then a cosine down to `final_rate`."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.final_rate + (1 - config.final_rate) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """AdamW's groups of the trainable parameters, by weight decay and rate factor; matrices decay, vectors do not.

    Raises:
        ValueError: a selector matches nothing, or nothing is left to train.
    """
    chosen = select_parameters(model, config.trainable) - select_parameters(model, config.frozen)
    factors = {pattern: select_parameters(model, [pattern]) for pattern in config.rate_factors}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name in chosen:
            factor = math.prod(config.rate_factors[pattern] for pattern, names in factors.items() if name in names)
            decay = config.weight_decay if parameter.dim() > 1 else 0.0
            groups.setdefault((decay, factor), []).append(parameter)
    if not groups:
        raise ValueError("Nothing is left to train: `frozen` covers all that `trainable` matches.")
    return [
        {"params": parameters, "weight_decay": decay, "factor": factor}
        for (decay, factor), parameters in groups.items()
    ]


class AttentionOfProducts(TorchFunctionMode):
    """While entered, scaled dot product attention is two matrix products and a softmax in the dtype of its inputs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attention_of_products(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention_of_products(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    if is_causal:
        attn_mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    with torch.autocast(q.device.type, enabled=False):
        scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.to(q.dtype).transpose(-2, -1)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
        elif attn_mask is not None:
            scores = scores + attn_mask
        return F.dropout(scores.softmax(-1), dropout_p) @ v.to(q.dtype)


@contextmanager
def _only_trainable(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    chosen = set(parameters)
    mode = model.training
    for parameter in before:
        parameter.requires_grad_(parameter in chosen)
    model.train()
    try:
        yield
    finally:
        for parameter, requires_grad in before.items():
            parameter.requires_grad_(requires_grad)
            parameter.grad = None
        model.train(mode)


def atomic_save(state: Any, path: str | Path) -> None:
    """Write a file so that the old one stays whole until the new one is."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def model_losses(model: Any, batch: dict[str, Any]) -> Losses:
    """Losses by the objective of the model's class; without one, the auxiliary losses that its mixins made."""
    objective = getattr(type(model), "objective", None)
    losses: Losses = model.run(**batch).losses if objective is None else objective(model, batch)
    return losses


def train(
    model: nn.Module, batches: Iterable[Any], config: TrainConfig, loss: LossFunction = model_losses
) -> dict[str, float]:
    """Train the selected parameters; the others are left bit for bit.

    Args:
        model: the model; it is changed in place.
        batches: as many batches as `steps * accumulate`, or more.
        config: options.
        loss: (model, batch) -> named losses; their sum is minimised.

    Returns:
        the running means of the losses, their `total`, and `seconds`.

    Raises:
        ValueError: a selector that matches nothing, no losses, too few batches.
        FloatingPointError: a loss or gradient that is not finite; the weights are those of the last good step.
    """
    groups = parameter_groups(model, config)
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)
    first = _load_state(model, optimizer, config)
    stream, means, started = iter(batches), _RunningMeans(), time.perf_counter()
    device_type = parameters[0].device.type
    with ExitStack() as stack:
        stack.enter_context(_only_trainable(model, parameters))
        if config.attention_backend == "products":
            stack.enter_context(AttentionOfProducts())
        bar = stack.enter_context(tqdm(total=config.steps, initial=first, disable=not config.progress))
        for step in range(first, config.steps):
            factor = learning_rate_factor(step, config)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * factor * group["factor"]
            for _ in range(config.accumulate):
                batch = _next_batch(stream, step)
                with torch.autocast(device_type, torch.bfloat16, enabled=config.autocast is not None):
                    losses = loss(model, batch)
                if not losses:
                    raise ValueError("The batch gave no losses: nothing to minimise. Pass targets, or another `loss`.")
                total = torch.stack([value.float() for value in losses.values()]).sum()
                _require_finite(total, losses, step)
                (total / config.accumulate).backward()
                means.update({**losses, "total": total})
            norm = nn.utils.clip_grad_norm_(parameters, config.clip)
            _require_finite(norm, {"gradient norm": norm}, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            bar.update()
            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                bar.set_postfix(means.rounded())
                _log(config, {"step": done, "rate": config.learning_rate * factor, **means.rounded()}, started)
            if config.state_path and (done == config.steps or (config.save_every and done % config.save_every == 0)):
                state = {"step": done, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
                atomic_save(state, config.state_path)
    return {**means.rounded(), "seconds": round(time.perf_counter() - started, 1)}


class _RunningMeans:
    """Means of the recent past of named numbers."""

    def __init__(self, memory: float = 0.95) -> None:
        self.memory = memory
        self.sums: dict[str, float] = {}
        self.weights: dict[str, float] = {}

    def update(self, values: Losses) -> None:
        for name, value in values.items():
            self.sums[name] = self.memory * self.sums.get(name, 0.0) + float(value.detach())
            self.weights[name] = self.memory * self.weights.get(name, 0.0) + 1.0

    def rounded(self) -> dict[str, float]:
        return {name: round(self.sums[name] / self.weights[name], 4) for name in self.sums}


def _next_batch(stream: Iterator[Any], step: int) -> Any:
    try:
        return next(stream)
    except StopIteration:
        raise ValueError(
            f"The batches ran out at step {step}. Give `steps` x `accumulate` batches, or fewer steps."
        ) from None


def _require_finite(value: torch.Tensor, parts: Losses, step: int) -> None:
    if not bool(torch.isfinite(value)):
        named = ", ".join(f"{name} {float(part.detach()):g}" for name, part in parts.items())
        raise FloatingPointError(
            f"Training stopped at step {step}: {named}. The weights are those of the step before. Lower the learning "
            f"rate, or look at this batch."
        )


def _load_state(model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig) -> int:
    if not (config.resume and config.state_path and Path(config.state_path).exists()):
        return 0
    state = torch.load(config.state_path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def _log(config: TrainConfig, record: dict[str, Any], started: float) -> None:
    if config.log_path is None:
        return
    path = Path(config.log_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**record, "seconds": round(time.perf_counter() - started, 1)}) + "\n")
