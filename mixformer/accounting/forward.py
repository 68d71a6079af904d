"""One forward on the meta device: its operations, and what it leaves in a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mixformer.accounting.cache_bytes import CacheBytes, is_cached, kept_bytes, token_bytes
from mixformer.accounting.flops import CountFlops, FlopCount
from mixformer.accounting.parameters import dtype_name
from mixformer.accounting.quantised_shapes import unquantised
from mixformer.accounting.workload import Workload, is_tower, meta_twin, prepared
from mixformer.cache import KVCache


@dataclass(frozen=True)
class Forward:
    """What a forward costs.

    Attributes:
        workload: what it was counted for.
        row_length: tokens of a row.
        of_pictures: the model is a tower, whose rows are pictures.
        flops: its operations.
        cache: what it leaves in a cache; None for models that have none.
    """

    workload: Workload
    row_length: int
    of_pictures: bool
    flops: FlopCount
    cache: CacheBytes | None


@torch.no_grad()
def count_forward(model: Any, workload: Workload) -> Forward:
    """Run a copy of a model on the meta device, where nothing is computed, and count.

    Args:
        model: on any device; it is left alone.
        workload: sizes of the batch.

    Raises:
        ValueError: sizes that the model does not take, or an input that it needs and that is not known how to make.
    """
    twin = unquantised(meta_twin(model).eval())
    twin = twin.to(twin.dtype)  # parts of other dtypes, which need autocast, do as many operations
    plan, inputs = prepared(twin, workload)
    cache = None
    if plan is not None and is_cached(twin):
        cache = plan.cache = KVCache(twin, workload.batch, workload.row_length(twin))
    counter = CountFlops(twin)
    with counter:
        twin.run(plan=plan, **inputs)
    found = None
    if cache is not None:
        num_images = workload.batch * workload.images
        per_image = kept_bytes(cache) // num_images if num_images else 0
        found = CacheBytes(token_bytes(twin), per_image, dtype_name(twin.dtype))
    return Forward(workload, workload.row_length(twin), is_tower(twin), counter.counted, found)
