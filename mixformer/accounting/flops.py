"""Floating-point operations of a forward, counted where they run, on the meta device.

The rule: a multiply-add is two operations. Matrix products and convolutions are counted, by torch's own formula for
each operator; norms, activations, softmax, rotations and other elementwise work are not. Attention counts all s * t
products of queries and keys, also those that a causal mask hides. Logits of all tokens are counted.

Profilers that do not see fused attention kernels leave its two products out; the figures of CogAgent's paper
(arXiv:2312.08914) are met within 4% when those of the vision towers are left out. Both sums are given.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mixformer.accounting.on_meta import OnMeta
from mixformer.accounting.parameters import TRANSFORMER, Part, part_of
from mixformer.mixin import BaseMixin
from mixformer.transformer import Layer

RULE = (
    "A multiply-add is 2 operations. Matrix products and convolutions are counted, elementwise work is not. Attention "
    "counts every query with every key, also what a causal mask hides. Logits of all tokens are counted."
)
_QKV = ("query", "key", "value")
_ELEMENTWISE: set[Callable[..., Any]] = {torch.rms_norm, F.layer_norm, F.gelu, F.silu}
LINEAR, CONVOLUTION, ATTENTION, PRODUCT = "weights", "convolution", "attention", "products"
"""Kinds of operators: with a weight, convolutions, the two products of attention, and other products."""


@dataclass(frozen=True)
class Term:
    """Operations of one kind that one part of the model does.

    Attributes:
        path: where they run: the path of the parameter, or of the module whose code it is.
        part: what they belong to.
        operator: `weights`, `convolution`, `attention` or `products`.
        operations: how many.
    """

    path: str
    part: Part
    operator: str
    operations: int


class FlopCount:
    """The terms of one forward.

    Args:
        terms: of the whole model.
        towers: paths of the nested models.
    """

    def __init__(self, terms: Iterable[Term], towers: Iterable[str] = ()) -> None:
        self.terms = list(terms)
        self._towers = tuple(f"mixins.{path}." for path in towers)

    @property
    def total(self) -> int:
        """All operations."""
        return sum(term.operations for term in self.terms)

    @property
    def tower_attention(self) -> int:
        """Products of queries with keys and of weights with values inside of nested models."""
        return sum(
            term.operations for term in self.terms
            if term.operator == ATTENTION and f"{term.path}.".startswith(self._towers)
        )

    def by_part(self) -> dict[Part, dict[str, int]]:
        """{part: {operator: operations}}."""
        found: dict[Part, dict[str, int]] = {}
        for term in self.terms:
            operators = found.setdefault(term.part, {})
            operators[term.operator] = operators.get(term.operator, 0) + term.operations
        return found

    def inside(self, path: str) -> FlopCount:
        """Those of the nested model at a path, with the parts that it has itself."""
        prefix = f"mixins.{path}."
        inner = [(term, term.path.removeprefix(prefix)) for term in self.terms if term.path.startswith(prefix)]
        return FlopCount(Term(rest, part_of(rest), term.operator, term.operations) for term, rest in inner)


class CountFlops(TorchDispatchMode):
    """While entered, every matrix product and convolution of a model is counted for the part that it belongs to.

    An operator with a weight belongs to the part that owns the weight, one without to the module whose code runs it.

    Args:
        model: whose parts are told apart.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._weights = {_storage(weight): name for name, weight in model.named_parameters()}
        self._modules = {id(module): name for name, module in model.named_modules() if name}
        self._found: Counter[tuple[str, Part, str]] = Counter()
        self._attention = _Attention(self._count_attention, self._count_linear)

    def __enter__(self) -> CountFlops:
        self._attention.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *problem: Any) -> None:
        super().__exit__(*problem)
        self._attention.__exit__(*problem)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            tensors = [value for value in args if isinstance(value, torch.Tensor)]
            weight = next((self._weights[_storage(x)] for x in tensors if _storage(x) in self._weights), None)
            operator = CONVOLUTION if "conv" in str(func) else PRODUCT if weight is None else LINEAR
            path = weight or self._running()
            self._found[path, part_of(path), operator] += int(formula(*args, **(kwargs or {}), out_val=out))
        return out

    def _count_attention(self, operations: int) -> None:
        path = self._running()
        self._found[path, part_of(path), ATTENTION] += operations

    def _count_linear(self, weight: torch.Tensor, operations: int) -> None:
        owner = self._weights.get(_storage(weight))
        path = owner or self._running()
        self._found[path, part_of(path), PRODUCT if owner is None else LINEAR] += operations

    def _running(self) -> str:
        """Path of the innermost module whose code runs; of a mixin that runs for a layer, where its part of it lies.

        Hooks of mixins are not modules of their own that one could watch, so the calling code tells.
        """
        frame: Any = sys._getframe(2)
        while frame is not None:
            path, layer = self._modules.get(id(frame.f_locals.get("self"))), frame.f_locals.get("layer")
            if path is not None and isinstance(layer, Layer) and isinstance(frame.f_locals["self"], BaseMixin):
                outer, _, name = path.rpartition("mixins.")
                return f"{outer}transformer.layers.{layer.index}.mixins.{name}"
            if path is not None:
                return path
            frame = frame.f_back
        return TRANSFORMER

    @property
    def counted(self) -> FlopCount:
        """What was counted so far."""
        terms = [Term(path, part, operator, number) for (path, part, operator), number in self._found.items()]
        return FlopCount(terms, [path for path, _ in self.model.nested_models()])  # type: ignore[operator]


class _Attention(OnMeta):
    """Counts Linears and scaled dot product attention as one operator each, and passes by what is not counted.

    All of these would fall apart into many operators on the meta device, which takes time.
    """

    def __init__(self, count: Callable[[int], None], count_linear: Callable[[torch.Tensor, int], None]) -> None:
        super().__init__()
        self.count, self.count_linear = count, count_linear

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            q, k, v = (args[place] if place < len(args) else kwargs[name] for place, name in enumerate(_QKV))
            out = q.new_empty(*q.shape[:-1], v.shape[-1])
            self.count(2 * k.shape[-2] * (q.numel() + out.numel()))
            return out
        if func is F.linear and len(args) > 1:
            x, weight = args[:2]
            out = x.new_empty(*x.shape[:-1], *weight.shape[:-1])
            self.count_linear(weight, 2 * x.numel() * weight.shape[:-1].numel())
            return out
        if func in _ELEMENTWISE:
            return torch.empty_like(args[0])
        return super().__torch_function__(func, types, args, kwargs)


def _storage(tensor: torch.Tensor) -> int:
    """What a tensor and its views share, also where there is no memory."""
    return int(tensor.untyped_storage()._cdata)
