"""One page, without any outside resource, that shows what a model is made of, or how two differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from mixformer.accounting.flops import ATTENTION
from mixformer.accounting.hook_grid import DEFAULT
from mixformer.accounting.parameters import TRANSFORMER, Part
from mixformer.accounting.text import amount, counted, option_text, pair_text, place_text, where_text, workload_text

Summary = dict[str, Any]
_PALETTE = (
    "#4e79a7", "#e08a2e", "#59a14f", "#b07aa1", "#d9565b", "#57a5a0", "#d8b13a", "#9c755f", "#e388a0", "#7fae3f",
    "#6b6ecf", "#a05d56",
)  # fmt: skip
_BACKBONE, _NOBODY = "#8792a2", "var(--nobody)"
_FLOPS = "FLOPs of a forward"
_STYLE = """
:root { color-scheme: light dark; --ink: #1d2530; --soft: #5a6575; --line: #dde2e8; --back: #f5f6f8; --paper: #fff;
  --nobody: #e3e7ec; --foot: #c3cad3; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --soft: #9aa5b4; --line: #363e49; --back: #14181d; --paper: #1d2229; --nobody: #303843;
    --foot: #56606d; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 28px 24px 48px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 12px; }
h3 { font-size: 15px; margin: 22px 0 8px; }
p { margin: 0 0 10px; max-width: 85ch; }
code, .mono { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 12.5px; }
.soft { color: var(--soft); }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px;
  margin-top: 18px; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 18px; }
.fact { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; }
.fact b { display: block; font-size: 21px; line-height: 1.25; font-weight: 650; font-variant-numeric: tabular-nums; }
.fact span { color: var(--soft); font-size: 13px; }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 0 18px; }
.two > * { min-width: 0; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 18px; margin: 0 0 14px; padding: 0; list-style: none;
  font-size: 13.5px; }
.legend i, .chip { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px;
  vertical-align: -1px; }
.grid { display: grid; grid-template-columns: minmax(130px, 16rem) minmax(0, 1fr) minmax(0, 17rem); gap: 3px 12px;
  align-items: center; }
.grid .hook { overflow-wrap: anywhere; line-height: 1.25; }
.grid .chain { color: var(--soft); font-size: 12.5px; line-height: 1.25; overflow-wrap: anywhere; }
.cells { display: flex; gap: 1px; height: 20px; }
.cells i { flex: 1 1 0; min-width: 0; border-radius: 2px; }
.cells i:hover { outline: 2px solid var(--ink); outline-offset: -1px; }
.cells i.changed { outline: 2px solid var(--ink); outline-offset: -2px; }
.ticks { display: flex; height: 16px; font-size: 11px; color: var(--soft); font-variant-numeric: tabular-nums; }
.ticks span { flex: 1 1 0; min-width: 0; text-align: center; overflow: visible; white-space: nowrap; }
.bars { display: grid; grid-template-columns: minmax(110px, max-content) minmax(60px, 1fr) max-content; gap: 5px 12px;
  align-items: center; font-size: 13.5px; }
