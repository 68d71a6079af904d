"""An un-merged LoRA of SwissArmyTransformer (sat/model/finetune/lora2.py) as LoRA mixins, and back.

SAT replaces a Linear X by `X.original`, and has one update for each row block of it: `X.matrix_A.{k}` [r, in] and
`X.matrix_B.{k}` [rows, r], scaled by alpha / r. Its files do not record alpha; its default is 1.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from mixformer.conversion.updates import Update, updates_of
from mixformer.mixins.lora import LoRAMixin
from mixformer.model import BaseModel
from mixformer.sites import Linear, all_sites
from models.weights.rules import Rule
from models.weights.sat_folder import SATFolder, split_of

_MODULE = re.compile(
    r"((?:mixins\.eva\.vit_model\.)?transformer\.layers\.\d+)\."
    r"(attention\.query_key_value|attention\.dense|cross_attention\.(?:query|key_value|dense))"
)
_ATTENTION = {"attention.query_key_value", "attention.dense"}
_CROSS = {"cross_attention.query", "cross_attention.key_value", "cross_attention.dense"}


def add_lora(model: BaseModel, folder: SATFolder, rules: Iterable[Rule], alpha: float) -> list[Rule]:
    """Add the LoRA of a SAT folder to a model as mixins; the key table of their tensors.

    One mixin takes all updates of one rank, scale and choice of layers of one model.

    Args:
        model: what the folder holds without it; shapes are enough.
        folder: opened with `lora=True`.
        rules: key table of the model.
        alpha: as SAT's `LoraMixin` was given it.

    Raises:
        ValueError: an update of something that is no Linear of the model, or one that lacks blocks.
    """
    own = {rule.foreign[0]: rule.own for rule in rules if len(rule.foreign) == 1}
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    places = {
        names[id(site.module)]: (owner, layer.index, site)
        for _, owner in [("", model), *model.nested_models()]
        for layer, site in all_sites(owner) if layer is not None and isinstance(site.module, Linear)
    }
    groups: dict[tuple[int, int, float], dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    owners: dict[int, Any] = {}
    modules: dict[str, str] = {}
    for module, count in folder.adapted.items():
        weight = own.get(f"{module}.weight", "")
        if weight not in places:
            raise ValueError(f"{folder.where} has a LoRA on '{module}', which is no Linear in a layer of this model.")
        owner, index, site = places[weight]
        blocks = [""] if count == 1 else [f":{part}" for part in site.module.parts]
        missing = [name for k in range(count) for name in _halves(module, k) if name not in folder.shapes]
        if len(blocks) != count or missing:
            what = f"lacks '{missing[0]}'" if missing else f"has {count} updates of '{module}', not {len(blocks)}"
            raise ValueError(f"{folder.where} {what}. The LoRA is damaged or of another model: fetch it again.")
        rank = folder.shapes[_halves(module, 0)[0]][0]
        times = folder.num_ranks if split_of(f"{module}.weight") == "columns" else 1
        groups[id(owner), rank, alpha * times][index] |= {site.name + block for block in blocks}
        owners[id(owner)], modules[weight] = owner, module
    for (owner_id, rank, scaled), layers in groups.items():
        owner = owners[owner_id]
        for sites in sorted({tuple(sorted(sites)) for sites in layers.values()}):
            indices = sorted(index for index in layers if tuple(sorted(layers[index])) == sites)
            scope = None if len(indices) == owner.config.num_layers else indices
            owner.add_mixin(_free_name(owner), LoRAMixin(list(sites), rank, scaled), layers=scope)
    return [rule for update in updates_of(model) for rule in _rules(update, modules[update.weight])]


def lora_rules(
    updates: Sequence[Update], rules: Iterable[Rule], alpha: float
) -> tuple[list[Rule], set[str]]:
    """Key table of a model's updates as SAT has them, and the modules whose weights it then calls `original`.

    Args:
        updates: of the model.
        rules: key table of the rest of the model.
        alpha: as SAT's `LoraMixin` will be given it.

    Raises:
        ValueError: a LoRA that SAT's `LoraMixin` does not make.
    """
    foreign = {rule.own: rule.foreign[0].removesuffix(".weight") for rule in rules if len(rule.foreign) == 1}
    found: list[Rule] = []
    done: dict[str, set[str]] = defaultdict(set)
    layers: dict[str, set[str]] = defaultdict(set)
    ranks: dict[bool, set[int]] = defaultdict(set)
    for update in updates:
        module, wanted = foreign.get(update.weight, update.weight), update.parts or ("all",)
        match, rank = _MODULE.fullmatch(module), len(update.adapter.a)
        if match is None or update.part not in wanted or update.part in done[module]:
            part = "" if update.part == "all" else f":{update.part}"
            raise ValueError(
                f"SAT's LoRA has no place for the update of '{update.weight.removesuffix('.weight')}{part}' by mixin "
                f"'{update.mixin}': it adapts each row block of query_key_value, dense, and those of cross attention, "
                f"once. Merge it (--lora merge), or use the own format."
            )
        if not math.isclose(update.adapter.scale, alpha / rank):
            raise ValueError(
                f"The LoRA mixin '{update.mixin}' has alpha {update.adapter.scale * rank:g}, which SAT's files do not "
                f"record; its LoraMixin takes {alpha:g} unless told otherwise. Merge it (--lora merge), or say what "
                f"you will give it as lora_alpha: --lora-alpha {update.adapter.scale * rank:g}."
            )
        done[module].add(update.part)
        layers[match[1]].add(match[2])
        ranks[module.startswith("mixins")].add(rank)
        found += _rules(update, module)
    sizes = {foreign.get(update.weight, ""): len(update.parts) or 1 for update in updates}
    partial = [module for module in done if len(done[module]) < sizes[module]]
    partial += [layer for layer, have in layers.items() if have - _CROSS != _ATTENTION or len(have & _CROSS) in (1, 2)]
    if partial or any(len(each) > 1 for each in ranks.values()):
        what = f"adapts '{partial[0]}' in part" if partial else "has several ranks"
        raise ValueError(
            f"The LoRA {what}; SAT's adapts query_key_value and dense of a layer, and its cross attention, all "
            f"together and with one rank. Merge it (--lora merge), or use the own format."
        )
    return found, set(done)


def _rules(update: Update, module: str) -> list[Rule]:
    k = 0 if update.part == "all" else update.parts.index(update.part)
    names = zip((update.a, update.b), _halves(module, k), strict=True)
    return [Rule(ours, (theirs,)) for ours, theirs in names]


def _halves(module: str, k: int) -> tuple[str, str]:
    return f"{module}.matrix_A.{k}", f"{module}.matrix_B.{k}"


def _free_name(owner: Any) -> str:
    number = 1
    while (name := "lora" if number == 1 else f"lora_{number}") in owner.mixins:
        number += 1
    return name
