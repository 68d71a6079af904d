"""What a model is made of and what it costs, as plain values, and how two of them differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mixformer.accounting.flops import RULE, FlopCount
from mixformer.accounting.forward import Forward, count_forward
from mixformer.accounting.hook_grid import DEFAULT, hook_grid
from mixformer.accounting.parameters import (
    LAYERS,
    TRANSFORMER,
    Part,
    PartSize,
    buffer_bytes,
    part_sizes,
    stage_totals,
    total_size,
)
from mixformer.accounting.workload import Workload

Summary = dict[str, Any]


def describe(model: Any, workload: Workload | None = None) -> Summary:
    """Count a model's parameters and operations, and list its hooks; nothing of it is computed or allocated.

    Args:
        model: a BaseModel, on any device; shapes are enough.
        workload: what a forward is counted for; None for a short text about one picture, as far as they fit.

    Returns:
        Plain values:

        - `parameters` in total; `model`, its class; `trainable` ones; `transformer`, the backbone's own; `bytes` by
          dtype; `buffer_bytes`; `config`, its options.
        - `mixins` {name: {class, layers, parameters, trainable, bytes, parts {part: parameters}}}, where the part
          `layers` is what a mixin has in the layers.
        - `parts` [{owner, part, parameters, trainable, bytes, flops {operator: operations}}], the backbone's too.
        - `hooks` [[hook, where, chain]]; `num_layers`; `grid` [{hook, of_layers, chains}], the chain of each layer.
        - `stages` {stage of the class: parameters that it trains}.
        - `forward`: `workload`, `row_length`, `of_pictures` (a tower's rows are pictures), `flops` {total,
          without_tower_attention, rule, terms}, where `terms` are [{part, operator, operations, share}] with the
          largest first, and `cache` {per_token, per_image, dtype} or None; or `problem`, why a forward could not be
          counted.
        - `nested` {path: the same for the models inside}.

    Raises:
        ValueError: a `workload` that the model does not take.
    """
    try:
        forward: Forward | Exception = count_forward(model, workload or Workload().fitted(model))
    except Exception as error:  # anyone's mixin may do what the meta device cannot; the sizes are known all the same
        if workload is not None and isinstance(error, ValueError):
            raise
        forward = error
    flops = forward.flops if isinstance(forward, Forward) else FlopCount([])
    summary = _summary(model, flops)
    nested = summary.pop("nested")
    return {**summary, "forward": _forward(forward), "nested": nested}


def _summary(model: Any, flops: FlopCount) -> Summary:
    sizes, operations = part_sizes(model), flops.by_part()
    total = total_size(sizes.values())
    own = [size for part, size in sizes.items() if part.owner == TRANSFORMER]
    return {
        "parameters": total.parameters,
        "model": type(model).__name__,
        "trainable": total.trainable,
        "transformer": total_size(own).parameters,
        "bytes": total.bytes,
        "buffer_bytes": buffer_bytes(model),
        "config": asdict(model.config),
        "num_layers": len(model.transformer.layers),
        "mixins": {name: _mixin(model, name, sizes) for name in model.mixins},
        "parts": [
            {"owner": part.owner, "part": part.name, **asdict(sizes.get(part, PartSize())),
             "flops": operations.get(part, {})}
            for part in _in_order(model, {**sizes, **operations})
        ],
        "hooks": [list(row) for row in model.hooks.rows],
        "grid": [
            {"hook": row.hook, "of_layers": row.of_layers, "chains": [list(chain) for chain in row.chains]}
            for row in hook_grid(model)
        ],
        "stages": stage_totals(model),
        "nested": {path: _summary(inner, flops.inside(path)) for path, inner in model.nested_models()},
    }  # fmt: skip


def _in_order(model: Any, parts: Mapping[Part, Any]) -> list[Part]:
    owners = [TRANSFORMER, *model.mixins]
    return sorted(parts, key=lambda part: owners.index(part.owner))


def _mixin(model: Any, name: str, sizes: dict[Part, PartSize]) -> dict[str, Any]:
    own = {part.name: size for part, size in sizes.items() if part.owner == name and size.parameters}
    ordered = {part: own[part] for part in sorted(own, key=lambda part: part == LAYERS)}
    total = total_size(own.values())
    return {
        "class": type(model.mixins[name]).__name__, "layers": model.scopes[name], "parameters": total.parameters,
        "trainable": total.trainable, "bytes": total.bytes,
        "parts": {part: size.parameters for part, size in ordered.items()},
    }  # fmt: skip


def _forward(forward: Forward | Exception) -> dict[str, Any]:
    if isinstance(forward, Exception):
        return {"problem": f"A forward could not be counted: {type(forward).__name__}: {forward}"}
    total = forward.flops.total
    terms = [
        {"part": str(part), "operator": operator, "operations": number, "share": number / total}
        for part, operators in forward.flops.by_part().items() for operator, number in operators.items()
    ]
    return {
        "workload": asdict(forward.workload),
        "row_length": forward.row_length,
        "of_pictures": forward.of_pictures,
        "flops": {
            "total": total,
            "without_tower_attention": total - forward.flops.tower_attention,
            "rule": RULE,
            "terms": sorted(terms, key=lambda term: -term["operations"]),
        },
        "cache": None if forward.cache is None else asdict(forward.cache),
    }  # fmt: skip


def compare(first: Summary, second: Summary) -> dict[str, Any]:
    """How two models differ.

    Args:
        first, second: what `describe` returned.

    Returns:
        Plain values: `models`, both classes; `totals` {what: [first, second]}, all of them, None where one has no such
        thing; `parts` [{part, parameters [first, second], flops [first, second]}] and `config` {option: [first,
        second]}, those that differ, nested models' in the parts of their mixins; `mixins` {removed, added, changed};
        `hooks` [{path, hook, layers, first, second}], chains that differ, `path` that of a nested model.
    """
    parts = _pairs(_part_values(first), _part_values(second), [0, 0])
    return {
        "models": [first["model"], second["model"]],
        "totals": {name: list(pair) for name, pair in _pairs(_totals(first), _totals(second), None).items()},
        "parts": [
            {"part": part, "parameters": [a[0], b[0]], "flops": [a[1], b[1]]}
            for part, (a, b) in parts.items() if a != b
        ],
        "mixins": _mixin_changes(first, second),
        "hooks": _hook_changes(first, second),
        "config": _option_changes(first["config"], second["config"]),
    }  # fmt: skip


def _pairs(first: Mapping[str, Any], second: Mapping[str, Any], absent: Any) -> dict[str, tuple[Any, Any]]:
    return {name: (first.get(name, absent), second.get(name, absent)) for name in {**first, **second}}


def _totals(summary: Summary) -> dict[str, int]:
    forward = summary["forward"]
    totals = {
        "parameters": summary["parameters"], "trainable": summary["trainable"],
        "bytes": sum(summary["bytes"].values()),
    }
    if "flops" in forward:
        totals["tokens of a row"] = forward["row_length"]
        totals["FLOPs"] = forward["flops"]["total"]
        totals["FLOPs without towers' attention"] = forward["flops"]["without_tower_attention"]
    if forward.get("cache"):
        totals["cache bytes per token"] = forward["cache"]["per_token"]
        totals["cache bytes per image"] = forward["cache"]["per_image"]
    return totals


def _part_values(summary: Summary) -> dict[str, list[int]]:
    """{part: [parameters, operations]}."""
    return {
        str(Part(row["owner"], row["part"])): [row["parameters"], sum(row["flops"].values())]
        for row in summary["parts"]
    }


def _mixin_changes(first: Summary, second: Summary, path: str = "") -> dict[str, list[str]]:
    """Names of the mixins that are gone, new, or of another class, other layers or another size; nested ones too."""
    changes: dict[str, list[str]] = {"removed": [], "added": [], "changed": []}
    for name, (a, b) in _pairs(first["mixins"], second["mixins"], None).items():
        kind = "added" if a is None else "removed" if b is None else "changed"
        if a != b:
            changes[kind].append(f"{path}{name}")
    for inner, (a, b) in _pairs(first["nested"], second["nested"], None).items():
        if a is not None and b is not None and "." not in path:
            for kind, names in _mixin_changes(a, b, f"{inner}/").items():
                changes[kind] += names
    return changes


def _hook_changes(first: Summary, second: Summary, path: str = "") -> list[dict[str, Any]]:
    found = []
    for hook, (a, b) in _pairs(_chains(first), _chains(second), {}).items():
        absent = DEFAULT if " " in hook else None  # a site that no mixin claims is not listed
        groups: dict[tuple[Any, Any], list[Any]] = {}
        for layer, pair in _pairs(a, b, absent).items():
            if pair[0] != pair[1]:
                groups.setdefault(pair, []).append(layer)
        found += [
            {"path": path, "hook": hook, "layers": [layer for layer in layers if layer is not None],
             "first": chains[0], "second": chains[1]}
            for chains, layers in groups.items()
        ]
    for inner, (a, b) in _pairs(first["nested"], second["nested"], None).items():
        if a is not None and b is not None and not path:
            found += _hook_changes(a, b, inner)
    return found  # fmt: skip


def _chains(summary: Summary) -> dict[str, dict[Any, str]]:
    """{hook: {layer, or None for what runs once: chain}}."""
    return {
        row["hook"]: {
            index if row["of_layers"] else None: " <- ".join(chain)
            for index, chain in enumerate(row["chains"]) if chain
        }
        for row in summary["grid"]
    }


def _option_changes(first: Mapping[str, Any], second: Mapping[str, Any], prefix: str = "") -> dict[str, list[Any]]:
    """{option: [first, second]} of those that differ; a section that one does not have is one option."""
    found: dict[str, list[Any]] = {}
    for name, (a, b) in _pairs(first, second, None).items():
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found.update(_option_changes(a, b, f"{prefix}{name}."))
        elif a != b:
            found[prefix + name] = [a, b]
    return found
