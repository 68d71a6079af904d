"""Weights into models: every tensor of a file goes into a model that was built without memory, one by one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from tqdm import tqdm

from mixformer.mixin import BaseMixin
from mixformer.model import BaseModel
from mixformer.shards import TensorSource, in_reading_order

if TYPE_CHECKING:
    from models.weights import Rule

PROGRESS_FROM = 10**9


def is_meta(device: torch.device | str) -> bool:
    """Whether a device holds shapes only."""
    return torch.device(device).type == "meta"


def find_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """torch's dtype of that name.

    Raises:
        ValueError: there is none.
    """
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is not None and not isinstance(found, torch.dtype):
        raise ValueError(f"dtype {dtype!r} is not known. Take one such as torch.bfloat16 or 'float32', or None.")
    return found


def without_memory(build: Callable[[torch.device | str], BaseModel], device: torch.device | str) -> BaseModel:
    """The model that `build` makes, on the meta device, unless it has tensors that no file fills: then on `device`."""
    model = build("meta")
    for module in model.modules():
        buffers = [name for name in module._buffers if name in module._non_persistent_buffers_set]
        plain = [name for name, value in vars(module).items() if isinstance(value, torch.Tensor) and value.is_meta]
        if buffers or plain:  # no file fills these, so the constructors must
            return build(device)
    return model


Slot = tuple[nn.Module, str, torch.Tensor]


def slots_of(model: BaseModel) -> dict[str, list[Slot]]:
    """{name in the state dict: every place that holds that tensor}; tied ones are listed under their first name."""
    names: dict[int, str] = {}
    found: dict[str, list[Slot]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        held = {**module._parameters, **module._buffers}
        for attribute, tensor in held.items():
            if tensor is None or attribute in module._non_persistent_buffers_set:
                continue
            name = names.setdefault(id(tensor), prefix + attribute)
            found.setdefault(name, []).append((module, attribute, tensor))
    return found


def tied_names(model: BaseModel) -> dict[str, str]:
    """{name of a parameter: first name of the same parameter}."""
    first: dict[int, str] = {}
    names = model.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(parameter), name) for name, parameter in names}


def tie(model: BaseModel, tied: Mapping[str, str]) -> None:
    """Make parameters one, {name: first name of the same parameter}.

    Raises:
        ValueError: the model has no such pair.
    """
    for name, first in tied.items():
        module, _, attribute = name.rpartition(".")
        try:
            model.get_submodule(module)._parameters[attribute] = model.get_parameter(first)
        except AttributeError as error:
            raise ValueError(f"The checkpoint ties '{name}' to '{first}', but the model has no such pair.") from error


def fill(
    model: BaseModel, source: TensorSource, rules: Iterable[Rule], ignored: Callable[[str], bool],
    dtype: torch.dtype | None, device: torch.device | str,
) -> tuple[list[str], list[str]]:
    """Put the tensors of a source into a model.

    Args:
        model: built without memory.
        source: the tensors.
        rules: the key table.
        ignored: whether a name that no rule has may be there.
        dtype: of floating-point tensors; None keeps each one's.
        device: where they go; on `meta` names and shapes are checked only.

    Returns:
        Names that the table knows and the source does not have, and names of the source that the model does not use.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape.
    """
    slots = slots_of(model)
    table = {rule.own: rule for rule in rules}
    used, unused = _check_fit(model, source, table, slots, ignored)
    if torch.device(device).type == "meta":
        return [], []
    absent = [name for rule in table.values() if rule.copies for name in rule.foreign if name not in source.shapes]
    if is_meta(device):
        return absent, unused
    starts = {rule.present(source.shapes)[0]: rule for rule in used.values()}
    bar = tqdm(
        total=source.num_bytes, unit="B", unit_scale=True, desc="Reading weights",
        disable=source.num_bytes < PROGRESS_FROM,
    )
    with bar, torch.no_grad():
        for start in in_reading_order(source, list(starts)):
            rule = starts[start]
            tensors = [source.read(name) for name in rule.present(source.shapes)]
            try:
                tensor = rule.to_own(tensors)
            except ValueError as error:
                raise ValueError(f"{source.where}: {error}") from error
            bar.update(sum(each.nbytes for each in tensors))
            wanted = dtype if tensor.is_floating_point() else None
            _place(slots[rule.own], tensor, wanted, device, source.gives_own)
        for name, rule in table.items():
            if name not in used and name in slots:
                assert rule.default is not None
                _place(slots[name], rule.default(model), dtype or model.dtype, device)
    for inner in model.modules():
        if isinstance(inner, BaseModel):
            inner._device = torch.device(device)
    left = [name for name, held in slots_of(model).items() if held[0][2].is_meta]
    assert not left, left
    return absent, unused


def _place(
    slots: list[Slot], tensor: torch.Tensor, dtype: torch.dtype | None, device: torch.device | str, own: bool = False
) -> None:
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    # Unless the tensor is all of a memory of its own, a copy even where nothing is converted.
    tensor = tensor.to(device=device, dtype=dtype or tensor.dtype, copy=not (own and whole))
    placed: torch.Tensor | None = None
    for module, attribute, old in slots:
        if attribute in module._parameters:
            if placed is None:
                placed = nn.Parameter(tensor, requires_grad=old.requires_grad and tensor.is_floating_point())
            module._parameters[attribute] = placed  # type: ignore[assignment]
        else:
            module._buffers[attribute] = tensor


def _check_fit(
    model: BaseModel, source: TensorSource, table: Mapping[str, Rule], slots: Mapping[str, Any],
    ignored: Callable[[str], bool],
) -> tuple[dict[str, Rule], list[str]]:
    missing: dict[str, str] = {name: "" for name in slots if name not in table}
    wrong: dict[str, str] = {}
    taken: set[str] = set()
    used: dict[str, Rule] = {}
    spare: list[str] = []
    for own, rule in table.items():
        present, absent = rule.present(source.shapes), rule.absent(source.shapes)
        taken.update(present)
        if own not in slots:
            spare += present
        elif absent:
            missing[own] = "" if absent == [own] else f" (a file calls it {', '.join(absent)})"
        elif present:
            shapes = [source.shapes[name] for name in present]
            shape, expected = rule.shape(shapes), tuple(slots[own][0][2].shape)
            if shape == expected:
                used[own] = rule
            else:
                files = ", ".join(f"{name} {list(s)}" for name, s in zip(present, shapes, strict=True))
                turned = ", which has rows and columns the other way round" if rule.transposed else ""
                wrong[own] = f": the model has {list(expected)}, the file {files}{turned}"
    others = [name for name in source.shapes if name not in taken]
    unexpected = {name: "" for name in others if not ignored(name)}
    if missing or unexpected or wrong:
        raise ValueError(_misfit(model, source.where, missing, unexpected, wrong))
    return used, spare + [name for name in others if ignored(name)]


def _misfit(
    model: BaseModel, where: str, missing: dict[str, str], unexpected: dict[str, str], wrong: dict[str, str]
) -> str:
    lines = [f"{where} does not fit {type(model).__name__}:"]
    for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong)):
        groups: dict[str, list[str]] = {}
        for name, note in names.items():
            groups.setdefault(_owner(model, name), []).append(name + note)
        for owner, members in groups.items():
            more = f" and {len(members) - 3} more" if len(members) > 3 else ""
            lines.append(f"  {len(members)} {what}, {owner}: {'; '.join(members[:3])}{more}")
    if missing and unexpected:
        lines.append("The weights are of another composition. Check which mixins they were saved with.")
    elif missing:
        lines.append("A shard may be missing, or the weights are of another variant. Fetch the folder again.")
    elif unexpected:
        lines.append("The weights have more than this model. Check the config file beside them.")
    else:
        lines.append("Check the sizes in the config file, and `overrides` for constants that it lacks.")
    return "\n".join(lines)


def _owner(model: BaseModel, name: str) -> str:
    match = re.match(r"(?:transformer\.layers\.\d+\.)?mixins\.([^.]+)\.", name)
    if match is None:
        return "backbone" if name.startswith("transformer.") else "unknown name"
    mixin = model.mixins[match[1]] if match[1] in model.mixins else None
    return f"mixin '{match[1]}'" + (f" ({type(mixin).__name__})" if mixin is not None else "")


def own_tensors(model: BaseModel) -> dict[str, torch.Tensor]:
    """{name: tensor} as the own format stores them; tied ones once."""
    return {name: held[0][2].detach() for name, held in slots_of(model).items()}


@contextmanager
def saving(model: BaseModel) -> Iterator[None]:
    """While it lasts, every mixin shows its parameters as they are saved (a merged LoRA is taken out)."""
    with ExitStack() as stack:
        for owner in [module for module in model.modules() if isinstance(module, BaseModel)]:
            for mixin in owner.mixins.values():
                assert isinstance(mixin, BaseMixin)
                stack.enter_context(mixin.saving(owner))
        yield
