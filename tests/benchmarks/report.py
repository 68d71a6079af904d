"""From results to docs/benchmarks.md, and what is known about the machine."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
NOTES = Path(__file__).with_name("notes.md")
_OF_RUN = ("date", "commit")

INTRODUCTION = """\
# Benchmarks

Made by `python -m tests.benchmarks --json tests/benchmarks/results.json --markdown docs/benchmarks.md`; not edited by
hand. With names of cases in front, only those are measured again, and the others keep what was measured before: every
case says when, and at which commit. `pip install -e ".[bench]"` brings transformers to compare with; `--profile` also
says in which operators the time goes.

Every comparison runs in one process, unless said otherwise. Before any clock runs, the outputs of the competitors are
compared: tokens must be equal, numbers within the tolerance given, gradients too where there are any. A group in
which they differ is not timed. Then the competitors take turns, in an order that changes every round, so that each
takes every place and follows each other one equally often. Times are medians, with quartiles in brackets. A ratio is
the median of the ratios within each round, with its quartiles, so that slow changes of the machine cancel out; below
1 is faster than the column's baseline. Everything but some `gpu_` cases is in fp32 and, except for training, under
`torch.no_grad()`. Unless said otherwise the language model has hidden size 512, 8 layers, 8 heads, inner size 1376 and
a vocabulary of 8000, with random weights.

- **floor**: a LLaMA written by hand as a yardstick, in [floor.py](../tests/benchmarks/floor.py): a fused projection
  for q, k and v, rotary tables made once, PyTorch's norm and attention, a preallocated cache, and no framework.
- **mixformer**: the same model composed out of mixins, as users run it.
- **HF**: `LlamaForCausalLM` of transformers with the same weights and PyTorch's attention.
- **SAT**: SwissArmyTransformer's LLaMA with the same weights, where `sat` can be imported. Its rotary positions need
  Triton, so on a CPU a plain rotary stands in for them, and it computes the last token's logits only, as everyone
  here does.
- Cases named `gpu_` run on a GPU, in bf16 except for `gpu_waits`; they wait for it after a few calls and show rates
  beside the time, as fractions of what the same process measured for a plain copy or a square matrix product.
- Further figures stand behind the time, some with ratios of their own: above 1 is more than the baseline has, which is
  good for tokens per second and bad for memory.
- *information* marks what does not do the same work, such as matrix products alone; *derived* marks what is added up
  within each round out of parts timed apart.
"""


def machine(threads: int) -> dict[str, Any]:
    """Processor, versions, date and commit; nothing that names a host or a folder."""
    found = {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
    }
    for package in ("torch", "transformers", "SwissArmyTransformer"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    commit = _git("rev-parse", "--short", "HEAD")
    if commit:
        changed = _git(
            "status", "--porcelain", "--untracked-files=no", "--", "mixformer", "models", "tests/benchmarks/*.py"
        )
        found["commit"] = commit + (" and uncommitted changes" if changed else "")
    return found


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return (model or platform.processor() or platform.machine()) + (f" ({', '.join(known)})" if known else "")


def load(file: Path) -> dict[str, Any]:
    """Results that were written before.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        cases: dict[str, Any] = found["cases"]
        shared = {name: found[name] for name in ("machine", "quick") if name in found}  # once for all, in older files
        return {"cases": {name: {**shared, **case} for name, case in cases.items()}}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} holds no results of benchmarks ({type(error).__name__}: {error}).") from error


def save(results: dict[str, Any], file: Path) -> None:
    """Write results beside their place and move them there, so that a run that is stopped leaves what was there."""
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, file)


