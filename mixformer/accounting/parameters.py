"""Which part of a model a parameter belongs to, and what every part holds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch

from mixformer.quantised import QuantisedLinear

TRANSFORMER = "transformer"
LAYERS = "layers"
_OF_LAYER = re.compile(r"transformer\.layers\.\d+(?:\.(.+))?")
_NORMS = re.compile(r".*_(norm|scale)")


@dataclass(frozen=True)
class Part:
    """A part of a model.

    Attributes:
        owner: the mixin that brought it, or `transformer`, the backbone.
        name: `layers` for what a mixin has in the layers, or else its submodule or parameter (`tower`, `boi`); of the
            backbone `word_embeddings`, `attention`, `mlp`, `norms`, ...
    """

    owner: str
    name: str = ""

    def __str__(self) -> str:
        return f"{self.owner}.{self.name}" if self.name else self.owner


@dataclass
class PartSize:
    """What a part holds: numbers of parameters and bytes by dtype, each tied parameter counted once, where it is first.

    Quantised weights count as many as they stand for; their scales take bytes only.

    Attributes:
        parameters: of the part.
        trainable: those that require gradients.
        bytes: {dtype: bytes}.
    """

    parameters: int = 0
    trainable: int = 0
    bytes: dict[str, int] = field(default_factory=dict)

    def add(self, parameter: torch.Tensor, number: int | None = None) -> None:
        """Count one more, as so many if it does not stand for itself."""
        dtype, number = dtype_name(parameter.dtype), parameter.numel() if number is None else number
        self.parameters += number
        self.trainable += number if parameter.requires_grad else 0
        self.bytes[dtype] = self.bytes.get(dtype, 0) + parameter.nbytes

    def join(self, other: PartSize) -> None:
        """Count another part's."""
        self.parameters += other.parameters
        self.trainable += other.trainable
        for dtype, number in other.bytes.items():
            self.bytes[dtype] = self.bytes.get(dtype, 0) + number


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16`, as configurations spell it."""
    return str(dtype).removeprefix("torch.")


def part_of(path: str) -> Part:
    """The part that a parameter or module is in, by its path in the model."""
    in_layer = _OF_LAYER.fullmatch(path)
    first, _, rest = ((in_layer[1] or "") if in_layer else path).partition(".")
    second = rest.partition(".")[0]
    if first == "mixins":
        return Part(second, LAYERS) if in_layer else Part(second, rest.partition(".")[2].partition(".")[0])
    if in_layer:
        return Part(TRANSFORMER, "norms" if _NORMS.fullmatch(first) else first or "attention")
    return Part(TRANSFORMER, second)


def part_sizes(model: Any) -> dict[Part, PartSize]:
    """What every part of a model holds, the backbone's first and mixins in their order."""
    found: dict[Part, PartSize] = {}
    numbers: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, QuantisedLinear):
            numbers |= {id(module.codes): module.out_features * module.in_features, id(module.scale): 0}
    for name, parameter in model.named_parameters():
        found.setdefault(part_of(name), PartSize()).add(parameter, numbers.get(id(parameter)))
    owners = [TRANSFORMER, *model.mixins]
    return dict(sorted(found.items(), key=lambda item: owners.index(item[0].owner)))


def total_size(sizes: Iterable[PartSize]) -> PartSize:
    """The sum of several parts."""
    total = PartSize()
    for size in sizes:
        total.join(size)
    return total


def buffer_bytes(model: Any) -> int:
    """Bytes of what is stored beside the parameters, such as rotary frequencies."""
    return nbytes(model.buffers())


def nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of several tensors."""
    return sum(tensor.nbytes for tensor in tensors)


def stage_totals(model: Any) -> dict[str, int]:
    """{stage of the model's class: parameters that it trains}; stages whose patterns miss here are left out."""
    found = {}
    for stage, trained in getattr(type(model), "stages", {}).items():
        chosen = [
            parameter.numel() for name, parameter in model.named_parameters()
            if _matches(name, trained.trainable) and not _matches(name, trained.frozen)
        ]
        if chosen:
            found[stage] = sum(chosen)
    return found


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
