"""What a forward, or a step of training, holds beside the weights: run on the meta device and watched.

Nothing is computed and nothing allocated; tensors are made and dropped as by the kernels of a CPU or GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import _engine_run_backward

from mixformer.accounting.cache_bytes import is_cached, kept_bytes
from mixformer.accounting.live_memory import DeviceKernels, LiveBytes
from mixformer.accounting.parameters import nbytes
from mixformer.accounting.workload import Workload, is_tower, meta_twin, prepared
from mixformer.cache import KVCache
from mixformer.objectives import ClassificationObjective, ContrastiveObjective, SquaredDistanceObjective


@dataclass(frozen=True)
class AnsweringPeaks:
    """What answering holds beside the weights, in bytes.

    Attributes:
        cache: keys and values.
        kept: what mixins keep in the cache, such as keys and values of cross attention.
        activations: all else at the peak.
    """

    cache: int
    kept: int
    activations: int


@torch.no_grad()
def answering_peaks(model: Any, workload: Workload) -> AnsweringPeaks:
    """Run the whole row as a prompt, with a cache that has room for it.

    Args:
        model: on any device; it is left alone.
        workload: sizes of the batch.

    Raises:
        ValueError: sizes that the model does not take.
    """
    twin = meta_twin(model).eval()
    cache, live = None, LiveBytes()
    with live:
        plan, inputs = prepared(twin, workload)
        if plan is not None and is_cached(twin):
            cache = plan.cache = KVCache(twin, workload.batch, workload.row_length(twin))
        with DeviceKernels():
            twin.run(plan=plan, last_only=True, **inputs)
    if cache is None:
        return AnsweringPeaks(0, 0, live.peak)
    keys_values, kept = nbytes([*cache.keys, *cache.values]), kept_bytes(cache)
    return AnsweringPeaks(keys_values, kept, live.peak - keys_values - kept)


@dataclass(frozen=True)
class TrainingPeaks:
    """What a training step holds beside the weights, in bytes.

    Attributes:
        states: of the optimiser.
        average: of the weights (EMA).
        gradients: of all trained parameters.
        earlier_gradients: those that are there before the forward, from batches that were accumulated.
        activations: all else at the peak of the step. Gradients come one by one while activations go, so this is less
            than what lives before the backward.
        activations_alone: the most of all else at any time.
    """

    states: int
    average: int
    gradients: int
    earlier_gradients: int
    activations: int
    activations_alone: int


def training_twin(model: Any, config: Any) -> Any:
    """A copy on the meta device whose parameters have the dtypes and are trained as the loop's options say.

    Raises:
        ValueError: as of `assign`.
    """
    from mixformer.train.roles import cast_parameters, trainable_names

    twin = meta_twin(model)
    cast_parameters(twin, config)
    chosen = trainable_names(twin, config)
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(name in chosen)
    return twin.train()


def training_peaks(twin: Any, config: Any, workload: Workload) -> TrainingPeaks:
    """A step of the loop on a `training_twin`: forward and backward are run, AdamW and the average are formulas.

    AdamW has two states of each parameter, in its dtype, and two temporary tensors of one parameter at a time; on a GPU
    torch takes all parameters at once, with one temporary tensor of each. The average is fp32.

    Args:
        twin: what is trained; it is used up.
        config: options of the loop (`TrainConfig`).
        workload: sizes of one batch of one device; all of its tokens are learned.

    Raises:
        ValueError: sizes that the model does not take.
    """
    from mixformer.train.loop import _chunked_loss

    autocast = torch.bfloat16 if config.autocast else None
    live, kernels = LiveBytes(), DeviceKernels(autocast, config.attention_backend == "products")
    trained = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    gradients, averaged = nbytes(trained), sum(4 * parameter.numel() for parameter in trained)
    if config.accumulate > 1:  # those of the batches before are there
        live.live = live.apart = gradients
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
    else:
        _count_gradients(trained, live)
    live.restart()
    with live, kernels, _chunked_loss(twin, config.loss_chunk):
        loss = _loss(twin, workload)
        kernels.forget()
        _backward(loss)
    updating = gradients + 2 * max(parameter.nbytes for parameter in trained)
    return TrainingPeaks(
        states=2 * gradients, average=averaged if config.ema is not None else 0, gradients=gradients,
        earlier_gradients=gradients if config.accumulate > 1 else 0,
        activations=max(live.peak, updating) - gradients,
        activations_alone=max(live.peak_without, updating - gradients),
    )


def _backward(loss: torch.Tensor) -> None:
    """As `loss.backward()`, which would leave the mode that is entered, so that it did not see what is recomputed."""
    start = torch.ones_like(loss)
    _engine_run_backward((loss,), (start,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def _count_gradients(trained: Iterable[torch.Tensor], live: LiveBytes) -> None:
    """Tell as gradients come that they are known of."""

    def count(parameter: torch.Tensor) -> None:
        live.apart += 0 if parameter.grad is None else parameter.grad.nbytes

    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(count)


def _loss(twin: Any, workload: Workload) -> torch.Tensor:
    """What is minimised, on a batch of which everything is learned."""
    plan, inputs = prepared(twin, workload)
    objective = twin.objective
    if objective is None:
        loss: torch.Tensor = twin.run(plan=plan, **inputs).logits.float().sum()
        return loss
    batch = inputs if plan is None else {**inputs, "plan": plan}
    if not isinstance(objective, ContrastiveObjective):
        of_pictures = is_tower(twin) or isinstance(objective, (ClassificationObjective, SquaredDistanceObjective))
        shape = (len(inputs["images"]),) if of_pictures else (workload.batch, workload.row_length(twin))
        batch = {**batch, "labels": torch.zeros(shape, dtype=torch.int64, device="meta")}
    return torch.stack([value.float() for value in objective(twin, batch).values()]).sum()
