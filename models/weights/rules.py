"""What a key table is made of: rules that relate one tensor of ours to tensors of a foreign file, both ways."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mixformer.config import TransformerConfig

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Rule:
    """One tensor of ours, and the one, or the row blocks, or the equal copies that a foreign file has.

    Attributes:
        own: our name.
        foreign: the foreign name, or several (see `rows` and `copies`).
        rows: heights of the row blocks that `foreign` names one by one and we keep fused.
        leading: leading dimensions of size one that the foreign tensor has and ours does not.
        copies: the foreign tensors are equal copies of ours; a file may have any number of them.
        num_written: copies that are written where no file tells which there were; None for all.
        default: makes our tensor from the model where the file has no copy; None where the tensor must be there.
    """

    own: str
    foreign: tuple[str, ...]
    rows: tuple[int, ...] = ()
    leading: int = 0
    copies: bool = False
    num_written: int | None = None
    default: Callable[[Any], torch.Tensor] | None = None

    def present(self, names: Iterable[str] | Mapping[str, Any]) -> list[str]:
        """Those of the foreign tensors that are there."""
        return [name for name in self.foreign if name in names]

    def absent(self, names: Iterable[str] | Mapping[str, Any]) -> list[str]:
        """Those that are missing and must not be."""
        found = self.present(names)
        if self.copies:
            return [] if found or self.default is not None else list(self.foreign[:1])
        return [name for name in self.foreign if name not in found]

    def shape(self, shapes: Sequence[Shape]) -> Shape | None:
        """The shape ours gets from foreign ones of these shapes, or None if they do not go together."""
        first = shapes[0]
        if self.rows:
            fits = all(shape[:1] == (height,) for shape, height in zip(shapes, self.rows, strict=True))
            return (sum(self.rows), *first[1:]) if fits and len({shape[1:] for shape in shapes}) == 1 else None
        if self.copies:
            return first if len(set(shapes)) == 1 else None
        return first[self.leading :] if first[: self.leading] == (1,) * self.leading else None

    def to_own(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Foreign tensors (those present, in order) as ours.

        Raises:
            ValueError: copies that are not equal.
        """
        first = tensors[0]
        if self.rows:
            return torch.cat(list(tensors))
        for name, other in zip(self.foreign[1:], tensors[1:], strict=False):
            if not torch.equal(first, other):
                raise ValueError(
                    f"'{name}' differs from '{self.foreign[0]}', though the model has one '{self.own}' for all layers. "
                    f"The file is damaged, or of another model."
                )
        return first.reshape(first.shape[self.leading :])

    def to_foreign(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Ours as foreign tensors; views of it."""
        if self.rows:
            return dict(zip(self.foreign, tensor.split(list(self.rows)), strict=True))
        return {name: tensor.reshape((1,) * self.leading + tuple(tensor.shape)) for name in self.foreign}


def rules_of(pairs: Mapping[str, str], own: str = "", foreign: str = "", leading: int = 0) -> list[Rule]:
    """One-to-one rules from a table {our name: foreign name}, with prefixes."""
    return [Rule(own + ours, (foreign + theirs,), leading=leading) for ours, theirs in pairs.items()]


def with_bias(pairs: Mapping[str, str]) -> dict[str, str]:
    """{module: module} as {parameter: parameter} for modules with weight and bias."""
    kinds = ("weight", "bias")
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in pairs.items() for kind in kinds}


def frequencies(model: Any) -> torch.Tensor:
    """The rotary frequencies of a model, for files that do not store them."""
    table: torch.Tensor = model.get_mixin("rotary").frequencies(torch.device("cpu"))
    return table


def count(shapes: Shapes, pattern: str) -> int:
    """How many consecutive indices `{i}` from zero exist."""
    total = 0
    while pattern.format(i=total) in shapes:
        total += 1
    return total


def extent(shapes: Shapes, name: str, dimension: int) -> int:
    """One dimension of a tensor's shape.

    Raises:
        ValueError: there is no such tensor, or it has fewer dimensions.
    """
    if name not in shapes:
        raise ValueError(f"the tensor '{name}' is missing; it tells a size of the model. Fetch the weights again.")
    shape = shapes[name]
    if not -len(shape) <= dimension < len(shape):
        raise ValueError(f"the tensor '{name}' has shape {shape}, with too few dimensions. Fetch the weights again.")
    return shape[dimension]


@dataclass(frozen=True)
class Format:
    """A foreign checkpoint format of one model family.

    Attributes:
        name: such as `hf-cogvlm`.
        model: class of ours that reads it.
        claims: whether a config file's content is of this format.
        read_config: (config file, shapes in the weights) -> nested options of our config.
        rules: key table for a config.
        ignored: patterns of tensors that the model does not use; they are carried along to be written back.
        write_config: our config as the content of a config file; None for formats that are only read.
        lacks: options that the format cannot hold; they come from `overrides` or are the released constants.
        aliases: names that reference implementations have for options, for `overrides`; an empty target is a fact that
            shapes tell anyway.
        finish: last step from options and overrides to the options of our config.
    """

    name: str
    model: type
    claims: Callable[[dict[str, Any]], bool]
    read_config: Callable[[dict[str, Any], Shapes], dict[str, Any]]
    rules: Callable[[Any], list[Rule]]
    ignored: tuple[str, ...] = ()
    write_config: Callable[[Any], dict[str, Any]] | None = None
    lacks: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    finish: Callable[[dict[str, Any]], dict[str, Any]] = dict

    def is_ignored(self, name: str) -> bool:
        """Whether a tensor of that name is carried along unused."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)


@dataclass
class Source:
    """What is kept of a foreign file beside the weights, so that it can be written back as it was.

    Attributes:
        format: name of the format.
        config: the content of its config file.
        overrides: constants that were given to read it.
        tensors: those that the model does not use.
        absent: tensors that the format may have and this file did not.
        dtype: of the model, if it was read in the file's own.
    """

    format: str
    config: dict[str, Any]
    overrides: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    dtype: str = ""


__all__ = [
    "Format", "Rule", "Shape", "Shapes", "Source", "TransformerConfig", "count", "extent", "frequencies",
    "rules_of", "with_bias",
]
