"""What a key table is made of: rules that relate one tensor of ours to tensors of a foreign file, both ways."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mixformer.config import TransformerConfig

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu", "relu": "relu",
}
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Rule:
    """One tensor of ours, and the one, or the row blocks, or the equal copies that a foreign file has.

    Attributes:
        own: our name.
        foreign: the foreign name, or several (see `rows` and `copies`).
        rows: heights of the row blocks that `foreign` names one by one and we keep fused.
        leading: leading dimensions of size one that the foreign tensor has and ours does not.
        transposed: the foreign matrices are [in, out], as GPT-2's are.
        copies: the foreign tensors are equal copies of ours; a file may have any number of them.
        num_written: copies that are written where no file tells which there were; None for all.
        default: makes our tensor from the model where the file has no copy; None where the tensor must be there.
    """

    own: str
    foreign: tuple[str, ...]
    rows: tuple[int, ...] = ()
    leading: int = 0
    transposed: bool = False
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
        shapes = [shape[::-1] for shape in shapes] if self.transposed else shapes
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
        tensors = [tensor.T for tensor in tensors] if self.transposed else tensors
        first = tensors[0]
        if self.rows:
            return torch.cat(list(tensors))
        for name, other in zip(self.foreign[1:], tensors[1:], strict=False):
            if not torch.equal(first, other):
                raise ValueError(
                    f"'{name}' differs from '{self.foreign[0]}', though the model has one '{self.own}' for both. "
                    f"The file is damaged, or of another model."
                )
        return first.reshape(first.shape[self.leading :])

    def to_foreign(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Ours as foreign tensors; views of it."""
        parts = tensor.split(list(self.rows)) if self.rows else [tensor] * len(self.foreign)
        if self.transposed:
            return {name: part.T for name, part in zip(self.foreign, parts, strict=True)}
        shaped = [part.reshape((1,) * self.leading + tuple(part.shape)) for part in parts]
        return dict(zip(self.foreign, shaped, strict=True))


def activation(name: str) -> str:
    """Our name of an activation.

    Raises:
        ValueError: an unknown one.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"the activation '{name}' is not known. Known: {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def foreign_activation(name: str) -> str:
    """HF's name of an activation."""
    return "gelu_pytorch_tanh" if name == "gelu_tanh" else name


def label_names(num_classes: int) -> dict[str, Any]:
    """What config.json of a classifier says of its classes."""
    names = [f"LABEL_{index}" for index in range(num_classes)]
    return {
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
    }


def rules_of(pairs: Mapping[str, str], own: str = "", foreign: str = "", leading: int = 0) -> list[Rule]:
    """One-to-one rules from a table {our name: foreign name}, with prefixes."""
    return [Rule(own + ours, (foreign + theirs,), leading=leading) for ours, theirs in pairs.items()]


def fused(own: str, foreign: str, parts: Mapping[str, int], kinds: Sequence[str] = ("weight",)) -> list[Rule]:
    """Rules of a module that we keep fused, such as qkv, and a foreign file has in parts.

    Args:
        own: our module.
        foreign: prefix of the parts' names.
        parts: {name of the part: its rows}, in order.
        kinds: of its parameters.
    """
    rows = tuple(parts.values())
    return [Rule(f"{own}.{kind}", tuple(f"{foreign}{part}.{kind}" for part in parts), rows=rows) for kind in kinds]


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
        renames: (pattern, replacement) pairs that turn other spellings of the tensors' names into those of `rules` and
            `ignored`, one after the other; a file is written back as it was spelled.
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
    renames: tuple[tuple[str, str], ...] = ()
    write_config: Callable[[Any], dict[str, Any]] | None = None
    lacks: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    finish: Callable[[dict[str, Any]], dict[str, Any]] = dict

    def is_ignored(self, name: str) -> bool:
        """Whether a tensor of that name is carried along unused."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)

    def renamed(self, name: str) -> str:
        """A tensor's name as `rules` has it."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name


def spelling(names: Mapping[str, str]) -> dict[str, str]:
    """What tells a file's spelling: {name as `rules` has it: name in the file}, with `*` for numbers where both agree.

    Args:
        names: the same of all tensors in the file.
    """
    found: dict[str, str] = {}
    for name, spelled in names.items():
        if name != spelled and _NUMBER.findall(name) == _NUMBER.findall(spelled):
            found[_NUMBER.sub("*", name)] = _NUMBER.sub("*", spelled)
    return found | {name: spelled for name, spelled in names.items() if respelled(name, found) != spelled}


def respelled(name: str, spelling: Mapping[str, str]) -> str:
    """A tensor's name in a file of that spelling."""
    if name in spelling:
        return spelling[name]
    numbers = iter(_NUMBER.findall(name))
    return re.sub(r"\*", lambda _: next(numbers), spelling.get(_NUMBER.sub("*", name), name))


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
        spelling: how the file spells names (see `respelled`).
    """

    format: str
    config: dict[str, Any]
    overrides: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    dtype: str = ""
    spelling: dict[str, str] = field(default_factory=dict)


__all__ = [
    "Format", "Rule", "Shape", "Shapes", "Source", "TransformerConfig", "activation", "count", "extent",
    "foreign_activation", "frequencies", "fused", "label_names", "respelled", "rules_of", "spelling", "with_bias",
]
