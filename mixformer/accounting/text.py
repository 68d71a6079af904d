"""What was counted, as lines for people."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mixformer.accounting.parameters import Part
from mixformer.accounting.plan import Plan, Remedy
from mixformer.accounting.quantised_shapes import INSTALL, can_quantise
from mixformer.chains import shown_layers

_PREFIXES = ("", "k", "M", "G", "T", "P")
_COLUMNS = 5  # purposes side by side
_NUMBER = re.compile(r"-$|[+-]?\d")


def amount(number: float, unit: str = "", digits: int = 4) -> str:
    """A number with a decimal prefix, `18.29 G`; bytes as `36.58 GB`."""
    scaled, prefix = float(number), _PREFIXES[0]
    for prefix in _PREFIXES:
        if abs(scaled) < 999.95 or prefix == _PREFIXES[-1]:
            break
        scaled /= 1000
    text = f"{scaled:.{digits}g}" if prefix else f"{scaled:g}"
    return f"{text} {prefix}{unit}".rstrip()


def description(summary: dict[str, Any], path: str = "") -> list[str]:
    """What `describe` returned as lines for people; `path` leads to a nested model."""
    title = f"{summary['model']}: {summary['parameters']:,} parameters, {summary['trainable']:,} trainable"
    lines = [f"{path}: {title}" if path else title, "", *_aligned(_part_lines(summary)), ""]
    lines += _aligned(summary["hooks"])
    lines += _forward_lines(summary.get("forward"))
    if summary["stages"] and not path:
        trained = ", ".join(f"{name} {number:,}" for name, number in summary["stages"].items())
        lines += ["", f"Stages of the class train: {trained}"]
    for nested_path, nested in summary["nested"].items():
        if "." not in path:
            lines += ["", *description(nested, f"{path}/{nested_path}" if path else nested_path)]
    return lines


def _part_lines(summary: dict[str, Any]) -> list[list[str]]:
    """Parameters, bytes and operations of the backbone and of each mixin, and of their parts if there are several."""
    rows = [["", "parameters", "trainable", "bytes", "FLOPs"]]
    classes = {name: f"{name} ({entry['class']})" for name, entry in summary["mixins"].items()}
    for owner in ("transformer", *summary["mixins"]):
        parts = [row for row in summary["parts"] if row["owner"] == owner]
        rows.append([classes.get(owner, owner), *_figures(parts)])
        if len(parts) > 1:
            rows += [[f"  {Part(owner, row['part'])}", *_figures([row])] for row in parts]
    rows.append(["total", *_figures(summary["parts"])])
    return rows


def _figures(parts: Iterable[dict[str, Any]]) -> list[str]:
    parts = list(parts)
    sizes: dict[str, int] = {}
    for part in parts:
        for dtype, number in part["bytes"].items():
            sizes[dtype] = sizes.get(dtype, 0) + number
    operations = sum(number for part in parts for number in part["flops"].values())
    return [
        f"{sum(part['parameters'] for part in parts):,}",
        f"{sum(part['trainable'] for part in parts):,}",
        ", ".join(f"{amount(number, 'B')} {dtype}" for dtype, number in sizes.items()) or "-",
        amount(operations) if operations else "-",
    ]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows in columns; those of numbers to the right."""
    if not rows:
        return []
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    numeric = [all(_NUMBER.match(row[column]) for row in rows[1:]) for column in range(len(widths))]
    return [
        "  " + "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in rows
    ]  # fmt: skip