.bars .label { overflow-wrap: anywhere; line-height: 1.25; }
.track { display: flex; flex-direction: column; gap: 2px; }
.bar { display: flex; height: 15px; min-width: 1px; }
.bar i { height: 100%; }
.bar i:last-child { border-radius: 0 3px 3px 0; }
.bar.before { height: 8px; opacity: .5; }
.bar.after { height: 10px; }
.bars .value { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; line-height: 1.25; }
.bars .value small { color: var(--soft); margin-left: 6px; display: inline-block; min-width: 3.2em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; width: 100%; }
th { text-align: left; color: var(--soft); font-weight: 600; }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
td:first-child code { white-space: nowrap; }
tr.total td { font-weight: 650; }
details { margin-top: 10px; color: var(--soft); font-size: 13.5px; }
summary { cursor: pointer; margin-bottom: 8px; overflow-wrap: anywhere; }
.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.text { overflow-wrap: anywhere; }
@media (max-width: 1080px) {
  .grid { grid-template-columns: minmax(7rem, 13.5rem) minmax(0, 2.2fr); }
  .grid .chain { display: none; }
}
@media (max-width: 900px) {
  main { padding: 18px 14px 32px; }
  .two { grid-template-columns: minmax(0, 1fr); }
}
"""


def page(summaries: Sequence[Summary], names: Sequence[str], difference: dict[str, Any] | None = None) -> str:
    """A page about one model, or about two and their difference.

    Args:
        summaries: one or two of what `describe` returned.
        names: what they are called.
        difference: what `compare` returned, for two.
    """
    colours = _colours(summaries)
    if difference is None:
        title, body = summaries[0]["model"], _one(summaries[0], names[0], colours)
    else:
        title = f"{names[0]} and {names[1]}"
        body = _two(summaries, names, difference, colours)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _colours(summaries: Iterable[Summary]) -> dict[str, str]:
    """A colour for each name of a mixin, the same in all models of a page."""
    names: dict[str, None] = {}
    for summary in summaries:
        for each in (summary, *summary["nested"].values()):
            names.update(dict.fromkeys(each["mixins"]))
    colours = {TRANSFORMER: _BACKBONE, DEFAULT: _NOBODY}
    for number, name in enumerate(names):
        colours[name] = _PALETTE[number] if number < len(_PALETTE) else f"hsl({number * 137 % 360} 42% 52%)"
    return colours


def _one(summary: Summary, name: str, colours: dict[str, str]) -> str:
    parts = [
        f'<h1>{escape(summary["model"])}</h1><p class="soft"><code>{escape(name)}</code>, '
        f'{counted(summary["num_layers"], "layer")}</p>',
        _facts(summary),
        _section("Who owns what", _grid_note(), *_grids(summary, colours, {})),
        f'<div class="two">{_section("Parameters", _parameter_bars([summary], colours), _stages(summary))}'
        f"{_operations_section([summary], colours)}</div>",
        _section("All parts", _part_table(summary), *(
            f"<h3>{escape(path)} &nbsp;<span class='soft'>{escape(inner['model'])}</span></h3>{_part_table(inner)}"
            for path, inner in summary["nested"].items()
        )),
    ]
    return "\n".join(parts)  # fmt: skip


def _two(
    summaries: Sequence[Summary], names: Sequence[str], difference: dict[str, Any], colours: dict[str, str]
) -> str:
    changed = {
        (row["path"], row["hook"], layer) for row in difference["hooks"] for layer in (row["layers"] or [None])
    }
    heads = "".join(
        f'<p><b>{which}</b> &nbsp;{escape(summary["model"])} <span class="soft mono">{escape(name)}</span></p>'
        for which, name, summary in zip(("First", "Second"), names, summaries, strict=True)
    )
    changes = "".join(
        f"<p><b>Mixins {kind}</b> &nbsp;<code>{escape(', '.join(mixins))}</code></p>"
        for kind, mixins in difference["mixins"].items() if mixins
    )
    parts = [f"<h1>How two models differ</h1>{heads}", _section("In short", changes + _total_table(difference))]
    legend = '<p class="soft">Faded bars are the first model, full ones the second.</p>'
    parts.append(
        f'<div class="two">{_section("Parameters", legend, _parameter_bars(summaries, colours))}'
        f"{_operations_section(summaries, colours)}</div>"
    )
    if difference["config"]:
        rows = [[_mono(name), *map(_mono, map(option_text, pair))] for name, pair in difference["config"].items()]
        parts.append(_section("Options that differ", _table(["option", "first", "second"], rows)))
    if difference["hooks"]:
        rows = [
            [_mono(place_text(row)), escape(where_text(row["layers"])), _mono(row["first"] or "-"),
             _mono(row["second"] or "-")]
            for row in difference["hooks"]
        ]
        parts.append(_section("Hooks that differ", _table(["hook", "where", "first", "second"], rows)))
    marks = dict.fromkeys(changed, "changed")
    for which, summary, known in zip(("First", "Second"), summaries, ({}, summaries[0]["nested"]), strict=True):
        grids = _grids(summary, colours, marks, known)
        parts.append(_section(f"{which}: who owns what", _grid_note(bool(changed)), *grids))
    return "\n".join(parts)  # fmt: skip


# ---------------------------------------------------------------- figures in short


def _facts(summary: Summary) -> str:
    forward = summary["forward"]
    facts = [
        (amount(summary["parameters"]), "parameters", f"{summary['parameters']:,}"),
        (amount(summary["trainable"]), "trainable", f"{summary['trainable']:,}"),
    ]
    facts += [(amount(size, "B"), f"in {dtype}", f"{size:,} bytes") for dtype, size in summary["bytes"].items()]
    if "flops" in forward:
        facts.append((amount(forward["flops"]["total"]), "FLOPs a forward", f"{forward['flops']['total']:,}"))
        cache = forward["cache"]
        if cache:
            facts.append((amount(cache["per_token"], "B"), "of cache a token", f"{cache['per_token']:,} bytes"))
            if cache["per_image"]:
                facts.append((amount(cache["per_image"], "B"), "of cache an image", f"{cache['per_image']:,} bytes"))
    return '<div class="facts">' + "".join(
        f'<div class="fact" title="{escape(exact)}"><b>{escape(value)}</b><span>{escape(label)}</span></div>'
        for value, label, exact in facts
    ) + "</div>"  # fmt: skip


def _stages(summary: Summary) -> str:
    if not summary["stages"]:
        return ""
    rows = [[escape(name), f"{number:,}"] for name, number in summary["stages"].items()]
    return "<h3>What the stages of the class train</h3>" + _table(["stage", "parameters"], rows, {1})


# ---------------------------------------------------------------- hooks


def _grid_note(changed: bool = False) -> str:
    outlined = " Outlined cells differ." if changed else ""
    return (
        '<p class="soft">Each column is a layer, each row a hook. A full cell is taken over by its mixin; a cell with '
        f"a grey foot is the default with mixins around it, the outermost on top.{outlined} Point at a cell to read "
        "its chain.</p>"
    )


def _grids(
    summary: Summary, colours: dict[str, str], marks: dict[Any, str], known: Mapping[str, Summary] | None = None
) -> list[str]:
    """The grid of a model and those of its nested models, without the nested ones that are `known` already."""
    found = [_grid(summary, "", colours, marks)]
    for path, inner in summary["nested"].items():
        other = (known or {}).get(path)
        if other is not None and all(other[kind] == inner[kind] for kind in ("model", "grid")):
            found.append(f'<h3>{escape(path)}</h3><p class="soft">As in the first.</p>')
        else:
            found.append(_grid(inner, path, colours, marks))
    return found


def _grid(summary: Summary, path: str, colours: dict[str, str], marks: dict[Any, str]) -> str:
    what = f"{escape(summary['model'])}, {counted(summary['num_layers'], 'layer')}"
    title = f"<h3>{escape(path)} &nbsp;<span class='soft'>{what}</span></h3>" if path else ""
    owners = {name for row in summary["grid"] for chain in row["chains"] for name in chain}
    legend = "".join(
        f'<li title="{entry["parameters"]:,} parameters"><i style="background:{colours[name]}"></i>{escape(name)} '
        f'<span class="soft">{escape(entry["class"])}{"" if name in owners else ", no hook"}</span></li>'
        for name, entry in summary["mixins"].items()
    )
    legend += f'<li><i style="background:{_NOBODY}"></i><span class="soft">the default</span></li>'
    rows: dict[bool, list[str]] = {True: [], False: []}
    folded, has_layers = [], {True: False, False: False}
    for row in summary["grid"]:
        layers = range(len(row["chains"])) if row["of_layers"] else [None]
        plain = all(chain == [DEFAULT] for chain in row["chains"])
        plain = plain and not any((path, row["hook"], layer) in marks for layer in layers)
        rows[plain].append(_grid_row(row, path, colours, marks))
        folded += [row["hook"]] if plain else []
        has_layers[plain] |= row["of_layers"]
    axis = '<div class="hook soft">layer</div>'
    ticks = {
        plain: f'{axis}{_ticks(summary["num_layers"])}<div class="chain"></div>' if there else ""
        for plain, there in has_layers.items()
    }
    rest = (
        f"<details><summary>{counted(len(folded), 'hook')} by default everywhere: {escape(', '.join(folded))}</summary>"
        f'<div class="grid">{"".join(rows[True])}{ticks[True]}</div></details>' if folded else ""
    )
    return f'{title}<ul class="legend">{legend}</ul><div class="grid">{"".join(rows[False])}{ticks[False]}</div>{rest}'


def _grid_row(row: dict[str, Any], path: str, colours: dict[str, str], marks: dict[Any, str]) -> str:
    cells, chains = [], dict.fromkeys(" <- ".join(chain) for chain in row["chains"] if chain)
    for index, chain in enumerate(row["chains"]):
        layer = index if row["of_layers"] else None
        mark = marks.get((path, row["hook"], layer), "")
        where = f"layer {index}" if row["of_layers"] else "once per forward"
        text = f"{row['hook']}, {where}: {' <- '.join(chain) or 'no such site'}"
        marked = f' class="{mark}"' if mark else ""
        cells.append(f'<i{marked} style="background:{_fill(chain, colours)}" title="{escape(text)}"></i>')
    kind = " soft" if list(chains) == [DEFAULT] else ""
    name = escape(row["hook"]).replace("_", "_<wbr>")
    return (
        f'<div class="hook mono{kind}">{name}</div><div class="cells">{"".join(cells)}</div>'
        f'<div class="chain mono">{escape(" | ".join(chains))}</div>'
    )


def _fill(chain: Sequence[str], colours: dict[str, str]) -> str:
    """A cell's background: mixins from the top, outermost first, and a grey foot if the default runs below them."""
    if not chain:
        return "transparent"
    owners = [colours.get(name, _BACKBONE) for name in reversed(chain) if name != DEFAULT]
    if not owners:
        return _NOBODY
    end = 78 if chain[0] == DEFAULT else 100
    stops = [
        f"{colour} {end * number / len(owners):.0f}% {end * (number + 1) / len(owners):.0f}%"
        for number, colour in enumerate(owners)
    ]
    if end < 100:
        stops.append(f"var(--foot) {end}% 100%")
    return owners[0] if len(stops) == 1 else f"linear-gradient({','.join(stops)})"


