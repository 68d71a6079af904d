"""Sizes that differ from batch to batch, marked so that a few graphs of `torch.compile` serve all batches."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch

from mixformer.context import Context
from mixformer.masks import Mask


def mark_dynamic(ctx: Context) -> None:
    """Tell `torch.compile` which sizes of a plan and its inputs differ from batch to batch.

    Sizes of rows and of routed tokens are marked as unknown, since a known size of one gets a graph of its own.
    The sequence length and the number of pictures are only marked as dynamic: attention and convolutions need
    to see them.
    """
    assert ctx.input_ids is not None
    shape = ctx.input_ids.shape
    for tensor in _tensors([vars(ctx), vars(ctx.routes), ctx.mask]):
        if tensor.shape[:2] == shape:
            _mark_unknown(tensor, 0, "rows")
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
        elif tensor.is_floating_point():
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        elif tensor.dim() == 2:  # places per row, [b, k]
            _mark_unknown(tensor, 0, "rows")
            _mark_unknown(tensor, 1)
        elif tensor.dim() == 1:
            _mark_unknown(tensor, 0)


def _mark_unknown(tensor: torch.Tensor, dim: int, same_as: str | None = None) -> None:
    mark = torch._dynamo.decorators.mark_unbacked
    if "shape_id" in inspect.signature(mark).parameters:
        mark(tensor, dim, shape_id=same_as)
    else:  # older torch cannot say that sizes are equal; more graphs, the same results
        torch._dynamo.maybe_mark_dynamic(tensor, dim)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple | Mask):
        items = vars(value) if isinstance(value, Mask) else value
        for item in items.values() if isinstance(items, dict) else items:
            yield from _tensors(item)
