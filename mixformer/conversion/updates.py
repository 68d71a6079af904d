"""The LoRA updates of a model by the weights they change, and weights read with the updates added."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn

from mixformer.filling import slots_of, tied_names
from mixformer.mixins.lora import LoRAMixin
from mixformer.mixins.low_rank import Adapter
from mixformer.model import BaseModel
from mixformer.sites import Linear, all_sites


@dataclass(frozen=True)
class Update:
    """One adapter of a model.

    Attributes:
        weight: name of the weight that it changes, as the state dict has it.
        a, b: names of its halves.
        part: of the Linear's rows, or `all`.
        parts: names of the Linear's row blocks; empty for a plain one.
        adapter: itself.
        mixin: path of the mixin that has it.
    """

    weight: str
    a: str
    b: str
    part: str
    parts: tuple[str, ...]
    adapter: Adapter
    mixin: str


def updates_of(model: BaseModel) -> list[Update]:
    """All adapters of the LoRA mixins of a model and of those in it; those of one weight in the order of adding."""
    found = []
    names = {id(module): name for name, module in model.named_modules()}
    for path, owner in [("", model), *model.nested_models()]:
        for layer, site in all_sites(owner):
            for name, mixin in owner.mixins.items() if isinstance(site.module, Linear) else ():
                adapters = mixin.adapters_of(site, layer) if isinstance(mixin, LoRAMixin) else {}
                for part, adapter in adapters.items():
                    home, weight = names[id(adapter)], f"{names[id(site.module)]}.weight"
                    where, parts = f"{path}/{name}" if path else name, tuple(site.module.parts)
                    found.append(Update(weight, f"{home}.a", f"{home}.b", part, parts, adapter, where))
    return found


def without_lora(model: BaseModel) -> None:
    """Take all LoRA mixins out of a model and the models in it."""
    for owner in [model, *(nested for _, nested in model.nested_models())]:
        for name in [name for name, mixin in owner.mixins.items() if isinstance(mixin, LoRAMixin)]:
            owner.del_mixin(name)


class Merged:
    """Reads the tensors of a model with its LoRA updates added to the weights, and takes the LoRA out of the model.

    Sums are made in fp32 at least and rounded once, as SAT's `merge_lora` and PEFT do.

    Args:
        model: whose updates they are; shapes are enough.
        read: gives a tensor of the model by its name.

    Raises:
        ValueError: an update of a weight that is quantised.
    """

    def __init__(self, model: BaseModel, read: Callable[[str], torch.Tensor]) -> None:
        self._read = read
        self._updates: dict[str, list[Update]] = defaultdict(list)
        held, first = slots_of(model), tied_names(model)
        for update in updates_of(model):
            name = first.get(update.weight, update.weight)
            if name not in held:
                raise ValueError(
                    f"The LoRA '{update.mixin}' cannot be merged into '{update.weight}', which is quantised. Keep it, "
                    f"or merge it into the original weights."
                )
            self._updates[name].append(update)
        without_lora(model)

    def __call__(self, name: str) -> torch.Tensor:
        """The tensor of that name, its updates added."""
        tensor = self._read(name)
        if name not in self._updates:
            return tensor
        tensor = tensor.clone()
        for update in self._updates[name]:
            halves = {half: self._read(getattr(update, half)) for half in ("a", "b")}
            kept = dict(update.adapter._parameters)
            for half, value in halves.items():
                wide = torch.promote_types(value.dtype, torch.float32)
                update.adapter._parameters[half] = nn.Parameter(value.to(wide), requires_grad=False)
            with torch.no_grad():
                update.adapter.add_to(tensor)
            update.adapter._parameters.update(kept)
        return tensor
