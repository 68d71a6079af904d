"""How cases are timed: one process, interleaved in changing order, outputs compared before any clock runs.

A case is a function that yields groups; a group is a set of competitors that do the same work::

    @case("prefill", "Prefill")
    def prefill(options: Options) -> Iterator[Group]:
        floor, ours = ...
        yield Group("512 tokens", {"floor": Run(lambda: floor(ids)), "ours": Run(lambda: ours(ids))})
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

Sample = dict[str, float]
SECONDS = "seconds"


@dataclass(frozen=True)
class Options:
    """How much to run.

    Attributes:
        threads: of torch, where a case does not set its own.
        rounds: for every group, instead of its own number.
        quick: tiny sizes and few rounds, to see that everything runs.
        profile: also say in which operators each competitor's time goes.
    """

    threads: int = 2
    rounds: int | None = None
    quick: bool = False
    profile: bool = False

    def pick(self, full: Any, quick: Any) -> Any:
        """`quick` in a quick run, `full` otherwise."""
        return quick if self.quick else full


@dataclass
class Run:
    """One competitor.

    Attributes:
        call: what is timed. Its result is compared with the baseline's.
        reset: called after each timed call, outside the clock.
        output: gives what is compared, if not the result of `call`.
        compared: False for what does not do the whole work and is shown as information.
        measured: `call` returns its own sample, `{"seconds": ..., other figures}`; for child processes.
        rates: {figure: amount in one call}; shown per second.
        once: further figures that need no clock, such as a peak of memory; taken once, before the clock.
    """

    call: Callable[[], Any]
    reset: Callable[[], Any] | None = None
    output: Callable[[], Any] | None = None
    compared: bool = True
    measured: bool = False
    rates: dict[str, float] = field(default_factory=dict)
    once: Callable[[], Sample] | None = None


@dataclass
class Group:
    """Competitors timed in the same rotation.

    Attributes:
        title: what is done, such as `context 64, eager`.
        runs: {name: competitor}.
        baselines: ratios are to these; outputs are compared with the first one's.
        derived: {name: times of one round -> time}, such as a floor made of parts timed apart.
        rounds: samples of each competitor.
        calls: calls in one sample, for what is near the resolution of the clock.
        warmup: untimed rounds.
        tolerance: largest difference of outputs, relative to the largest value of the baseline's.
        skipped: {competitor: why it is not there}.
        facts: further figures that do not come from a clock, such as bytes of weights.
        reference: whose output the others must equal; None for the first baseline.
        prepare: called between the comparison and the clock.
        ratios_of: figures whose ratios to the baselines are shown, beside those of the time.
    """

    title: str
    runs: dict[str, Run]
    baselines: tuple[str, ...] = ("floor",)
    derived: dict[str, Callable[[dict[str, float]], float]] = field(default_factory=dict)
    rounds: int = 15
    calls: int = 1
    warmup: int = 2
    tolerance: float = 1e-4
    skipped: dict[str, str] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)
    reference: str | None = None
    prepare: Callable[[], Any] | None = None
    ratios_of: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """A family of groups.

    Attributes:
        name: for the command line.
        title: for the table.
        about: one or two sentences for the table: what is done, on what.
        build: yields the groups.
        threads: instead of the command's.
    """

    name: str
    title: str
    about: str
    build: Callable[[Options], Iterator[Group]]
    threads: int | None = None


CASES: dict[str, Case] = {}


def case(name: str, title: str, threads: int | None = None) -> Callable[[Any], Any]:
    """Register the decorated function as a case; its docstring is shown above its table."""

    def register(build: Callable[[Options], Iterator[Group]]) -> Callable[[Options], Iterator[Group]]:
        assert name not in CASES, name
        CASES[name] = Case(name, title, " ".join((build.__doc__ or "").split()), build, threads)
        return build

    return register


class Skipped(Exception):
    """A case, or the rest of it, cannot run here; the message says why."""


class Unequal(AssertionError):
    """Competitors do not compute the same thing."""


def difference(found: Any, expected: Any) -> float:
    """Largest difference relative to the largest expected value; infinite for other shapes, keys or tokens."""
    if isinstance(expected, Mapping):
        if not isinstance(found, Mapping) or found.keys() != expected.keys():
            return float("inf")
        return max((difference(found[key], expected[key]) for key in expected), default=0.0)
    if isinstance(expected, list | tuple):
        if not isinstance(found, list | tuple) or len(found) != len(expected):
            return float("inf")
        return max((difference(x, y) for x, y in zip(found, expected, strict=True)), default=0.0)
    if not isinstance(expected, torch.Tensor):
        return 0.0 if found == expected else float("inf")
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape:
        return float("inf")
    if not expected.is_floating_point():
        return 0.0 if torch.equal(found, expected) else float("inf")
    if not expected.numel():
        return 0.0
    worst = (found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-12)
    return float(worst) if torch.isfinite(worst) else float("inf")


def require_equal(found: Any, expected: Any, tolerance: float, what: str) -> float:
    """Their difference, if it is within the tolerance.

    Raises:
        Unequal: it is not.
    """
    worst = difference(found, expected)
    if not worst <= tolerance:
        raise Unequal(
            f"{what}: the output differs from what it must equal by {worst:.1e} of the largest value; at most "
            f"{tolerance:.0e} is allowed. Nothing was timed."
        )
    return worst


def check_equal(group: Group) -> float:
    """Compare every competitor's output with that of the first baseline; returns the largest difference.

    Raises:
        Unequal: a difference is above the group's tolerance.
    """

    def output(run: Run) -> Any:
        result = (run.output or run.call)()
        if run.reset is not None:
            run.reset()
        return result

    compared = {name: run for name, run in group.runs.items() if run.compared}
    reference = group.reference or group.baselines[0]
    if len(compared) < 2:
        return 0.0
    expected, worst = output(compared[reference]), 0.0
    for name, run in compared.items():
        if name != reference:
            what = f"'{group.title}': '{name}'"
            worst = max(worst, require_equal(output(run), expected, group.tolerance, what))
    return worst


def orders(count: int, rounds: int) -> list[list[int]]:
    """Who goes first: a Williams design, in which everyone takes each place and follows each other one equally often.

    Args:
        count: competitors.
        rounds: how many orders; they repeat after `count` (or twice that, if it is odd).
    """
    zigzag = [(step // 2 + 1) if step % 2 else (count - step // 2) % count for step in range(count)]
    rows = [[(place + shift) % count for place in zigzag] for shift in range(count)]
    if count % 2:
        rows = [order for row in rows for order in (row, row[::-1])]
    return [rows[index % len(rows)] for index in range(rounds)]


def sample(run: Run, calls: int, clock: Callable[[], float]) -> Sample:
    """Time one competitor once."""
    total = 0.0
    if run.measured:
        return dict(run.call())
    if run.reset is None:
        start = clock()
        for _ in range(calls):
            run.call()
        total = clock() - start
    else:
        for _ in range(calls):
            start = clock()
            run.call()
            total += clock() - start
            run.reset()
    return {SECONDS: total / calls, **{figure: amount * calls / total for figure, amount in run.rates.items()}}


def measure(
    group: Group, options: Options, clock: Callable[[], float] = time.perf_counter, progress: str | None = None
) -> dict[str, list[Sample]]:
    """{competitor: its sample of each round}; `progress` is the label of a progress bar."""
    names = list(group.runs)
    rounds = options.rounds or options.pick(group.rounds, 2)
    warmup = options.pick(group.warmup, 0)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    was_enabled = gc.isenabled()
    bar = tqdm(total=rounds, desc=progress, disable=progress is None, leave=False)
    gc.collect()
    gc.freeze()
    try:
        for number, order in enumerate(orders(len(names), warmup + rounds)):
            gc.collect()
            gc.disable()
            for index in order:
                found = sample(group.runs[names[index]], options.pick(group.calls, 1), clock)
                if number >= warmup:
                    samples[names[index]].append(found)
            gc.enable()
            bar.update(number >= warmup)
    finally:
        gc.unfreeze()
        (gc.enable if was_enabled else gc.disable)()
        bar.close()
    for name, from_round in group.derived.items():
        samples[name] = [
            {SECONDS: from_round({other: samples[other][index][SECONDS] for other in names})}
            for index in range(rounds)
        ]
    return samples


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "low": low, "high": high}


def ratios(
    figure: str, name: str, samples: dict[str, list[Sample]], baselines: Sequence[str]
) -> dict[str, dict[str, float]]:
    """{baseline: spread of the ratios of one competitor's figure to it, round by round}, where both have it."""
    own = samples[name]
    return {
        baseline: spread([one[figure] / other[figure] for one, other in zip(own, samples[baseline], strict=True)])
        for baseline in baselines
        if baseline != name and figure in own[0] and figure in samples.get(baseline, [{}])[0]
    }


def summary(group: Group, samples: dict[str, list[Sample]]) -> dict[str, Any]:
    """What is written about each competitor: spread of its figures, and of its per-round ratios to each baseline."""
    competitors: dict[str, Any] = {}
    for name, found in samples.items():
        run = group.runs.get(name)
        kind = "derived" if run is None else "compared" if run.compared else "information"
        figures = {figure: spread([one[figure] for one in found]) for figure in found[0]}
        over = {figure: ratios(figure, name, samples, group.baselines) for figure in (SECONDS, *group.ratios_of)}
        competitors[name] = {"kind": kind, "figures": figures, "ratios": over.pop(SECONDS), "ratios_of": over}
    return competitors


def run_group(group: Group, options: Options, progress: str | None = None) -> dict[str, Any]:
    """Check, time and summarise one group.

    Raises:
        Unequal: the outputs differ.
    """
    worst = check_equal(group)
    once = {name: run.once() for name, run in group.runs.items() if run.once is not None}
    if group.prepare is not None:
        group.prepare()
    samples = measure(group, options, progress=progress)
    for name, figures in once.items():
        samples[name] = [{**one, **figures} for one in samples[name]]
    return {
        "title": group.title,
        "baselines": list(group.baselines),
        "rounds": len(next(iter(samples.values()))),
        "calls": options.pick(group.calls, 1),
        "tolerance": group.tolerance,
        "largest_difference": worst,
        "competitors": summary(group, samples),
        "skipped": group.skipped,
        "facts": group.facts,
        **({"profiles": {name: profiled(run) for name, run in group.runs.items()}} if options.profile else {}),
    }


def profiled(run: Run, calls: int = 4, most: int = 8) -> list[tuple[str, float, int]]:
    """(operator, its own milliseconds in a call, how often it runs in a call), the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(calls):
            run.call()
            if run.reset is not None:
                run.reset()
    found = sorted(profile.key_averages(), key=lambda one: -one.self_cpu_time_total)[:most]
    return [(one.key, one.self_cpu_time_total / calls / 1e3, one.count // calls) for one in found]


def run_case(chosen: Case, options: Options, progress: bool = False) -> dict[str, Any]:
    """Run the groups of one case, one after another, until it says that the rest cannot run here.

    Raises:
        Unequal: the outputs of a group differ.
    """
    threads = chosen.threads or options.threads
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    found: dict[str, Any] = {"title": chosen.title, "about": chosen.about, "threads": threads, "groups": []}
    try:
        for group in chosen.build(options):
            label = f"{chosen.name}: {group.title}" if progress else None
            found["groups"].append(run_group(group, options, label))
            del group
            if "torch._dynamo" in sys.modules:
                torch._dynamo.reset()
    except Skipped as reason:
        found["skipped"] = str(reason)
    return found
