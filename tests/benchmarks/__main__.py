"""Command line of the benchmarks."""

from __future__ import annotations

import argparse
import gc
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import experts, gpu, language, loading, serving, training  # noqa: F401
from .harness import CASES, Options, run_case
from .report import NOTES, machine, markdown


def main(arguments: Sequence[str] | None = None) -> int:
    """Run cases, write results; 1 if a case failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="Time mixformer beside its peers.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"cases to run (default: all): {', '.join(CASES)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write results here")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the page here, such as docs/benchmarks.md")
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="run nothing; take the results of this file")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2); tiny always has one")
    parser.add_argument("--rounds", type=int, help="samples of each competitor, instead of each case's own number")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and 2 rounds: a smoke run, no measurement")
    parser.add_argument("--profile", action="store_true", help="also say in which operators the time goes")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.names if name not in CASES]
    if unknown:
        parser.error(f"there is no case '{unknown[0]}'; the cases are {', '.join(CASES)}")
    if given.from_json is not None:
        results = json.loads(given.from_json.read_text(encoding="utf-8"))
    else:
        options = Options(given.threads, given.rounds, given.quick, given.profile)
        results = run(given.names or list(CASES), options, given.json)
    page = markdown(results, NOTES.read_text(encoding="utf-8") if NOTES.exists() else "")
    if given.markdown is not None:
        given.markdown.write_text(page, encoding="utf-8")
    return int(any("failed" in found for found in results["cases"].values()))


def run(names: list[str], options: Options, file: Path | None) -> dict[str, Any]:
    """Results of the cases; written after each one, so that a long run loses nothing."""
    results: dict[str, Any] = {"machine": machine(options.threads), "quick": options.quick, "cases": {}}
    for name in names:
        chosen = CASES[name]
        try:
            found = run_case(chosen, options, progress=True)
        except Exception as error:
            traceback.print_exc()
            found = {"title": chosen.title, "about": chosen.about, "failed": f"{type(error).__name__}: {error}"}
        results["cases"][name] = found
        print(summary_lines(name, found), flush=True)
        gc.collect()
        if file is not None:
            file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def summary_lines(name: str, found: dict[str, Any]) -> str:
    """A case in a few lines, for the terminal."""
    if "failed" in found:
        return f"{name}: FAILED - {found['failed']}"
    lines = []
    for group in found["groups"]:
        lines.append(f"{name}: {group['title']}")
        for competitor, one in group["competitors"].items():
            ratios = "  ".join(f"{ratio['median']:.3f} of {other}" for other, ratio in one["ratios"].items())
            lines.append(f"  {competitor:<28} {one['figures']['seconds']['median'] * 1e3:10.3f} ms  {ratios}")
        lines += [f"  no {competitor}: {reason}" for competitor, reason in group["skipped"].items()]
        for competitor, rows in group.get("profiles", {}).items():
            lines.append(f"  {competitor}, operators:")
            lines += [f"    {name:<44} {time:10.3f} ms  {count:5d} times" for name, time, count in rows]
    lines += [f"{name}: skipped - {found['skipped']}"] if "skipped" in found else []
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