def _ticks(num_layers: int) -> str:
    step = 1 if num_layers <= 12 else 4 if num_layers <= 40 else 8
    spans = (f"<span>{index if index % step == 0 else ''}</span>" for index in range(num_layers))
    return f'<div class="ticks" title="layer">{"".join(spans)}</div>'


# ---------------------------------------------------------------- bars


def _rows(summaries: Sequence[Summary]) -> list[tuple[Part, list[dict[str, Any]]]]:
    """Parts of one model or of two, with what each has of it."""
    found: dict[Part, list[dict[str, Any]]] = {}
    nothing: dict[str, Any] = {"parameters": 0, "flops": {}}
    for number, summary in enumerate(summaries):
        for row in summary["parts"]:
            part = Part(row["owner"], row["part"])
            found.setdefault(part, [nothing] * len(summaries))[number] = row
    return list(found.items())


def _parameter_bars(summaries: Sequence[Summary], colours: dict[str, str]) -> str:
    values = [
        (part, [{"parameters": row["parameters"]} for row in rows]) for part, rows in _rows(summaries)
        if any(row["parameters"] for row in rows)
    ]
    return _bars(values, [summary["parameters"] for summary in summaries], colours)


def _operations_section(summaries: Sequence[Summary], colours: dict[str, str]) -> str:
    problems = [each["forward"]["problem"] for each in summaries if "problem" in each["forward"]]
    if problems:
        return _section(_FLOPS, *(f"<p>{escape(problem)}</p>" for problem in problems))
    forwards = [summary["forward"] for summary in summaries]
    values = [
        (part, [row["flops"] for row in rows]) for part, rows in _rows(summaries) if any(row["flops"] for row in rows)
    ]
    lines = [
        f"<p><b>{amount(forward['flops']['total'])}</b> for {workload_text(forward)}.{_without_towers(forward)}</p>"
        for forward in forwards
    ]
    largest = ", ".join(
        f"{escape(term['part'])} {term['operator']} {term['share']:.0%}" for term in forwards[-1]["flops"]["terms"][:4]
    )
    which = "Most of it" if len(forwards) == 1 else "Most of the second"
    most = f"<p><b>{which}:</b> {largest}.</p>" if largest else ""
    rule = f'<p class="soft">{escape(forwards[0]["flops"]["rule"])} Hatched: products of attention.</p>'
    bars = _bars(values, [forward["flops"]["total"] for forward in forwards], colours)
    return _section(_FLOPS, *lines, most, bars, f"<h3>How it is counted</h3>{rule}")


