"""Roles: which parameters are trained, how fast, with what decay and in which dtype, chosen by names people use.

A selector is one of

- a mixin's name, `vision_expert`, with its parts in the layers; globs as well, `vision_expert*`;
- a path into one, `image.projector`; `image.tower/lora` is a mixin of a nested model;
- `language`: the backbone and its own heads, without what other mixins own;
- a parameter's or module's name or a glob over them, `transformer.layers.0`, `*.mlp.up.weight`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn as nn

from mixformer.hooks import did_you_mean
from mixformer.host import MixinHost
from mixformer.mixin import BaseMixin
from mixformer.mixins.low_rank import LANGUAGE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_OF_LAYER = re.compile(r"(.*?transformer\.layers\.\d+)\.")
_OF_MIXIN = re.compile(r"(?:transformer\.layers\.\d+\.)?mixins\.(.+)")
_COLUMNS = ("role", "parameters", "trainable", "rate", "decay", "dtype")


@dataclass
class Role:
    """Options of some parameters. What is None stays as the roles before, or the loop's own options, have it.

    Attributes:
        select: selectors; the role is of all parameters that one of them matches.
        trainable: whether they are trained.
        rate_factor: on the learning rate.
        weight_decay: of the matrices among them; vectors are not decayed.
        dtype: that they are cast to before training, and keep: float32, bfloat16, float16 or float64.
    """

    select: list[str] | str
    trainable: bool | None = None
    rate_factor: float | None = None
    weight_decay: float | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if not self.select:
            raise ValueError("A role selects nothing: give Role.select, such as [vision_expert, image.projector].")
        for name in ("rate_factor", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"Role.{name} of '{self.label}' is {value}; it must be at least 0.")
        if self.dtype is not None and self.dtype not in DTYPES:
            near = did_you_mean(self.dtype, list(DTYPES))
            raise ValueError(f"Role.dtype of '{self.label}' is '{self.dtype}'.{near} Choose of {', '.join(DTYPES)}.")

    @property
    def selectors(self) -> list[str]:
        """`select` as a list."""
        return [self.select] if isinstance(self.select, str) else list(self.select)

    @property
    def label(self) -> str:
        """What tables call it."""
        return ", ".join(self.selectors)


@dataclass(frozen=True)
class Assigned:
    """What holds for one parameter.

    Attributes:
        role: label of the last role that it has, or else of the part of the model it is in.
        trainable: whether it is trained.
        factor: on the learning rate.
        weight_decay: what it would be decayed by as a matrix.
        dtype: that it is cast to; None for its own.
    """

    role: str
    trainable: bool
    factor: float
    weight_decay: float
    dtype: str | None = None


def select_parameters(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """Names of the parameters that match one of the selectors.

    Raises:
        ValueError: a selector matches nothing; the nearest one that does is named.
    """
    addresses = _addresses(model, [name for name, _ in model.named_parameters()])
    chosen: set[str] = set()
    for pattern in patterns:
        matching = {
            name for name, further in addresses.items()
            if any(fnmatchcase(each, pattern) or fnmatchcase(each, f"{pattern}.*") for each in (name, *further))
        }
        if pattern == LANGUAGE and not matching:
            matching = {name for name in addresses if _is_language(model, name)}
        if not matching:
            raise ValueError(_nothing(pattern, addresses))
        chosen |= matching
    return chosen


def _addresses(model: Any, names: Iterable[str]) -> dict[str, list[str]]:
    """What parameters are called from their mixin on, `image.projector.linears.0.weight`; nested mixins behind `/`."""
    found: dict[str, list[str]] = {}
    for name in names:
        match = _OF_MIXIN.fullmatch(name)
        found[name] = [match[1]] if match and isinstance(model, MixinHost) else []
    for path, inner in model.nested_models() if isinstance(model, MixinHost) else ():
        inside = {
            name: short[0].removeprefix(f"{path}.")
            for name, short in found.items() if len(short) == 1 and short[0].startswith(f"{path}.")
        }
        deeper = _addresses(inner, inside.values())
        for name, rest in inside.items():
            found[name] += [f"{path}/{each}" for each in deeper[rest]]
    return found


def _is_language(model: Any, name: str) -> bool:
    """Whether a parameter is of the backbone, of one of its heads, or of a mixin that is a part of its layers."""
    from mixformer.mixins import GatedMLPMixin, QVBiasMixin, SubNormMixin, TokenTypeMixin

    if not isinstance(model, MixinHost) or model.transformer.word_embeddings is None:
        return False
    found = _OF_MIXIN.fullmatch(name)
    if found is None:
        return name.startswith("transformer.")
    mixin = model.mixins[found[1].partition(".")[0]]
    assert isinstance(mixin, BaseMixin)
    is_head = "final_forward" in mixin.hooks() and not any(isinstance(part, MixinHost) for part in mixin.modules())
    return is_head or isinstance(mixin, (GatedMLPMixin, QVBiasMixin, SubNormMixin, TokenTypeMixin))


def _nothing(pattern: str, addresses: dict[str, list[str]]) -> str:
    names = list(addresses)
    paths = dict.fromkeys([LANGUAGE])
    for name, further in addresses.items():
        for parts in (each.split(".") for each in (*further, name)):
            paths.update(dict.fromkeys(".".join(parts[:count]) for count in range(1, 6)))
    mixins = dict.fromkeys(further[0].partition(".")[0] for further in addresses.values() if further)
    return (
        f"The selector '{pattern}' matches none of the {len(names)} parameters."
        f"{did_you_mean(pattern, list(paths)) or did_you_mean(pattern, names)} Selectors are 'language', names of "
        f"mixins ({', '.join(mixins) or 'none here'}), paths such as 'image.projector', or globs over names "
        f"such as '{names[0] if names else ''}'."
    )


def assign(model: nn.Module, config: Any) -> dict[str, Assigned]:
    """What holds for every parameter, by name.

    Args:
        model: any; on the meta device as well.
        config: the loop's options (`TrainConfig`): `trainable`, `frozen`, `rate_factors`, `weight_decay`, and then
            `roles`, in order; later ones win.

    Raises:
        ValueError: a selector that matches nothing, or nothing is left to train.
    """
    chosen = select_parameters(model, config.trainable) - select_parameters(model, config.frozen)
    factors = {pattern: select_parameters(model, [pattern]) for pattern in config.rate_factors}
    found: dict[str, Assigned] = {}
    for name, part in _parts(model).items():
        factor = math.prod(config.rate_factors[pattern] for pattern, names in factors.items() if name in names)
        found[name] = Assigned(part, name in chosen, factor, config.weight_decay)
    for role in getattr(config, "roles", []):
        given = {
            "trainable": role.trainable, "factor": role.rate_factor, "weight_decay": role.weight_decay,
            "dtype": role.dtype,
        }
        changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        for name in select_parameters(model, role.selectors):
            found[name] = replace(found[name], role=role.label, **changes)
    if not any(each.trainable for each in found.values()):
        by = "the roles and `frozen` cover" if getattr(config, "roles", []) else "`frozen` covers"
        raise ValueError(f"Nothing is left to train: {by} all that `trainable` matches.")
    return found


def _parts(model: Any) -> dict[str, str]:
    """The part that each parameter is in: `language`, a mixin, or a module of a mixin that holds a model."""
    found = {}
    nested = {path.partition(".")[0] for path, _ in model.nested_models()} if isinstance(model, MixinHost) else set()
    for name, further in _addresses(model, [name for name, _ in model.named_parameters()]).items():
        mixin, _, rest = (further or ["backbone"])[0].partition(".")
        module, _, below = rest.partition(".")
        apart = mixin in nested and name.startswith("mixins.") and below
        found[name] = LANGUAGE if _is_language(model, name) else f"{mixin}.{module}" if apart else mixin
    return found


def trainable_names(model: nn.Module, config: Any) -> set[str]:
    """Names of the parameters that are trained; errors as of `assign`."""
    return {name for name, each in assign(model, config).items() if each.trainable}


def parameter_groups(model: nn.Module, config: Any) -> list[dict[str, Any]]:
    """AdamW's groups of the trainable parameters, by weight decay and rate factor; matrices decay, vectors do not.

    Raises:
        ValueError: as of `assign`.
    """
    assigned = assign(model, config)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        each = assigned[name]
        if each.trainable:
            decay = each.weight_decay if parameter.dim() > 1 else 0.0
            groups.setdefault((decay, each.factor), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "factor": factor}
        for (decay, factor), parameters in groups.items()
    ]


@torch.no_grad()
def cast_parameters(model: nn.Module, config: Any) -> None:
    """Cast parameters to the dtypes that their roles give, in place.

    FSDP2 shards a layer, its mixins' parts included, as one, and what lies outside the layers as another one: all that
    is trained in one of them has one dtype. What is frozen may have any.

    Raises:
        ValueError: two trainable dtypes in a layer, or outside the layers; nothing is cast then.
    """
    assigned, dtypes = assign(model, config), {}
    units: dict[str, dict[torch.dtype, str]] = {}
    for name, parameter in model.named_parameters():
        wanted = assigned[name].dtype
        dtypes[name] = parameter.dtype if wanted is None else DTYPES[wanted]
        if assigned[name].trainable and parameter.is_floating_point():
            layer = _OF_LAYER.match(name)
            units.setdefault(layer[1] if layer else "", {}).setdefault(dtypes[name], name)
    for unit, found in units.items():
        if len(found) > 1:
            kinds = ", ".join(f"{str(dtype).removeprefix('torch.')} ({name})" for dtype, name in found.items())
            raise ValueError(
                f"Trainable parameters of {f'layer {unit!r}' if unit else 'what lies outside the layers'} have "
                f"{len(found)} dtypes: {kinds}. They are sharded together, so give them one dtype in train roles, or "
                f"freeze the others."
            )
    for name, parameter in model.named_parameters():
        if parameter.dtype != dtypes[name]:
            parameter.data = parameter.data.to(dtypes[name])


def role_table(model: nn.Module, config: Any) -> str:
    """A line for each role and way its parameters are treated, and one for all; `decay` is that of matrices.

    Raises:
        ValueError: as of `assign`.
    """
    assigned = assign(model, config)
    counts: dict[tuple[str, ...], int] = {}
    total = trained = 0
    for name, parameter in model.named_parameters():
        each = assigned[name]
        rate, decay = f"{config.learning_rate * each.factor:g}", f"{each.weight_decay:g}"
        treated = ("yes", rate, decay) if each.trainable else ("no", "-", "-")
        key = (each.role, *treated, each.dtype or str(parameter.dtype).removeprefix("torch."))
        counts[key] = counts.get(key, 0) + parameter.numel()
        total, trained = total + parameter.numel(), trained + parameter.numel() * each.trainable
    rows = [_COLUMNS, *((role, f"{count:,}", *rest) for (role, *rest), count in counts.items())]
    rows.append(("all", f"{total:,}", f"{trained:,}", "", "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    return "\n".join(_line(row, widths) for row in rows)


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    cells: Iterator[str] = (
        cell.ljust(width) if column in (0, 5) else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join(cells).rstrip()


def missing_gradients(model: nn.Module) -> list[str]:
    """Names of the parameters that should be trained and have no gradient; after a backward, before it is cleared."""
    return [name for name, each in model.named_parameters() if each.requires_grad and each.grad is None]
