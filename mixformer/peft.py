"""LoRA adapters as PEFT keeps them: folders of `adapter_config.json` and `adapter_model.safetensors`.

    names = load_adapter(model, "alpaca-lora")         # adds LoRAMixins, ready to train, merge or remove
    save_adapter(model, "my-lora", base_model="meta-llama/Llama-2-7b-hf")
    save_adapter(model, "my-lora", whole=["image.projector"])  # with a connector that was trained as a whole

PEFT names modules as HF's model of the family has them; the key tables of `models/weights` tell which Linear of ours,
or which rows of a fused one, that is (`q_proj` is `qkv:q`). PEFT itself is not needed.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from mixformer.checkpoint import source_of
from mixformer.hooks import did_you_mean
from mixformer.mixins.lora import LoRAMixin
from mixformer.mixins.low_rank import Adapter
from mixformer.model import BaseModel
from mixformer.shard_writer import write_file
from mixformer.shards import read_json
from mixformer.sites import Linear, all_sites

if TYPE_CHECKING:
    from models.weights import Format, Rule

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
REFUSED = {
    "use_dora": "DoRA", "use_qalora": "QALoRA", "lora_bias": "biases in the updates", "alora_invocation_tokens":
    "activated LoRA", "trainable_token_indices": "trained rows of embeddings", "layer_replication": "replicated layers",
    "target_parameters": "updates of bare parameters", "use_bdlora": "block-diagonal LoRA", "velora_config": "VeLoRA",
    "arrow_config": "Arrow routing", "monteclora_config": "MonteCLoRA", "kasa_config": "KaSA",
}
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
LANGUAGE_FORMATS = ("hf-llama", "hf-mistral", "hf-qwen2", "hf-gpt2")
HF_PATHS: dict[str, tuple[tuple[str, str], ...]] = {
    **dict.fromkeys(("hf-llama", "hf-mistral", "hf-qwen2", "hf-cogvlm", "hf-cogagent", "hf-idefics2"), ()),
    "hf-gpt2": ((r"^(?!lm_head)", "transformer."),),
    "hf-llava": (
        (r"^language_model\.lm_head", "lm_head"), (r"^language_model\.model\.", "model.language_model."),
        (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
        (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
    ),
}
"""How names of a key table become paths of modules in HF's own class."""


@dataclass(frozen=True)
class _Place:
    """A Linear of a model, or a part of its rows.

    Attributes:
        owner: path of the nested model that it is a site of; empty for the model itself.
        layer: index; None outside the layers.
        site: name.
        part: None for all rows.
    """

    owner: str
    layer: int | None
    site: str
    part: str | None = None

    @property
    def pattern(self) -> str:
        """What selects it in `LoRAMixin`."""
        return self.site if self.part is None else f"{self.site}:{self.part}"


@dataclass(frozen=True)
class _Update:
    """One low-rank update of a foreign module: scale * b @ a."""

    a: torch.Tensor
    b: torch.Tensor
    alpha: float
    scale: float


