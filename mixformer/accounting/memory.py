"""Memory that loading, answering and training take, known before anything is allocated.

Weights, caches and optimiser states follow from shapes; what else lives at the peak is in `mixformer.accounting.peaks`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.nn as nn

from mixformer.accounting.parameters import buffer_bytes, nbytes
from mixformer.accounting.peaks import AnsweringPeaks, TrainingPeaks
from mixformer.accounting.quantised_shapes import quantised_bytes
from mixformer.quantised import Kind
from mixformer.transformer import Layer

PROCESS = 350_000_000
"""Bytes of a process that has imported torch and this package and has run a step, on a CPU (measured, torch 2.13)."""

Kinds = Mapping[str, Kind]
"""{path of a Linear: how its weight is held}."""


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


def weight_bytes(model: Any, kinds: Kinds | None = None, frozen_only: bool = False) -> int:
    """Bytes of parameters and buffers.

    Args:
        model: on any device.
        kinds: {path of a Linear: kind} of those whose weights are held quantised, with their scales and offsets.
        frozen_only: what requires gradients is held as it is.
    """
    saved = sum(
        linear.weight.nbytes - quantised_bytes(linear, kind) for linear, kind in _quantised(model, kinds, frozen_only)
    )
    return buffer_bytes(model) + nbytes(model.parameters()) - saved


def _quantised(model: nn.Module, kinds: Kinds | None, frozen_only: bool) -> Iterator[tuple[Any, Kind]]:
    modules = dict(model.named_modules()) if kinds else {}
    for path, kind in (kinds or {}).items():
        linear: Any = modules[path]
        if not (frozen_only and linear.weight.requires_grad):
            yield linear, kind


def _pieces(model: nn.Module, kinds: Kinds | None, rows: int, frozen_only: bool = False) -> int:
    """A quantised Linear makes its output in pieces and puts them together: the widest output once more.

    Heads are left out: they answer for the last token alone, and in training more lives after them, in the loss.
    """
    heads = {
        id(linear) for mixin in getattr(model, "mixins", {}).values() if "final_forward" in mixin.hooks()
        for linear in mixin.children()
    }
    linears = [linear for linear, _ in _quantised(model, kinds, frozen_only) if id(linear) not in heads]
    return max((rows * linear.out_features * linear.weight.itemsize for linear in linears), default=0)


@dataclass(frozen=True)
class Reading:
    """How weights come from their files.

    Attributes:
        copied: what is read is converted or put together. Otherwise it becomes the weight as it is.
        ahead: bytes that are read before they are needed.
        sizes: {parameter: bytes in the files}; as in the model where nothing is said.
    """

    copied: bool = True
    ahead: int = 0
    sizes: Mapping[str, int] = field(default_factory=dict)


def loading_memory(model: Any, kinds: Kinds | None = None, reading: Reading | None = None) -> MemoryUse:
    """Reading weights tensor by tensor, with the next ones in memory already.

    Args:
        model: of the dtypes that it is loaded in.
        kinds: as of `weight_bytes`.
        reading: how.
    """
    reading, total = reading or Reading(), weight_bytes(model, kinds)
    if not reading.copied and not kinds:
        return memory_use(weights=total)
    fewer = {
        f"{path}.weight": quantised_bytes(linear, (kinds or {})[path])
        for path, linear in model.named_modules() if path in (kinds or {})
    }  # fmt: skip
    sizes = [
        (fewer.get(name, parameter.nbytes), reading.sizes.get(name, parameter.nbytes))
        for name, parameter in model.named_parameters()
    ]
    if not reading.ahead:  # the largest may be the last
        return memory_use(weights=total, tensors_being_read=max((read for _, read in sizes), default=0))
    return memory_use(weights=total, tensors_being_read=_reading_peak(sizes, reading.ahead) - total)


def _reading_peak(sizes: Sequence[tuple[int, int]], ahead: int) -> int:
    """The most that is there while tensors of (bytes as held, bytes as read) come one after the other.

    There are those that are held, the one that is made, what it is made of, and the next ones, at least one. Threads
    read them, so that they may come later and the real peak may be lower.
    """
    most = held = waiting = last = 0
    for index, (made, read) in enumerate(sizes):
        if last <= index:
            waiting, last = waiting + read, index + 1
        while last < len(sizes) and (last - index < 2 or waiting + sizes[last][1] <= ahead):
            waiting, last = waiting + sizes[last][1], last + 1
        held += made
        taken = read if made == read else 0  # as it is
        most, waiting = max(most, held + waiting - taken), waiting - read
    return most


def inference_memory(model: Any, peaks: AnsweringPeaks, kinds: Kinds | None = None, rows: int = 0) -> MemoryUse:
    """Weights and what answering holds; `kinds` as of `weight_bytes`, `rows` the tokens of a batch."""
    return memory_use(
        weights=weight_bytes(model, kinds), cache=peaks.cache, cross_attention_cache=peaks.kept,
        activations=peaks.activations + _pieces(model, kinds, rows),
    )


def training_memory(
    twin: Any, peaks: TrainingPeaks, devices: int = 1, sharded: bool = False, kinds: Kinds | None = None,
    rows: int = 0,
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
        kinds: as of `weight_bytes`, for frozen weights.
        rows: tokens of a batch.
    """
    weights = weight_bytes(twin, kinds, frozen_only=True)
    unpacked = _pieces(twin, kinds, rows, frozen_only=True)
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
