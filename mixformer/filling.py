"""Weights into models: every tensor of a file goes into a model that was built without memory, one by one."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
from tqdm import tqdm

from mixformer.mixin import BaseMixin
from mixformer.model import BaseModel
from mixformer.quantised import Kind, QuantisedLinear, quantise_linear, resolve_hooks, shape_linear
from mixformer.shards import TensorSource, in_reading_order, num_threads

if TYPE_CHECKING:
    from models.weights import Rule

PROGRESS_FROM = 10**9
"""Bytes from which reading shows a progress bar."""

READ_AHEAD = 32_000_000
"""Bytes that are read before their turn, if more than one tensor."""


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
    dtype: torch.dtype | None, device: torch.device | str, quantise: Mapping[str, Kind] | None = None,
    progress: bool | None = None,
) -> tuple[list[str], list[str]]:
    """Put the tensors of a source into a model, one after the other as they lie in the files.

    At any time the memory holds what has been placed, the tensors that one of ours is made of, and the next ones: those
    of one more, or `READ_AHEAD` bytes.

    Args:
        model: built without memory.
        source: the tensors.
        rules: the key table.
        ignored: whether a name that no rule has may be there.
        dtype: of floating-point tensors; None keeps each one's.
        device: where they go; on `meta` names, shapes and dtypes are checked only.
        quantise: {path of a Linear: kind}; each is quantised when its weight has been read.
        progress: show a progress bar; None for those that read a gigabyte or more.

    Returns:
        Names that the table knows and the source does not have, and names of the source that the model does not use.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape or dtype, or cannot be quantised.
    """
    slots = slots_of(model)
    table = {rule.own: rule for rule in rules}
    used, unused = _check_fit(model, source, table, slots, ignored)
    kinds = {f"{path}.weight": kind for path, kind in (quantise or {}).items()}
    if is_meta(device):
        for name, kind in kinds.items():
            shape_linear(slots[name][0][0], kind, dtype)
        if kinds:
            resolve_hooks(model)
        return [], []
    absent = [name for rule in table.values() if rule.copies for name in rule.foreign if name not in source.shapes]
    starts = {rule.present(source.shapes)[0]: rule for rule in used.values()}
    ordered = [starts[start] for start in in_reading_order(source, list(starts))]
    shown = source.num_bytes >= PROGRESS_FROM if progress is None else progress
    with tqdm(total=source.num_bytes, unit="B", unit_scale=True, desc="Reading weights", disable=not shown) as bar:
        for rule, tensors in zip(ordered, _read_ahead(source, ordered), strict=True):
            num_bytes = sum(each.nbytes for each in tensors)
            try:
                tensor = rule.to_own(tensors)
            except ValueError as error:
                raise ValueError(f"{source.where}: {error}") from error
            tensors.clear()
            wanted = dtype if tensor.is_floating_point() else None
            if rule.own in kinds:
                try:
                    quantise_linear(slots[rule.own][0][0], tensor, kinds[rule.own], wanted, device)
                except ValueError as error:
                    where = _home(source, rule.present(source.shapes)[0])
                    raise ValueError(f"{source.where}: '{rule.own}'{where}: {error}") from error
            else:
                _place(slots[rule.own], tensor, wanted, device, source.gives_own)
            del tensor
            bar.update(num_bytes)
        with torch.no_grad():
            for name, rule in table.items():
                if name not in used and name in slots:
                    assert rule.default is not None
                    _place(slots[name], rule.default(model), dtype or model.dtype, device)
    for inner in model.modules():
        if isinstance(inner, BaseModel):
            inner._device = torch.device(device)
        elif isinstance(inner, QuantisedLinear):
            inner.suit_device()
    if kinds:
        resolve_hooks(model)
    left = [name for name, held in slots_of(model).items() if held[0][2].is_meta]
    assert not left, left
    return absent, unused


def _read_ahead(source: TensorSource, rules: Sequence[Rule]) -> Iterator[list[torch.Tensor]]:
    """The tensors of each rule, in turn; threads read the next ones meanwhile."""
    names = [rule.present(source.shapes) for rule in rules]
    if not source.gives_own:  # mapped, so that reading costs nothing yet
        for each in names:
            yield [source.read(name) for name in each]
        return
    sizes = [sum(math.prod(source.shapes[name]) * source.dtypes[name].itemsize for name in each) for each in names]
    waiting: deque[list[Future[torch.Tensor]]] = deque()
    ahead = first = 0
    with ThreadPoolExecutor(num_threads()) as pool:
        try:
            for index in range(len(names)):
                while first < len(names) and (len(waiting) < 2 or ahead + sizes[first] <= READ_AHEAD):
                    waiting.append([pool.submit(source.read, name) for name in names[first]])
                    ahead, first = ahead + sizes[first], first + 1
                tensors = [future.result() for future in waiting.popleft()]
                ahead -= sizes[index]
                yield tensors
        finally:
            pool.shutdown(cancel_futures=True)


def _place(
    slots: list[Slot], tensor: torch.Tensor, dtype: torch.dtype | None, device: torch.device | str, own: bool = False
) -> None:
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    # Unless the tensor is all of a memory of its own, a copy even where nothing is converted.
    tensor = tensor.to(device=device, dtype=dtype or tensor.dtype, copy=not (own and whole))
    placed: torch.Tensor | None = None
    for module, attribute, old in slots:
        if isinstance(old, nn.Parameter):
            if placed is None:
                placed = type(old)(tensor, requires_grad=old.requires_grad and tensor.is_floating_point())
            module._parameters[attribute] = placed  # type: ignore[assignment]
        else:
            module._buffers[attribute] = tensor


def _check_fit(
    model: BaseModel, source: TensorSource, table: Mapping[str, Rule], slots: Mapping[str, list[Slot]],
    ignored: Callable[[str], bool],
) -> tuple[dict[str, Rule], list[str]]:
    found: dict[str, dict[str, str]] = {"missing": {name: "" for name in slots if name not in table}}
    misshaped, mistyped = (found.setdefault(f"of another {what}", {}) for what in ("shape", "dtype"))
    taken: set[str] = set()
    used: dict[str, Rule] = {}
    spare: list[str] = []
    for own, rule in table.items():
        present, absent = rule.present(source.shapes), rule.absent(source.shapes)
        taken.update(present)
        if own not in slots:
            spare += present
        elif absent:
            found["missing"][own] = "" if absent == [own] else f" (a file calls it {', '.join(absent)})"
        elif present:
            shape, expected = rule.shape([source.shapes[name] for name in present]), tuple(slots[own][0][2].shape)
            if shape != expected:
                turned = ", which has rows and columns the other way round" if rule.transposed else ""
                files = ", ".join(f"{name} {list(source.shapes[name])}{_home(source, name)}" for name in present)
                misshaped[own] = f": the model has {list(expected)}, the file {files}{turned}"
            elif wrong := _wrong_dtype(slots[own][0][2], {name: source.dtypes[name] for name in present}):
                mistyped[own] = f": {wrong}{_home(source, present[0])}"
            else:
                used[own] = rule
    others = [name for name in source.shapes if name not in taken]
    found["unexpected"] = {name: _home(source, name) for name in others if not ignored(name)}
    if any(found.values()):
        raise ValueError(_misfit(model, source.where, found))
    return used, spare + [name for name in others if ignored(name)]


def _home(source: TensorSource, name: str) -> str:
    """Where a tensor is, for messages."""
    files: Mapping[str, str] = getattr(source, "files", {})
    return f" (in {files[name]})" if name in files else ""


def _wrong_dtype(held: torch.Tensor, stored: Mapping[str, torch.dtype]) -> str | None:
    """What is wrong with the dtypes of the tensors that one of the model's is made of, if anything."""
    kinds = {name: str(dtype).removeprefix("torch.") for name, dtype in stored.items()}
    for name, dtype in stored.items():
        plain = dtype.is_floating_point and dtype.itemsize > 1
        if plain != held.is_floating_point():
            wanted = "floating-point numbers" if held.is_floating_point() else "integers"
            return f"the model has {wanted} there, '{name}' is {kinds[name]}"
    if len(set(kinds.values())) > 1:
        return f"the model has one tensor, the file {', '.join(f'{name} {kind}' for name, kind in kinds.items())}"
    return None


def _misfit(model: BaseModel, where: str, found: Mapping[str, Mapping[str, str]]) -> str:
    lines = [f"{where} does not fit {type(model).__name__}:"]
    for what in ("missing", "unexpected", "of another shape", "of another dtype"):
        groups: dict[str, list[str]] = {}
        for name, note in found[what].items():
            groups.setdefault(_owner(model, name), []).append(name + note)
        for owner, members in groups.items():
            more = f" and {len(members) - 3} more" if len(members) > 3 else ""
            lines.append(f"  {len(members)} {what}, {owner}: {'; '.join(members[:3])}{more}")
    if found["missing"] and found["unexpected"]:
        lines.append("The weights are of another composition. Check which mixins they were saved with.")
    elif found["missing"]:
        lines.append("A shard may be missing, or the weights are of another variant. Fetch the folder again.")
    elif found["unexpected"]:
        lines.append("The weights have more than this model. Check the config file beside them.")
    elif found["of another shape"]:
        lines.append("Check the sizes in the config file, and `overrides` for constants that it lacks.")
    else:
        lines.append("If another program quantised them, fetch the original weights, and load those with `quantise`.")
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