def _without_towers(forward: dict[str, Any]) -> str:
    without = forward["flops"]["without_tower_attention"]
    if without == forward["flops"]["total"]:
        return ""
    return f" Without the attention products of towers, which some profilers do not see: <b>{amount(without)}</b>."


def _bars(
    values: Sequence[tuple[Part, Sequence[dict[str, int]]]], totals: Sequence[int], colours: dict[str, str]
) -> str:
    """A bar for each part, two where there are two models; their kinds of operators one behind the other."""
    most = max((sum(kinds.values()) for _, all_kinds in values for kinds in all_kinds), default=0) or 1
    rows = []
    for part, all_kinds in values:
        colour, bars = colours.get(part.owner, _BACKBONE), []
        for number, kinds in enumerate(all_kinds):
            size = "" if len(all_kinds) == 1 else ("before", "after")[number]
            pieces = "".join(
                f'<i style="width:{100 * count / (sum(kinds.values()) or 1):.2f}%;background:{_pattern(kind, colour)}" '
                f'title="{escape(f"{part} {kind}: {count:,}")}"></i>'
                for kind, count in kinds.items()
            )
            width = 100 * sum(kinds.values()) / most
            bars.append(f'<div class="bar {size}" style="width:{width:.2f}%">{pieces}</div>')
        label = f'<span class="chip" style="background:{colour}"></span>{escape(str(part))}'
        rows.append(
            f'<div class="label">{label}</div><div class="track">{"".join(bars)}</div>'
            f'<div class="value">{_bar_value([sum(kinds.values()) for kinds in all_kinds], totals)}</div>'
        )
    return f'<div class="bars">{"".join(rows)}</div>'


