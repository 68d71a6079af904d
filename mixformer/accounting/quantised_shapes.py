"""Quantised weights as shapes: what they would take, and what they were."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn

from mixformer.accounting.parameters import nbytes
from mixformer.quantised import Kind, QuantisedLinear, choose, resolve_hooks, shape_linear
from mixformer.sites import Linear

INSTALL = 'pip install "mixformer[quantised]"'


def can_quantise() -> bool:
    """Whether torchao, which rounds the weights, is installed."""
    return importlib.util.find_spec("torchao") is not None


def kinds_of(model: nn.Module) -> dict[str, Kind]:
    """{path: kind} of the Linears that are quantised in a model."""
    return {path: module.kind for path, module in model.named_modules() if isinstance(module, QuantisedLinear)}


def chosen_kinds(model: nn.Module, choices: str | Mapping[str, str | None]) -> dict[str, Kind]:
    """As of `mixformer.quantised.choose`, without its warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return choose(model, choices)


def unquantised(twin: nn.Module) -> Any:
    """Make the quantised Linears of a model on the meta device plain ones again, in place, and return it."""
    linears: list[Any] = [module for module in twin.modules() if isinstance(module, QuantisedLinear)]
    for linear in linears:
        weight = torch.empty(linear.out_features, linear.in_features, dtype=linear.scale.dtype, device="meta")
        bias = linear._parameters.pop("bias")
        linear._parameters.clear()
        linear.__class__ = Linear
        linear._parameters.update(weight=nn.Parameter(weight, requires_grad=False), bias=bias)
    if linears:
        resolve_hooks(twin)
    return twin


def quantised_bytes(linear: Linear, kind: Kind) -> int:
    """Bytes of codes and scales in the place of a Linear's weight."""
    with torch.device("meta"):
        made = Linear(linear.in_features, linear.out_features, bias=False)
    shape_linear(made, kind, linear.weight.dtype)
    return nbytes(made.parameters())