def counted(number: int, thing: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def workload_text(forward: dict[str, Any]) -> str:
    """What a forward was counted for, `1 row of 387 tokens: 128 of text, 1 image`."""
    work, images = forward["workload"], counted(forward["workload"]["images"], "image")
    if forward["of_pictures"]:
        return counted(work["batch"] * work["images"], "image")
    rows = f"{counted(work['batch'], 'row')} of {counted(forward['row_length'], 'token')}"
    return f"{rows}: {work['text_tokens']:,} of text, {images}"


def option_text(value: Any) -> str:
    """The value of an option; of a section only how many it has."""
    return counted(len(value), "option") if isinstance(value, Mapping) else "-" if value is None else str(value)


def _forward_lines(forward: dict[str, Any] | None) -> list[str]:
    if forward is None:
        return []
    if "problem" in forward:
        return ["", forward["problem"]]
    flops, cache = forward["flops"], forward["cache"]
    least = amount(flops["without_tower_attention"], "FLOPs")
    total = amount(flops["total"], "FLOPs")
    if flops["without_tower_attention"] != flops["total"]:
        total += f" all counted; {least} without the attention products of towers, which some profilers do not see"
    lines = ["", f"A forward of {workload_text(forward)}:", "", f"  {total}"]
    if flops["terms"]:
        shown = (f"{term['part']} {term['operator']} {term['share']:.0%}" for term in flops["terms"][:5])
        lines.append(f"  most of it: {', '.join(shown)}")
    if cache is not None:
        kept = f", and {amount(cache['per_image'], 'B')} per image" if cache["per_image"] else ""
        lines.append(f"  cache: {amount(cache['per_token'], 'B')} per token{kept}, in {cache['dtype']}")
    return [*lines, *textwrap.wrap(f"how it is counted: {flops['rule']}", 110, initial_indent="  ",
                                   subsequent_indent="    ")]  # fmt: skip


def comparison_lines(difference: dict[str, Any], names: Sequence[str]) -> list[str]:
    """What `compare` returned as lines for people; `names` are what the two are called."""
    first, second = names
    lines = [f"{first}: {difference['models'][0]}", f"{second}: {difference['models'][1]}", ""]
    rows = [["", "first", "second", "difference"]]
    rows += [[name, *pair_text(pair, name.startswith("FLOPs"))] for name, pair in difference["totals"].items()]
    lines += _aligned(rows)
    for kind, mixins in difference["mixins"].items():
        if mixins:
            lines += ["", f"mixins {kind}: {', '.join(mixins)}"]
    if difference["parts"]:
        rows = [["part", "parameters", "", "difference", "FLOPs", "", "difference"]]
        rows += [
            [row["part"], *pair_text(row["parameters"]), *pair_text(row["flops"], True)] for row in difference["parts"]
        ]
        lines += ["", *_aligned(rows)]
    if difference["config"]:
        rows = [[name, f"{option_text(a)} -> {option_text(b)}"] for name, (a, b) in difference["config"].items()]
        lines += ["", *_aligned(rows)]
    if difference["hooks"]:
        rows = [
            [place_text(row), where_text(row["layers"]), f"{row['first'] or '-'}  ->  {row['second'] or '-'}"]
            for row in difference["hooks"]
        ]
        lines += ["", *_aligned(rows)]
    if not (difference["parts"] or difference["config"] or difference["hooks"] or any(difference["mixins"].values())):
        lines += ["", "They do not differ."]
    return lines


def place_text(change: dict[str, Any]) -> str:
    """A hook that differs, with the path of the nested model that it is in."""
    return f"{change['path']}/{change['hook']}" if change["path"] else str(change["hook"])


def where_text(layers: Sequence[int]) -> str:
    """`layers 0-3, 8`, or `model` where there are none."""
    return shown_layers(layers, -1)


def pair_text(pair: Sequence[int | None], short: bool = False) -> list[str]:
    """Two numbers and their difference, in full or with a prefix; `-` for what is not there."""

    def shown(number: int) -> str:
        return amount(number) if short else f"{number:,}"

    first, second = pair
    if first is None or second is None:
        return ["-" if value is None else shown(value) for value in pair] + ["-"]
    change = second - first
    sign = "" if not change else "+" if change > 0 else "-"
    return [shown(first), shown(second), sign + shown(abs(change))]


def plan_lines(plan: Plan) -> list[str]:
    """A plan as lines for people."""
    lines = [f"{plan.model}: {plan.parameters:,} parameters, most of them {plan.dtype}", ""]
    known = [purpose for purpose in plan.purposes if purpose.problem is None]
    lines += ["Peaks of each device:" if any(p.setup.devices > 1 for p in known) else "Peaks:", ""]
    for first in range(0, len(known), _COLUMNS):
        lines += [*_use_lines(known[first : first + _COLUMNS], plan.memory), ""]
    lines += [f"  {purpose.name}: {_sizes(purpose)}" for purpose in known if purpose.name != "loading"]
    for purpose in plan.purposes:
        if purpose.problem is not None:
            lines += ["", *textwrap.wrap(f"{purpose.name} cannot be planned: {purpose.problem}", 110,
                                         initial_indent="  ", subsequent_indent="    ")]  # fmt: skip
    if any(purpose.setup.devices > 1 or _takes_devices(purpose) for purpose in plan.purposes):
        lines += ["", "  Of several devices each process reads all weights into its own memory before they are shared."]
    quantised = any("quantise" in remedy.setting for purpose in known for way in purpose.remedies for remedy in way)
    if quantised and not can_quantise():
        lines += ["", f"  Quantising needs torchao, which is not installed: {INSTALL}."]
    for purpose in known:
        for number, way in enumerate(purpose.remedies):
            start = "or" if number else f"What would make {purpose.name} fit, one after the other"
            lines += ["", f"{start}:", *_aligned([_remedy(remedy) for remedy in way])]
        if purpose.fits is False and not any(way and way[-1].fits for way in purpose.remedies):
            lines += ["", f"No change that is known here makes {purpose.name} fit."]
    return lines


def _use_lines(purposes: Sequence[Any], memory: int | None) -> list[str]:
    """A column of sizes for each purpose."""
    parts = list(dict.fromkeys(part for purpose in purposes for part in purpose.use.parts))
    rows = [["", *(purpose.name for purpose in purposes)]]
    rows += [[part, *(_size(purpose.use.parts.get(part, 0)) for purpose in purposes)] for part in parts]
    rows.append(["at the peak", *(_size(purpose.use.total) for purpose in purposes)])
    if memory is not None:
        rows.append([f"into {_size(memory)}", *("fits" if purpose.fits else "too much" for purpose in purposes)])
    width = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        f"  {row[0]:<{width[0]}}  " + "  ".join(f"{text:>{width[n]}}" for n, text in enumerate(row[1:], start=1))
        for row in rows
    ]


def _takes_devices(purpose: Any) -> bool:
    return any("devices" in remedy.change for way in purpose.remedies for remedy in way)


def _sizes(purpose: Any) -> str:
    setup = purpose.setup
    devices = f", {setup.devices} devices" if setup.devices > 1 and purpose.name.startswith("training") else ""
    images = f"{counted(setup.images, 'image')} among them"
    return f"{counted(setup.batch, 'row')} of {setup.context:,} tokens, {images}{devices}"


def _remedy(remedy: Remedy) -> list[str]:
    return [remedy.change, _size(remedy.total), "fits" if remedy.fits else "too much", f"({remedy.setting})"]


def _size(number: int) -> str:
    return amount(number, "B") if number else "-"