def _bar_value(sums: Sequence[int], totals: Sequence[int]) -> str:
    if len(sums) == 1:
        share = sums[0] / (totals[0] or 1)
        return f"{amount(sums[0])}<small>{share:.1%}</small>"
    return amount(sums[0]) if sums[0] == sums[1] else f"{amount(sums[0])} &rarr; {amount(sums[1])}"


def _pattern(kind: str, colour: str) -> str:
    if kind != ATTENTION:
        return colour
    return f"repeating-linear-gradient(135deg,{colour} 0 4px,color-mix(in srgb,{colour} 45%,var(--paper)) 4px 7px)"


# ---------------------------------------------------------------- tables


def _part_table(summary: Summary) -> str:
    rows = []
    for row in summary["parts"]:
        sizes = ", ".join(f"{amount(size, 'B')} {dtype}" for dtype, size in row["bytes"].items())
        operations = sum(row["flops"].values())
        rows.append([
            _mono(str(Part(row["owner"], row["part"]))), f"{row['parameters']:,}", f"{row['trainable']:,}",
            escape(sizes or "-"), amount(operations) if operations else "-",
        ])  # fmt: skip
    sizes = ", ".join(f"{amount(size, 'B')} {dtype}" for dtype, size in summary["bytes"].items())
    operations = sum(sum(row["flops"].values()) for row in summary["parts"])
    total = [f"{summary['parameters']:,}", f"{summary['trainable']:,}", escape(sizes), amount(operations) or "-"]
    rows.append(["total", *total])
    table = _table(["part", "parameters", "trainable", "bytes", "FLOPs"], rows, {1, 2, 3, 4})
    head, _, last = table.rpartition("<tr>")
    return f'{head}<tr class="total">{last}'


def _total_table(difference: dict[str, Any]) -> str:
    rows = [
        [escape(name), *pair_text(pair, name.startswith("FLOPs"))] for name, pair in difference["totals"].items()
    ]
    return _table(["", "first", "second", "difference"], rows, {1, 2, 3})


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], numeric: Iterable[int] = ()) -> str:
    """A table of cells that are HTML already; numeric columns go to the right."""
    kinds = ["num" if column in set(numeric) else "text" for column in range(len(heads))]
    head = "".join(f'<th class="{kind}">{escape(text)}</th>' for kind, text in zip(kinds, heads, strict=True))
    body = "".join(
        "<tr>" + "".join(f'<td class="{kind}">{cell}</td>' for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _section(title: str, *content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(content)}</section>"


def _mono(text: str) -> str:
    return f"<code>{escape(text)}</code>"
