"""Memory that loading, answering and training take, known before anything is allocated.

Weights, caches and optimiser states follow from shapes; what else lives at the peak is in `mixformer.accounting.peaks`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch.nn as nn

from mixformer.accounting.parameters import buffer_bytes, nbytes
from mixformer.accounting.peaks import AnsweringPeaks, TrainingPeaks
from mixformer.sites import Linear
from mixformer.transformer import Layer

PROCESS = 350_000_000
"""Bytes of a process that has imported torch and this package and has run a step, on a CPU (measured, torch 2.13)."""

GROUP = 128
"""Columns of a weight that share a scale in 4 bits; in 8 bits every row has one."""


@dataclass(frozen=True)
class MemoryUse:
    """What one device needs at most.

    Attributes:
        parts: {what: bytes}, which add up to the peak.
    """

    parts: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())

    @property
    def of_model(self) -> int:
        """Bytes at the peak without those of the process itself."""
        return self.total - self.parts.get("process", 0)


def memory_use(**parts: int) -> MemoryUse:
    """The parts that are there, with the process before them."""
    named = {name.replace("_", " "): int(size) for name, size in parts.items() if size}
    return MemoryUse({"process": PROCESS, **named})


def weight_bytes(model: Any, bits: int | None = None, frozen_only: bool = False) -> int:
    """Bytes of parameters and buffers.

    Args:
        model: on any device.
        bits: of the weights of Linears but output heads, 8 or 4; None for as they are. Scales are counted: 4 bytes a
            row of 8 bits, 4 bytes (scale and zero) each 128 columns of 4 bits.
        frozen_only: what requires gradients is held as it is.
    """
    quantised = {id(each.weight): each for each in quantised_linears(model, frozen_only)} if bits else {}
    total = buffer_bytes(model)
    for parameter in model.parameters():
        linear = quantised.get(id(parameter))
        if linear is None:
            total += parameter.nbytes
        elif bits == 8:
            total += parameter.numel() + 4 * linear.out_features
        else:
            total += parameter.numel() // 2 + 4 * linear.out_features * -(-linear.in_features // GROUP)
    return total


def quantised_linears(model: nn.Module, frozen_only: bool = False) -> list[Any]:
    """The Linears whose weights may be held in fewer bits: those of layers, connectors and towers, no output heads."""
    heads = {id(module) for mixin in getattr(model, "mixins", {}).values() for module in _head_linears(mixin)}
    found = [module for module in model.modules() if isinstance(module, Linear) and id(module) not in heads]
    return [linear for linear in found if not (frozen_only and linear.weight.requires_grad)]


def _head_linears(mixin: Any) -> Iterable[nn.Module]:
    return mixin.children() if "final_forward" in mixin.hooks() else ()


def _unpacked(linears: Iterable[Any]) -> int:
    """The largest weight that is unpacked while its Linear runs."""
    return max((linear.weight.nbytes for linear in linears), default=0)


def loading_memory(model: Any, bits: int | None = None, copied: bool = True) -> MemoryUse:
    """Reading weights tensor by tensor.

    Args:
        model: of the dtypes that it is loaded in.
        bits: as of `weight_bytes`.
        copied: what is read is converted or put together, so that the largest tensor is there once more. Otherwise it
            becomes the weight as it is.
    """
    largest = max((parameter.nbytes for parameter in model.parameters()), default=0)
    return memory_use(weights=weight_bytes(model, bits), tensor_being_read=largest if copied or bits else 0)


def inference_memory(model: Any, peaks: AnsweringPeaks, bits: int | None = None) -> MemoryUse:
    """Weights and what answering holds; `bits` as of `weight_bytes`."""
    return memory_use(
        weights=weight_bytes(model, bits), cache=peaks.cache, cross_attention_cache=peaks.kept,
        activations=peaks.activations + (_unpacked(quantised_linears(model)) if bits else 0),
    )


def training_memory(
    twin: Any, peaks: TrainingPeaks, devices: int = 1, sharded: bool = False, bits: int | None = None
) -> MemoryUse:
    """A step of the training loop, on each of several devices.

    With FSDP2 each device holds its share of weights, gradients, states and average; gathered are what lies outside the
    layers, and two layers, the one that runs and the next. Gradients are whole until they are summed up over devices.
    With DDP each device holds all, and the gradients a second time, in what is exchanged.

    Args:
        twin: a `training_twin`.
        peaks: what its step holds.
        devices: processes that train together, one device each.
        sharded: they share the weights (FSDP2).
        bits: as of `weight_bytes`, for frozen weights.
    """
    weights = weight_bytes(twin, bits, frozen_only=True)
    unpacked = _unpacked(quantised_linears(twin, frozen_only=True)) if bits else 0
    if devices > 1 and sharded:
        return _shared_memory(twin, peaks, devices, weights, unpacked)
    return memory_use(
        weights=weights, gradients=peaks.gradients, optimizer_states=peaks.states, average_of_weights=peaks.average,
        exchanged_gradients=peaks.gradients if devices > 1 else 0, activations=peaks.activations + unpacked,
    )


def _shared_memory(twin: nn.Module, peaks: TrainingPeaks, devices: int, weights: int, unpacked: int) -> MemoryUse:
    """With FSDP2 the peak is when the backward begins, when it ends, or when the optimiser steps."""
    layers = [list(module.parameters()) for module in twin.modules() if isinstance(module, Layer)]
    inside = {id(parameter) for layer in layers for parameter in layer}
    root = [parameter for parameter in twin.parameters() if id(parameter) not in inside]
    root_gradients = nbytes(parameter for parameter in root if parameter.requires_grad)
    layer_gradients = max((nbytes(p for p in layer if p.requires_grad) for layer in layers), default=0)
    gathered = nbytes(root) + sum(sorted((nbytes(layer) for layer in layers), reverse=True)[:2])
    share = -(-peaks.gradients // devices)
    largest = max(parameter.nbytes for parameter in twin.parameters() if parameter.requires_grad)
    begins = gathered + layer_gradients + peaks.activations_alone + unpacked + peaks.earlier_gradients // devices
    ends = nbytes(root) + root_gradients + share
    rest = max(begins, ends, share + 2 * largest // devices)
    gradients = min(share, rest)
    held = min(gathered, rest - gradients)
    return memory_use(
        weights=-(-weights // devices), gradients=gradients, optimizer_states=-(-peaks.states // devices),
        average_of_weights=-(-peaks.average // devices), gathered_weights=held, activations=rest - gradients - held,
    )


def is_sharded(model: Any, engine: str) -> bool:
    """Whether several processes share the weights (FSDP2) or hold them all (DDP)."""
    from mixformer.train.parallel import LARGE

    return engine == "fsdp" or (engine == "auto" and sum(p.numel() for p in model.parameters()) >= LARGE)