def markdown(results: dict[str, Any], notes: str = "") -> str:
    """The page for the results, with hand-written notes behind the tables."""
    cases = results["cases"]
    machines = [case["machine"] for case in cases.values()]
    alike = {
        key: value for key, value in (machines[0] if machines else {}).items()
        if key not in _OF_RUN and all(other.get(key) == value for other in machines)
    }
    rows = [f"| {key} | {value} |" for key, value in alike.items()]
    parts = [INTRODUCTION, "## Machine\n", "\n".join(["| | |", "|---|---|", *rows]) + "\n"]
    for name, case in cases.items():
        parts.append(f"## {case['title']} (`{name}`)\n")
        threads = case.get("threads", case["machine"]["threads"])
        about = case.get("about", "")
        if threads != case["machine"]["threads"]:
            about = f"{about} Threads: {threads}."
        parts.append(f"{about}\n")
        if "failed" in case:
            parts.append(f"**Failed:** {case['failed']}\n")
        for group in case.get("groups", []):
            parts.append(_group(group))
        if "skipped" in case:
            parts.append(f"**Skipped:** {case['skipped']}.\n")
        parts.append(_measured(case, alike))
    if notes.strip():
        parts.append(notes.strip() + "\n")
    return "\n".join(parts)


def _measured(case: dict[str, Any], alike: dict[str, Any]) -> str:
    """When and at which commit a case was run, and what of the machine is not as for all cases."""
    own = case["machine"]
    at = f" at commit {own['commit']}" if "commit" in own else ""
    took = f", in {case['took']:.0f} s" if "took" in case else ""
    others = [f"{key} {value}" for key, value in own.items() if key not in alike and key not in _OF_RUN]
    said = "; ".join([f"Run on {own['date']}{at}{took}", *others])
    quick = "**A quick run with tiny sizes: no measurement.** " if case.get("quick") else ""
    return f"{quick}*{said}.*\n"


def _group(group: dict[str, Any]) -> str:
    competitors = group["competitors"]
    baselines = group["baselines"]
    extra = list(dict.fromkeys(
        figure for found in competitors.values() for figure in found["figures"] if figure != "seconds"
    ))
    compared = {figure for found in competitors.values() for figure in found.get("ratios_of", {})}
    heads = ["", "time", *(f"over {baseline}" for baseline in baselines)]
    for figure in extra:
        heads += [figure, *(f"{figure} over {baseline}" for baseline in baselines if figure in compared)]
    lines = [f"### {group['title'][0].upper()}{group['title'][1:]}\n", _row(heads), "|---" * len(heads) + "|"]
    for name, found in competitors.items():
        shown = name if found["kind"] == "compared" else f"{name} (*{found['kind']}*)"
        cells = [shown, _time(found["figures"]["seconds"])]
        cells += [_ratio(found["ratios"].get(baseline)) for baseline in baselines]
        for figure in extra:
            cells.append(_plain(found["figures"].get(figure)))
            ratios = found.get("ratios_of", {}).get(figure, {})
            cells += [_ratio(ratios.get(baseline)) for baseline in baselines if figure in compared]
        lines.append(_row(cells))
    said = [f"{group['rounds']} rounds" + (f" of {group['calls']} calls" if group["calls"] > 1 else "")]
    if sum(found["kind"] == "compared" for found in competitors.values()) > 1:
        said.append(f"outputs differ by at most {group['largest_difference']:.0e} (allowed {group['tolerance']:.0e})")
    said += [f"{name}: {_number(value)}" for name, value in group["facts"].items()]
    said += [f"no {name}: {reason}" for name, reason in group["skipped"].items()]
    return "\n".join([*lines, "", "; ".join(said) + ".", ""])


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _time(found: dict[str, float]) -> str:
    units = (("s", 1.0), ("ms", 1e3))
    unit, scale = next((pair for pair in units if found["median"] * pair[1] >= 1), ("µs", 1e6))
    middle, low, high = (f"{found[key] * scale:.4g}" for key in ("median", "low", "high"))
    return f"{middle} {unit} [{low}, {high}]"


def _ratio(found: dict[str, float] | None) -> str:
    return "" if found is None else f"**{found['median']:.3f}** [{found['low']:.3f}, {found['high']:.3f}]"


def _plain(found: dict[str, float] | None) -> str:
    return "" if found is None else _number(found["median"])


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