def load_adapter(model: BaseModel, folder: str | os.PathLike[str], name: str = "lora") -> list[str]:
    """Add the adapter in a PEFT folder to a model.

    One `LoRAMixin` takes all updates of one rank, scale and choice of layers; a usual adapter is one mixin. Updates
    keep the file's dtype where it is the wider one. Modules that were trained as a whole (`modules_to_save`) take the
    place of the model's own, in the model's dtype; those are lost.

    Args:
        model: of a family that HF knows.
        folder: with adapter_config.json and adapter_model.safetensors.
        name: of the mixin; further ones are `{name}_2` and so on.

    Returns:
        the names (or paths) of the mixins that were added.

    Raises:
        ValueError: no such folder, an adapter of another kind, or modules that the model does not have; the model is
            left as it was.
    """
    folder = Path(folder)
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise ValueError(
                f"{folder} has no {file}, so it is no PEFT adapter that can be read. PEFT writes both {CONFIG} and "
                f"{WEIGHTS} (save_pretrained with safe_serialization, its default)."
            )
    config = read_json(folder / CONFIG)
    _check_supported(config, folder / CONFIG)
    found, linears = _format_of(model), _linears(model)
    by_foreign = {foreign: (rule, i) for rule in found.rules(model.config) for i, foreign in enumerate(rule.foreign)}
    groups: dict[tuple[str, int, float], dict[_Place, tuple[torch.Tensor, torch.Tensor]]] = defaultdict(dict)
    tensors = load_file(folder / WEIGHTS)
    replaced = _replaced(model, found, _trained_whole(tensors, config, found), folder / WEIGHTS)
    for key in [key for key in tensors if ".lora_" not in key and key.endswith(".weight")]:
        _check_base(tensors.pop(key), key, found, by_foreign, model, folder / WEIGHTS)
    for module, (a, b) in _tensors(tensors, folder / WEIGHTS).items():
        foreign = found.renamed(f"{module}.weight")
        if foreign not in by_foreign:
            near = did_you_mean(foreign, list(by_foreign))
            raise ValueError(f"{folder / WEIGHTS} adapts '{module}', which this {found.name} model lacks.{near}")
        place, linear = _place(*by_foreign[foreign], linears, module)
        rows = linear.parts[place.part] if place.part else slice(0, linear.out_features)
        expected = (len(a), linear.in_features), (rows.stop - rows.start, len(a))
        if (tuple(a.shape), tuple(b.shape)) != expected:
            raise ValueError(
                f"{folder / WEIGHTS}: the update of '{module}' is {tuple(b.shape)} times {tuple(a.shape)}; this model "
                f"needs {expected[1]} times {expected[0]}. Is it an adapter of another size of model?"
            )
        alpha = float(_of_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8)))
        groups[place.owner, len(a), alpha][place] = a, b
    added: list[str] = []
    try:
        for (owner, rank, alpha), updates in groups.items():
            for layers, places in _by_layers(updates):
                own_name = _free_name(model, owner, name)
                sites = sorted({place.pattern for place in places})
                dropout, stabilized = float(config.get("lora_dropout", 0.0)), bool(config.get("use_rslora"))
                num_layers = _owner(model, owner).config.num_layers
                scope = None if layers == list(range(num_layers)) else layers
                model.add_mixin(own_name, LoRAMixin(sites, rank, alpha, dropout, stabilized), scope)
                added.append(own_name)
                _fill(model, own_name, {place: updates[place] for place in places})
    except BaseException:
        for own_name in reversed(added):
            model.del_mixin(own_name)
        raise
    parameters = dict(model.named_parameters())
    for own, tensor in replaced.items():
        parameters[own].data.copy_(tensor)
    return added


