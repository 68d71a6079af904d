"""Command line of the benchmarks."""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import chunked_loss, experts, gpu, language, loading, serving, training  # noqa: F401
from .harness import CASES, Options, run_case
from .report import NOTES, load, machine, markdown, save


def main(arguments: Sequence[str] | None = None) -> int:
    """Run cases, write results; 1 if a case failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="Time mixformer beside its peers.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"cases to run (default: all): {', '.join(CASES)}")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write results here; those of other cases that are in it stay"
    )
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the page here, such as docs/benchmarks.md: all of --json"
    )
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="run nothing; take the results of this file")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2); tiny always has one")
    parser.add_argument("--rounds", type=int, help="samples of each competitor, instead of each case's own number")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and 2 rounds: a smoke run, no measurement")
    parser.add_argument("--profile", action="store_true", help="also say in which operators the time goes")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.names if name not in CASES]
    if unknown:
        parser.error(f"there is no case '{unknown[0]}'; the cases are {', '.join(CASES)}")
    try:
        before = load(given.from_json)["cases"] if given.from_json is not None else stored(given.json, given.quick)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if given.from_json is not None:
        results, failed = {"cases": before}, any("failed" in found for found in before.values())
    else:
        options = Options(given.threads, given.rounds, given.quick, given.profile)
        results, failed = run(given.names or list(CASES), options, given.json, before)
    page = markdown(results, NOTES.read_text(encoding="utf-8") if NOTES.exists() else "")
    if given.markdown is not None:
        given.markdown.write_text(page, encoding="utf-8")
    return int(failed)


def stored(file: Path | None, quick: bool) -> dict[str, Any]:
    """What was measured before and stays, by case.

    Raises:
        ValueError: the file holds something else, or quick runs beside measurements would be in it.
    """
    if file is None or not file.exists():
        return {}
    cases: dict[str, Any] = load(file)["cases"]
    for name, found in cases.items():
        if found.get("quick", False) != quick:
            held, given = ("measurements", "a quick run, which measures nothing")[:: 1 if quick else -1]
            raise ValueError(f"{file} holds {held} ('{name}'), and this is for {given}: write to another file.")
    return cases


def run(
    names: list[str], options: Options, file: Path | None, before: dict[str, Any] | None = None
) -> tuple[dict[str, Any], bool]:
    """Results of the cases among those of other cases from before, and whether one of them failed.

    They are written after each case, so that a long run loses nothing. What cannot run here leaves what was measured
    before, perhaps elsewhere.
    """
    here = machine(options.threads)
    known, failed = dict(before or {}), False
    results: dict[str, Any] = {"cases": known}
    for name in names:
        chosen, start = CASES[name], time.perf_counter()
        try:
            found = run_case(chosen, options, progress=True)
        except Exception as error:
            traceback.print_exc()
            found = {"title": chosen.title, "about": chosen.about, "failed": f"{type(error).__name__}: {error}"}
            failed = True
        found |= {"took": time.perf_counter() - start, "machine": here, "quick": options.quick}
        print(summary_lines(name, found), flush=True)
        gc.collect()
        if found.get("skipped") and not found["groups"] and known.get(name, {}).get("groups"):
            print(f"{name}: what was measured on {known[name]['machine']['date']} stays", flush=True)
            continue
        known[name] = found
        results["cases"] = {each: known[each] for each in (*CASES, *known) if each in known}
        if file is not None:
            save(results, file)
    return results, failed


def summary_lines(name: str, found: dict[str, Any]) -> str:
    """A case in a few lines, for the terminal."""
    if "failed" in found:
        return f"{name}: FAILED - {found['failed']}"
    lines = []
    for group in found["groups"]:
        lines.append(f"{name}: {group['title']}")
        for competitor, one in group["competitors"].items():
            ratios = "  ".join(f"{ratio['median']:.3f} of {other}" for other, ratio in one["ratios"].items())
            figures = "  ".join(
                f"{found['median']:.5g} {figure}" for figure, found in one["figures"].items() if figure != "seconds"
            )
            time_taken = one["figures"]["seconds"]["median"] * 1e3
            lines.append(f"  {competitor:<28} {time_taken:10.3f} ms  {ratios}  {figures}".rstrip())
        lines += [f"  no {competitor}: {reason}" for competitor, reason in group["skipped"].items()]
        for competitor, rows in group.get("profiles", {}).items():
            lines.append(f"  {competitor}, operators:")
            lines += [f"    {name:<44} {time:10.3f} ms  {count:5d} times" for name, time, count in rows]
    lines += [f"{name}: skipped - {found['skipped']}"] if "skipped" in found else []
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
