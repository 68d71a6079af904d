"""From results to docs/benchmarks.md, and what is known about the machine."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
NOTES = Path(__file__).with_name("notes.md")

INTRODUCTION = """\
# Benchmarks

Made by `python -m tests.benchmarks --json FILE --markdown docs/benchmarks.md`; not edited by hand. `pip install -e
".[bench]"` brings transformers to compare with; `--profile` also says in which operators the time goes.

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
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", "mixformer", "models", "tests/benchmarks")
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


def markdown(results: dict[str, Any], notes: str = "") -> str:
    """The page for one run's results, with hand-written notes behind the tables."""
    rows = [f"| {key} | {value} |" for key, value in results["machine"].items()]
    parts = [INTRODUCTION, "## Machine\n", "\n".join(["| | |", "|---|---|", *rows]) + "\n"]
    for name, case in results["cases"].items():
        parts.append(f"## {case['title']} (`{name}`)\n")
        threads = case.get("threads", results["machine"]["threads"])
        about = case.get("about", "")
        if threads != results["machine"]["threads"]:
            about = f"{about} Threads: {threads}."
        parts.append(f"{about}\n")
        if "failed" in case:
            parts.append(f"**Failed:** {case['failed']}\n")
        for group in case.get("groups", []):
            parts.append(_group(group))
        if "skipped" in case:
            parts.append(f"**Skipped:** {case['skipped']}.\n")
    if notes.strip():
        parts.append(notes.strip() + "\n")
    return "\n".join(parts)


def _group(group: dict[str, Any]) -> str:
    competitors = group["competitors"]
    extra = list(dict.fromkeys(
        figure for found in competitors.values() for figure in found["figures"] if figure != "seconds"
    ))
    heads = ["", "time", *(f"over {baseline}" for baseline in group["baselines"]), *extra]
    lines = [f"### {group['title'][0].upper()}{group['title'][1:]}\n", _row(heads), "|---" * len(heads) + "|"]
    for name, found in competitors.items():
        shown = name if found["kind"] == "compared" else f"{name} (*{found['kind']}*)"
        ratios = [_ratio(found["ratios"].get(baseline)) for baseline in group["baselines"]]
        others = [_plain(found["figures"].get(figure)) for figure in extra]
        lines.append(_row([shown, _time(found["figures"]["seconds"]), *ratios, *others]))
    said = [f"{group['rounds']} rounds" + (f" of {group['calls']} calls" if group["calls"] > 1 else "")]
    if sum(found["kind"] == "compared" for found in competitors.values()) > 1:
        said.append(f"outputs differ by at most {group['largest_difference']:.0e} (allowed {group['tolerance']:.0e})")
    said += [f"{name}: {value:.4g}" for name, value in group["facts"].items()]
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
    return "" if found is None else f"{found['median']:.4g}"