def save_adapter(
    model: BaseModel, folder: str | os.PathLike[str], names: list[str] | None = None, base_model: str | None = None,
    whole: Sequence[str] = (),
) -> None:
    """Write the LoRA mixins of a model as a PEFT folder; merged ones as well, with the same numbers.

    Several updates of one module become one of their summed rank.

    Args:
        model: of a family that HF knows.
        folder: made if it is not there; an adapter in it is replaced.
        names: of the mixins, or their paths; None for all.
        base_model: folder or hub name of the weights that the adapter is for, for PEFT to find them.
        whole: selectors of parameters that were trained as they are, such as a connector's (`image.projector`); they
            are written beside the updates, as PEFT's `modules_to_save`.

    Raises:
        ValueError: no LoRA, one on a Linear that HF's model of this family does not have, or dropouts that differ; a
            selector that matches nothing, or less than a module of HF's model.
    """
    found, known = _format_of(model), dict(_loras(model))
    if found.name not in HF_PATHS:
        raise ValueError(f"Adapters of {found.name} are not written for PEFT. Those that are: {', '.join(HF_PATHS)}.")
    for name in names or ():
        if name not in known:
            near = did_you_mean(name, list(known))
            raise ValueError(f"There is no LoRA mixin '{name}'.{near} There are: {', '.join(known) or 'none'}.")
    mixins = {name: known[name] for name in (known if names is None else names)}
    if not mixins:
        raise ValueError("The model has no LoRA mixin, so there is no adapter to write. Add one with model.add_mixin.")
    for option in ("dropout", "rank_stabilized"):
        values = {mixin.options.get(option, 0) for mixin, _ in mixins.values()}
        if len(values) > 1:
            raise ValueError(f"The LoRA mixins differ in {option} ({values}); PEFT has one. Save them apart (names).")
    own_names = _module_names(model)
    rules = {rule.own: rule for rule in found.rules(model.config)}
    updates: dict[str, list[_Update]] = defaultdict(list)
    transposed = set()
    for name, (mixin, owner) in mixins.items():
        for layer, site in all_sites(owner):
            for part, adapter in mixin.adapters_of(site, layer).items() if isinstance(site.module, Linear) else ():
                own = f"{own_names[id(site.module)]}.weight"
                if own not in rules or (rules[own].copies and len(rules[own].foreign) > 1):
                    raise ValueError(
                        f"LoRA '{name}' adapts '{site.name}', which HF's model has no Linear of its own for "
                        f"({found.name}), so PEFT cannot hold it. Keep it in an own checkpoint (save_pretrained)."
                    )
                transposed.add(rules[own].transposed)
                for foreign, update in _as_foreign(rules[own], site.module, part, adapter, mixin):
                    updates[_module_path(found, foreign)].append(update)
    kept = _kept_whole(model, found, whole)
    modules = _modules_of(kept, found)
    both = [module for module in updates if any(f"{module}.".startswith(f"{each}.") for each in modules)]
    if both:
        raise ValueError(f"'{both[0]}' has a LoRA and is to be kept as a whole; PEFT does one of both: merge the LoRA.")
    stabilized = any(mixin.options.get("rank_stabilized", False) for mixin, _ in mixins.values())
    merged = {module: _summed(each, stabilized) for module, each in updates.items()}
    ranks = Counter(len(update.a) for update in merged.values())
    alphas = Counter(update.alpha for update in merged.values())
    rank, alpha = ranks.most_common(1)[0][0], alphas.most_common(1)[0][0]
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if found.name in LANGUAGE_FORMATS else None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(alpha),
        "rank_pattern": {module: len(update.a) for module, update in merged.items() if len(update.a) != rank},
        "alpha_pattern": {module: _number(u.alpha) for module, u in merged.items() if u.alpha != alpha},
        "target_modules": _targets(set(merged), found, model),
        "lora_dropout": next(iter(mixins.values()))[0].dropout,
        "use_rslora": stabilized,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": transposed == {True},
        "modules_to_save": modules or None,
        "init_lora_weights": True,
    }
    tensors = {}
    for module, update in merged.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = update.a
        tensors[f"{PREFIX}{module}.lora_B.weight"] = update.b
    tensors.update({PREFIX + _hf_path(found, foreign): tensor for foreign, tensor in kept.items()})
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    partial = target / f"{WEIGHTS}.partial"
    partial.unlink(missing_ok=True)
    write_file(partial, tensors, tensors.__getitem__)
    os.replace(partial, target / WEIGHTS)
    (target / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# -------------------------------------------------------------------- reading


def _check_supported(config: Mapping[str, Any], file: Path) -> None:
    kind = str(config.get("peft_type"))
    if kind.rpartition(".")[2].upper() != "LORA":
        raise ValueError(f"{file} describes a '{kind}' adapter; only LoRA is read.")
    for option, what in REFUSED.items():
        if config.get(option):
            raise ValueError(f"{file} asks for {what} ({option}: {config[option]!r}), which is not supported.")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{file} trains biases (bias: {config['bias']!r}), which is not supported; 'none' is.")
    made = config.get("init_lora_weights", True)
    if isinstance(made, str) and made.lower().startswith(BASE_CHANGING):
        raise ValueError(
            f"{file} was begun with init_lora_weights: {made!r}, which changes the base weights. Save it from PEFT "
            f"as a plain LoRA (path_initial_model_for_weight_conversion)."
        )


def _trained_whole(tensors: dict[str, torch.Tensor], config: Mapping[str, Any], found: Format) -> dict[str, Any]:
    """{foreign name: tensor} of the modules that were trained as a whole, which are taken out of the file's tensors."""
    endings = tuple(config.get("modules_to_save") or ())  # PEFT takes every module whose path ends so
    paths = {key: key.removeprefix(PREFIX) for key in tensors if ".lora_" not in key}
    inside = [
        key for key, path in paths.items()
        if any(path[: dot.start()].endswith(endings) for dot in re.finditer(r"\.", path))
    ]
    return {found.renamed(paths[key]): tensors.pop(key) for key in inside}


def _replaced(
    model: BaseModel, found: Format, trained: dict[str, torch.Tensor], file: Path
) -> dict[str, torch.Tensor]:
    """{our name: tensor} of parameters, whole, of which some or all foreign tensors are new."""
    parameters, changed = dict(model.named_parameters()), {}
    for rule in found.rules(model.config):
        new = [name for name in rule.foreign if name in trained]
        if not new:
            continue
        if rule.own not in parameters or (rule.copies and len(rule.foreign) > 1):
            raise ValueError(f"{file} replaces '{new[0]}', which cannot be: '{rule.own}' is tied or quantised here.")
        parts = rule.to_foreign(parameters[rule.own].detach())
        for name in new:
            tensor = trained.pop(name)
            if tensor.shape != parts[name].shape:
                raise ValueError(f"{file}: '{name}' is {list(tensor.shape)}; this model has {list(parts[name].shape)}.")
            parts[name] = tensor.to(parts[name])
        changed[rule.own] = rule.to_own([parts[name] for name in rule.foreign])
    if trained:
        raise ValueError(f"{file} replaces '{next(iter(trained))}', which this {found.name} model lacks.")
    return changed


def _check_base(
    tensor: torch.Tensor, key: str, found: Format, by_foreign: Mapping[str, tuple[Rule, int]], model: BaseModel,
    file: Path,
) -> None:
    """Check that a base weight is the model's: PEFT adds those of embeddings and heads that it adapts."""
    foreign = found.renamed(key.removeprefix(PREFIX).replace(".base_layer.", "."))
    rule, _ = by_foreign.get(foreign, (None, 0))
    own = None if rule is None else model.state_dict().get(rule.own)
    if rule is None or own is None:
        raise ValueError(f"{file} holds '{key}', which is neither an update nor a weight of this model; it is refused.")
    weight = rule.to_foreign(own)[foreign]
    if weight.shape != tensor.shape or not torch.equal(weight, tensor.to(weight)):
        raise ValueError(
            f"{file} holds the base weight '{key}', and it differs from this model's: the adapter was trained with "
            f"changed embeddings or heads, which is not supported, or on other weights."
        )


def _tensors(tensors: Mapping[str, torch.Tensor], file: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{module: (a, b)}."""
    found: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
        if match is None:
            raise ValueError(f"{file} holds '{key}', which is no part of a LoRA update of a Linear; it is refused.")
        found[match[1]][match[2]] = tensor
    for module, halves in found.items():
        if len(halves) < 2:
            raise ValueError(f"{file} has one half of the update of '{module}' only (lora_{next(iter(halves))}).")
    if not found:
        raise ValueError(f"{file} holds no updates.")
    return {module: (halves["A"], halves["B"]) for module, halves in found.items()}


def _of_pattern(patterns: Mapping[str, Any] | None, module: str, usual: Any) -> Any:
    matching = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(matching, usual)


def _place(
    rule: Rule, index: int, linears: Mapping[str, tuple[_Place, Linear]], module: str
) -> tuple[_Place, Linear]:
    if rule.own not in linears or rule.copies:
        raise ValueError(f"The adapter updates '{module}', which is no Linear here ('{rule.own}'), so it has no LoRA.")
    place, linear = linears[rule.own]
    if not rule.rows:
        return place, linear
    start = sum(rule.rows[:index])
    wanted = slice(start, start + rule.rows[index])
    for part, rows in linear.parts.items():
        if rows == wanted:
            return _Place(place.owner, place.layer, place.site, part), linear
    raise ValueError(f"The adapter updates '{module}', which are rows without a name of '{rule.own}' here.")


def _by_layers(updates: Mapping[_Place, Any]) -> Iterator[tuple[list[int] | None, list[_Place]]]:
    """Layers that have the same sites; what lies outside the layers goes with the first of them."""
    places: dict[int | None, list[_Place]] = defaultdict(list)
    for place in updates:
        places[place.layer].append(place)
    outside = places.pop(None, [])
    alike: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for layer in sorted(places, key=lambda layer: layer or 0):
        assert layer is not None
        alike[tuple(sorted(place.pattern for place in places[layer]))].append(layer)
    if not alike:
        yield None, outside
    for layers in alike.values():
        yield layers, [*outside, *(place for layer in layers for place in places[layer])]
        outside = []


def _free_name(model: BaseModel, owner: str, name: str) -> str:
    taken, found, number = _owner(model, owner).mixins, name, 1
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    return f"{owner}/{found}" if owner else found


@torch.no_grad()
def _fill(model: BaseModel, name: str, updates: Mapping[_Place, tuple[torch.Tensor, torch.Tensor]]) -> None:
    (mixin, owner), left = dict(_loras(model))[name], dict(updates)
    owner_path = name.rpartition("/")[0]
    for layer, site in all_sites(owner):
        for part, adapter in mixin.adapters_of(site, layer).items() if isinstance(site.module, Linear) else ():
            index = None if layer is None else layer.index
            place = _Place(owner_path, index, site.name, None if part == "all" else part)
            for parameter, tensor in zip((adapter.a, adapter.b), left.pop(place), strict=True):
                dtype = torch.promote_types(parameter.dtype, tensor.dtype)
                parameter.data = tensor.to(parameter.device, dtype)
    assert not left, left


# -------------------------------------------------------------------- writing


def _as_foreign(
    rule: Rule, linear: Linear, part: str, adapter: Adapter, mixin: LoRAMixin
) -> Iterator[tuple[str, _Update]]:
    """(foreign weight, update) of all that one adapter changes."""
    first = 0
    for foreign, height in zip(rule.foreign, rule.rows or (linear.out_features,), strict=False):
        last = first + height
        start, stop = max(first, adapter.rows.start), min(last, adapter.rows.stop)
        if start < stop:
            b = adapter.b[start - adapter.rows.start : stop - adapter.rows.start]
            if stop - start < height:
                whole = b.new_zeros(height, b.shape[1])
                whole[start - first : stop - first] = b
                b = whole
            yield foreign, _Update(adapter.a, b, mixin.alpha, adapter.scale)
        first = last


def _kept_whole(model: BaseModel, found: Format, selectors: Sequence[str]) -> dict[str, torch.Tensor]:
    """{foreign name: tensor} of the parameters that selectors choose; they make up modules of HF's model."""
    from mixformer.train.roles import select_parameters

    if not selectors:
        return {}
    parameters, rules = dict(model.named_parameters()), {rule.own: rule for rule in found.rules(model.config)}
    kept: dict[str, torch.Tensor] = {}
    for own in sorted(select_parameters(model, list(selectors))):
        if own not in rules or (rules[own].copies and len(rules[own].foreign) > 1):
            raise ValueError(
                f"'{own}' is no parameter of its own in HF's model ({found.name}), so PEFT cannot hold it. Leave it "
                f"out, or keep an own checkpoint (save_pretrained)."
            )
        kept.update(rules[own].to_foreign(parameters[own]))
    for module, one in {name.rpartition(".")[0]: name for name in kept}.items():
        others = [name for rule in rules.values() for name in rule.foreign if name.startswith(f"{module}.")]
        left = [name for name in others if name not in kept]
        if left:
            raise ValueError(
                f"PEFT keeps whole modules, and '{one}' is in '{module}', which has '{left[0]}' and {len(left) - 1} "
                f"more that `whole` does not choose. Choose all of that module, or nothing of it."
            )
    return kept


def _modules_of(kept: Mapping[str, Any], found: Format) -> list[str]:
    """Paths of the modules that parameters are in, without those inside of others."""
    paths = {_hf_path(found, name).rpartition(".")[0] for name in kept}
    return sorted(path for path in paths if not any(path.startswith(f"{other}.") for other in paths))


def _summed(updates: list[_Update], stabilized: bool) -> _Update:
    """Several updates of one module as one; a single one stays as it is, bit for bit."""
    first = updates[0]
    if len(updates) == 1:
        return first
    a = torch.cat([update.a for update in updates])
    b = torch.cat([update.b * (update.scale / first.scale) for update in updates], dim=1)
    return _Update(a, b, first.scale * (math.sqrt(len(a)) if stabilized else len(a)), first.scale)


def _targets(modules: set[str], found: Format, model: BaseModel) -> list[str]:
    """Last parts of the modules' names where these say it all, else their whole names."""
    ends = {module.rpartition(".")[2] for module in modules}
    everything = {
        _module_path(found, foreign)
        for rule in found.rules(model.config) for foreign in rule.foreign if foreign.endswith(".weight")
    }
    meant = {module for module in everything if module.rpartition(".")[2] in ends}
    return sorted(ends if meant == modules else modules)


def _module_path(found: Format, foreign: str) -> str:
    return _hf_path(found, foreign).removesuffix(".weight")


def _hf_path(found: Format, foreign: str) -> str:
    """The path in HF's own class of what a key table names so."""
    for pattern, replacement in HF_PATHS[found.name]:
        foreign = re.sub(pattern, replacement, foreign)
    return foreign


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


# -------------------------------------------------------------------- both


def _format_of(model: BaseModel) -> Format:
    """The HF format that the model was read from, or the first one of its family."""
    from models.weights import HF_FORMATS

    source = source_of(model)
    fitting = [found for found in HF_FORMATS if isinstance(model, found.model)]
    if not fitting:
        raise ValueError(f"No HF format holds a {type(model).__name__}, so PEFT has no names for its modules.")
    return max(fitting, key=lambda each: (len(each.model.__mro__), source is not None and each.name == source.format))


def _linears(model: BaseModel) -> dict[str, tuple[_Place, Linear]]:
    """{name of the weight: (place, Linear)} of all sites, nested models included."""
    names, found = _module_names(model), {}
    for path, owner in [("", model), *model.nested_models()]:
        for layer, site in all_sites(owner):
            if isinstance(site.module, Linear):
                place = _Place(path, None if layer is None else layer.index, site.name)
                found[f"{names[id(site.module)]}.weight"] = place, site.module
    return found


def _owner(model: BaseModel, path: str) -> Any:
    return dict(model.nested_models())[path] if path else model


def _module_names(model: BaseModel) -> dict[int, str]:
    return {id(module): name for name, module in model.named_modules()}


def _loras(model: BaseModel) -> Iterator[tuple[str, tuple[LoRAMixin, Any]]]:
    """(path, (mixin, the model that has it)) of all LoRA mixins."""
    for path, owner in [("", model), *model.nested_models()]:
        for name, mixin in owner.mixins.items():
            if isinstance(mixin, LoRAMixin):
                yield (f"{path}/{name}" if path else name), (mixin, owner)
