"""Bytes that live while code runs on the meta device, and what kernels of a real device would do there."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mixformer.accounting.on_meta import OnMeta

_LOWERED: set[Callable[..., Any]] = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.scaled_dot_product_attention, torch.matmul, torch.mm, torch.bmm,
    torch.addmm, torch.baddbmm, torch.Tensor.matmul, torch.Tensor.__matmul__,
}  # fmt: skip


class LiveBytes(TorchDispatchMode):
    """While entered, the bytes of all memory that operators make, until nothing refers to it any more.

    This is what an eager program holds, tensor for tensor; it leaves out what kernels use inside and what an allocator
    keeps for later. What was there before is not counted.

    Attributes:
        live: bytes now.
        peak: the most there were.
        apart: bytes among the live ones that `peak_without` leaves out; whoever knows of them adds them.
        peak_without: the most there were of the others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.apart = self.peak_without = 0
        self._known: dict[int, Any] = {}

    def restart(self) -> None:
        """Begin new peaks from what is live now."""
        self.peak, self.peak_without = self.live, self.live - self.apart

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors(args if not kwargs else (*args, *kwargs.values())):
            self._meet(tensor, counted=False)
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors((out,)):
            self._meet(tensor, counted=True)
        return out

    def _meet(self, tensor: torch.Tensor, counted: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if counted else 0
        self.live += size
        self.peak = max(self.peak, self.live)
        self.peak_without = max(self.peak_without, self.live - self.apart)
        self._known[key] = weakref.ref(storage, lambda _: self._lose(key, size))

    def _lose(self, key: int, size: int) -> None:
        self.live -= size
        self._known.pop(key, None)


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


class DeviceKernels(OnMeta):
    """While entered, operators on the meta device take the memory that they take on a CPU or GPU.

    Attention runs in one kernel and does not hold its weights [b, n, s, t].

    Args:
        autocast: dtype that products are cast to in mixed precision; weights that are trained are cast once.
        attention_of_products: attention holds its weights after all (see `mixformer.train.loop.AttentionOfProducts`).
    """

    def __init__(self, autocast: torch.dtype | None = None, attention_of_products: bool = False) -> None:
        super().__init__()
        self.autocast, self.attention_of_products = autocast, attention_of_products
        self._cast: dict[int, torch.Tensor] | None = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        attends = func is F.scaled_dot_product_attention
        if attends and self.attention_of_products:
            return _of_products(*args, **kwargs)
        if self.autocast is not None and func in _LOWERED:
            args = tuple(self._lowered(value) for value in args)
            kwargs = {name: self._lowered(value) for name, value in kwargs.items()}
        return _fused_attention(*args, **kwargs) if attends else super().__torch_function__(func, types, args, kwargs)

    def _lowered(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value
        if self._cast is None or not (value.is_leaf and value.requires_grad):
            return value.to(self.autocast)
        if id(value) not in self._cast:
            self._cast[id(value)] = value.to(self.autocast)
        return self._cast[id(value)]

    def forget(self) -> None:
        """Let go of the weights that were cast, as autocast does after the forward; what is recomputed casts anew."""
        self._cast = None


def _fused_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:
    if attn_mask is not None and attn_mask.requires_grad:  # no kernel gives a bias its gradient
        return _of_products(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.to(q.dtype)  # the kernels add it
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out: torch.Tensor = kernel(q, k, v, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return out


def _of_products(*args: Any, **kwargs: Any) -> torch.Tensor:
    from mixformer.train.loop import attention_of_products

    return attention_of_products(*args, **kwargs)
