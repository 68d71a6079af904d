"""The benchmarks' own machinery: fair turns, right ratios, refused differences, complete tables."""

from __future__ import annotations

import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import __main__ as command
from benchmarks import accelerator, harness, training
from benchmarks.accelerator import host_waits
from benchmarks.floor import Cache, load_floor
from benchmarks.harness import CASES, Group, Options, Run, Skipped, Unequal
from benchmarks.peers import floor_gradients, gradients, hf_gradients, load_hf, loss_of, make_peers
from benchmarks.report import markdown
from torch.utils.flop_counter import FlopCounterMode

from mixformer import BaseMixin, BaseModel, KVCache
from mixformer.decode import CompiledSteps
from mixformer.testing import collate, sample_row
from models.llama import LLaMA, LLaMAConfig

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "inner_hidden_size": 40}


class Clock:
    """A clock that only moves when work is done."""

    def __init__(self) -> None:
        self.now = 0.0
        self.speed = 1.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds * self.speed

        return run


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_everyone_takes_each_place_and_follows_each_other_one_equally_often(count: int) -> None:
    rounds = harness.orders(count, 2 * count)
    assert all(sorted(order) == list(range(count)) for order in rounds)
    places = Counter((place, who) for order in rounds for place, who in enumerate(order))
    assert set(places.values()) == {2} and len(places) == count * count
    followers = Counter(pair for order in rounds for pair in pairwise(order))
    assert count == 1 or (set(followers.values()) == {2} and len(followers) == count * (count - 1))


def test_ratios_are_those_of_the_work_though_the_machine_slows_down() -> None:
    clock = Clock()

    def slow_down() -> None:
        clock.speed *= 1.05

    runs = {"floor": Run(clock.work(2.0), reset=slow_down), "slower": Run(clock.work(3.0)), "idle": Run(lambda: None)}
    group = Group("work", runs, rounds=12, derived={"sum": lambda times: times["floor"] + times["slower"]})
    found = harness.summary(group, harness.measure(group, Options(), clock))
    assert found["slower"]["ratios"]["floor"]["median"] == pytest.approx(1.5, rel=0.06)
    assert found["sum"]["ratios"]["floor"]["median"] == pytest.approx(2.5, rel=0.06)
    seconds = found["floor"]["figures"]["seconds"]
    assert seconds["high"] / seconds["low"] > 1.2  # the times themselves moved far more than that
    assert found["idle"]["figures"]["seconds"]["median"] == 0


def test_a_ratio_is_the_median_over_rounds_and_not_that_of_medians() -> None:
    group = Group("work", {"floor": Run(lambda: None), "other": Run(lambda: None)})
    rounds = {"floor": (1.0, 2.0, 10.0), "other": (3.0, 2.0, 20.0)}
    found = harness.summary(group, {name: [{"seconds": x} for x in times] for name, times in rounds.items()})
    assert found["other"]["ratios"]["floor"]["median"] == 2.0


def test_samples_average_their_calls_and_leave_resets_out() -> None:
    clock = Clock()
    run = Run(clock.work(2.0), reset=clock.work(100.0))
    assert harness.sample(run, 5, clock) == {"seconds": 2.0}


def test_spread_gives_median_and_quartiles() -> None:
    assert harness.spread([5.0, 1.0, 3.0, 2.0, 4.0]) == {"low": 2.0, "median": 3.0, "high": 4.0}
    assert harness.spread([7.0])["median"] == 7.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"x": torch.tensor([1.0, 2.001])},
        {"x": torch.tensor([1.0, float("nan")])},
        {"x": torch.tensor([1.0, 2.0, 2.0])},
        {"y": torch.tensor([1.0, 2.0])},
        [torch.tensor([1.0, 2.0])],
        None,
    ],
)
def test_unequal_outputs_are_refused_and_nothing_is_timed(wrong: object) -> None:
    calls: list[str] = []

    def right() -> object:
        calls.append("floor")
        return {"x": torch.tensor([1.0, 2.0])}

    group = Group("work", {"floor": Run(right), "other": Run(lambda: wrong)}, rounds=3)
    with pytest.raises(Unequal, match=r"'other'.*Nothing was timed"):
        harness.run_group(group, Options())
    assert len(calls) == 1


def test_tokens_must_be_equal_and_numbers_within_the_tolerance() -> None:
    assert harness.difference([torch.tensor([3, 4])], [torch.tensor([3, 4])]) == 0
    assert harness.difference([torch.tensor([3, 5])], [torch.tensor([3, 4])]) == float("inf")
    assert harness.difference(torch.tensor([1.0, 8.004]), torch.tensor([1.0, 8.0])) == pytest.approx(5e-4, rel=1e-2)


def test_a_failed_case_is_reported_written_and_makes_the_command_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(options: Options) -> Iterator[Group]:
        """Two that differ."""
        yield Group("work", {"floor": Run(lambda: torch.ones(1)), "other": Run(lambda: torch.zeros(1))})

    monkeypatch.setitem(CASES, "differs", harness.Case("differs", "Different", "", build))
    file, page = tmp_path / "results.json", tmp_path / "page.md"
    threads = torch.get_num_threads()
    try:
        code = command.main(["differs", "--json", str(file), "--markdown", str(page), "--threads", "1"])
    finally:
        torch.set_num_threads(threads)
    assert code == 1
    assert "Unequal" in json.loads(file.read_text())["cases"]["differs"]["failed"]
    assert "**Failed:**" in page.read_text() and "FAILED" in capsys.readouterr().out


def test_a_quick_run_writes_results_and_a_page_with_every_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.peers.load_hf", lambda ours: (None, {"HF": "it is not here"}))
    monkeypatch.setattr("benchmarks.peers.load_sat", lambda ours: (None, {}))
    file, page = tmp_path / "results.json", tmp_path / "page.md"
    names = ["prefill", "expert"]
    threads = torch.get_num_threads()
    try:
        code = command.main([*names, "--quick", "--threads", "1", "--json", str(file), "--markdown", str(page)])
    finally:
        torch.set_num_threads(threads)
    assert code == 0
    results, text = json.loads(file.read_text()), page.read_text()
    assert list(results["cases"]) == names
    for name, found in results["cases"].items():
        assert found["machine"].keys() >= {"date", "processor", "cores", "threads", "torch", "python"}
        assert f"(`{name}`)" in text and found["about"] in text
        for group in found["groups"]:
            assert f"### {group['title'][0].upper()}{group['title'][1:]}" in text
            for competitor, one in group["competitors"].items():
                assert f"| {competitor}" in text
                assert all(f"**{ratio['median']:.3f}**" in text for ratio in one["ratios"].values())
    assert "no HF: it is not here" in text
    again = tmp_path / "again.md"
    command.main(["--from-json", str(file), "--markdown", str(again)])
    assert again.read_text() == text


def test_the_page_ends_with_the_notes_as_they_are() -> None:
    assert markdown({"cases": {}}, "## Gaps\n\nOne.\n").endswith("## Gaps\n\nOne.\n")


@pytest.fixture
def timed_cases(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The only two cases, one and other; their competitors report the seconds given here, 0 for being skipped."""
    seconds = {"one": 1.0, "other": 2.0}

    def make(name: str) -> harness.Case:
        def build(options: Options) -> Iterator[Group]:
            if not seconds[name]:
                raise Skipped("it is somewhere else")
            runs = {"floor": Run(lambda: {"seconds": seconds[name]}, compared=False, measured=True)}
            yield Group("work", runs, warmup=0)

        return harness.Case(name, f"Case {name}", "", build, threads=torch.get_num_threads())

    for name in list(CASES):
        monkeypatch.delitem(CASES, name)
    for name in seconds:
        monkeypatch.setitem(CASES, name, make(name))
    return seconds


def at(monkeypatch: pytest.MonkeyPatch, commit: str, processor: str = "slow") -> None:
    """Say where and when the next run is."""
    found = {"date": f"day of {commit}", "processor": processor, "threads": torch.get_num_threads(), "commit": commit}
    monkeypatch.setattr(command, "machine", lambda threads: found)


def seconds_in(file: Path) -> dict[str, float]:
    """What a file says that the cases took."""
    cases = json.loads(file.read_text())["cases"]
    return {
        name: case["groups"][0]["competitors"]["floor"]["figures"]["seconds"]["median"] for name, case in cases.items()
    }


def without_duration(page: Path) -> str:
    """A page without how long its cases took."""
    text, count = re.subn(r", in \d+ s\b", "", page.read_text())
    assert count == 2
    return text


def test_a_case_is_measured_again_and_the_others_keep_their_figures_date_and_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timed_cases: dict[str, float]
) -> None:
    file, page = tmp_path / "results.json", tmp_path / "page.md"
    given = ["--rounds", "1", "--json", str(file), "--markdown", str(page)]
    at(monkeypatch, "aaa")
    assert command.main(given) == 0
    text = without_duration(page)
    assert "| processor | slow |" in text and text.count("*Run on day of aaa at commit aaa.*") == 2
    first = json.loads(file.read_text())["cases"]
    timed_cases |= {"one": 3.0, "other": 4.0}
    at(monkeypatch, "bbb", "fast")
    assert command.main(["other", *given]) == 0
    assert seconds_in(file) == {"one": 1.0, "other": 4.0} and list(seconds_in(file)) == ["one", "other"]
    assert json.loads(file.read_text())["cases"]["one"] == first["one"]
    one, other = without_duration(page).split("## Case ")[1:]
    assert "1 s [" in one and "*Run on day of aaa at commit aaa; processor slow.*" in one
    assert "4 s [" in other and "*Run on day of bbb at commit bbb; processor fast.*" in other
    assert "| processor |" not in page.read_text()


def test_files_from_before_cases_had_machines_of_their_own_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timed_cases: dict[str, float]
) -> None:
    file = tmp_path / "results.json"
    at(monkeypatch, "aaa")
    command.main(["--rounds", "1", "--json", str(file)])
    cases = json.loads(file.read_text())["cases"]
    alike = {name: [case.pop(name) for case in cases.values()].pop() for name in ("machine", "quick")}
    file.write_text(json.dumps({**alike, "cases": cases}))
    at(monkeypatch, "bbb")
    command.main(["other", "--rounds", "1", "--json", str(file)])
    found = json.loads(file.read_text())["cases"]
    assert [found[name]["machine"]["commit"] for name in ("one", "other")] == ["aaa", "bbb"]


def test_a_run_that_stops_in_the_middle_leaves_what_it_has_not_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timed_cases: dict[str, float]
) -> None:
    file = tmp_path / "results.json"
    at(monkeypatch, "aaa")
    command.main(["--rounds", "1", "--json", str(file)])
    timed_cases |= {"one": 3.0, "other": 4.0}

    def stop(options: Options) -> Iterator[Group]:
        raise KeyboardInterrupt

    monkeypatch.setitem(CASES, "other", harness.Case("other", "Case other", "", stop))
    with pytest.raises(KeyboardInterrupt):
        command.main(["--rounds", "1", "--json", str(file)])
    assert seconds_in(file) == {"one": 3.0, "other": 2.0} and list(tmp_path.iterdir()) == [file]


def test_a_case_that_is_skipped_here_keeps_what_was_measured_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timed_cases: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    file, page = tmp_path / "results.json", tmp_path / "page.md"
    at(monkeypatch, "aaa")
    command.main(["--rounds", "1", "--json", str(file)])
    timed_cases |= {"one": 3.0, "other": 0.0}
    at(monkeypatch, "bbb")
    assert command.main(["--rounds", "1", "--json", str(file), "--markdown", str(page)]) == 0
    assert seconds_in(file) == {"one": 3.0, "other": 2.0}
    assert "other: what was measured on day of aaa stays" in capsys.readouterr().out
    assert "at commit aaa" in page.read_text() and "Skipped" not in page.read_text()


@pytest.mark.parametrize("first", [[], ["--quick"]])
def test_quick_runs_and_measurements_do_not_mix(
    first: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timed_cases: dict[str, float],
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, page = tmp_path / "results.json", tmp_path / "page.md"
    at(monkeypatch, "aaa")
    command.main([*first, "--rounds", "1", "--json", str(file), "--markdown", str(page)])
    assert ("no measurement" in page.read_text()) == bool(first)
    before = file.read_bytes()
    with pytest.raises(SystemExit):
        command.main([*([] if first else ["--quick"]), "--rounds", "1", "--json", str(file)])
    assert "write to another file" in capsys.readouterr().err and file.read_bytes() == before


def test_a_file_that_holds_something_else_is_refused_and_left_alone(
    tmp_path: Path, timed_cases: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.json"
    for text in ("[]", "{", '{"cases": 3}'):
        file.write_text(text)
        with pytest.raises(SystemExit):
            command.main(["one", "--json", str(file)])
        assert "results.json holds no results of benchmarks" in capsys.readouterr().err and file.read_text() == text


def test_rates_and_figures_taken_once_have_ratios_of_their_own() -> None:
    clock, taken = Clock(), []

    def peak(name: str, value: float) -> Callable[[], dict[str, float]]:
        return lambda: {"MiB": (taken.append(name), value)[1]}  # type: ignore[func-returns-value]

    runs = {
        "floor": Run(clock.work(2.0), rates={"tokens/s": 10.0}, once=peak("floor", 8.0)),
        "twice": Run(clock.work(4.0), lambda: None, rates={"tokens/s": 10.0}, once=peak("twice", 2.0)),
        "other": Run(clock.work(1.0)),
    }
    group = Group("work", runs, rounds=3, calls=2, ratios_of=("tokens/s", "MiB"))
    timed = harness.measure(group, Options(), clock)
    assert [one["tokens/s"] for one in timed["floor"] + timed["twice"]] == [5.0] * 3 + [2.5] * 3
    found = harness.run_group(group, Options())
    assert taken == ["floor", "twice"]
    other = found["competitors"]["twice"]
    assert other["figures"]["MiB"]["median"] == 2.0 and other["ratios_of"]["MiB"]["floor"]["median"] == 0.25
    assert found["competitors"]["other"]["ratios_of"] == {"tokens/s": {}, "MiB": {}}
    case = {"title": "Work", "groups": [found], "machine": {"threads": 1, "date": "today"}}
    page = markdown({"cases": {"work": case}})
    assert "| time | over floor | tokens/s | tokens/s over floor | MiB | MiB over floor |" in page
    row = next(line for line in page.splitlines() if line.startswith("| twice |"))
    assert row.endswith("| 2 | **0.250** [0.250, 0.250] |") and row.count("|") == 8


def quick(name: str) -> list[dict[str, Any]]:
    """The groups of a case in tiny sizes; competitors whose outputs differ would raise."""
    threads = torch.get_num_threads()
    try:
        return harness.run_case(CASES[name], Options(threads=1, quick=True))["groups"]  # type: ignore[no-any-return]
    finally:
        torch.set_num_threads(threads)


def test_packing_and_padding_learn_the_same_and_packing_runs_fewer_tokens() -> None:
    (group,) = quick("packing")
    facts, found = group["facts"], group["competitors"]
    run = [facts[f"tokens run, {name}"] for name in found]
    assert run[0] == facts["samples"] * 64 and run[0] > run[1] > max(run[2:]) and min(run) > facts["useful tokens"]
    assert group["tolerance"] <= 1e-4 and all(one["kind"] == "compared" for one in found.values())
    assert set(found["packed"]["ratios_of"]["useful tokens/s"]) == set(list(found)[:2])


def test_lengths_of_samples_are_log_normal() -> None:
    lengths = sorted(training.log_normal(5000, 9999, torch.Generator().manual_seed(0)))
    assert lengths[4999] == pytest.approx(5000, abs=1)
    shares = [sum(length < 5000 * math.exp(bound) for length in lengths) / 9999 for bound in (-1, 1, 2)]
    assert shares == pytest.approx([0.1587, 0.8413, 0.9772], abs=1e-3)  # of a standard normal distribution


def test_kept_features_give_the_gradients_of_computed_ones() -> None:
    groups = quick("cached_features")
    assert [list(group["competitors"]) for group in groups] == [
        ["computed", "read from disk", "read from the page cache", "at hand"]
    ] * 2
    assert all(group["facts"]["million parameters, towers"] > 0 for group in groups)


def test_steps_of_training_are_those_of_the_floor_and_of_transformers() -> None:
    pytest.importorskip("transformers")
    (group,) = quick("training")
    assert {"floor", "mixformer", "HF"} <= set(group["competitors"]) and group["tolerance"] <= 1e-4


def test_the_peak_of_the_loss_in_chunks_is_below_that_of_all_logits() -> None:
    (group,) = quick("chunked_loss")
    peaks = [found["figures"]["peak MiB in use"]["median"] for found in group["competitors"].values()]
    logits = 4 * 128 * 8000 * 4 / 2**20
    assert peaks[0] > 2 * logits > 2 * peaks[1]


def test_the_floor_computes_our_logits_gradients_and_cached_steps() -> None:
    model = LLaMA(LLaMAConfig(**SIZES, num_kv_heads=2), generator=torch.Generator().manual_seed(0))
    floor = load_floor(model.config, model.state_dict())
    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids)
        torch.testing.assert_close(floor(ids), expected, rtol=1e-5, atol=1e-5)
        grown, fixed = Cache(floor, 2, 12), Cache(floor, 2, 12)
        for cache in (grown, fixed):
            first = floor(ids[:, :6], cache, last_only=True)
            torch.testing.assert_close(first, expected[:, 5:6], rtol=1e-5, atol=1e-5)
        fixed.position.fill_(6)
        for place in range(6, 9):
            token, wanted = ids[:, place : place + 1], expected[:, place : place + 1]
            torch.testing.assert_close(floor(token, grown), wanted, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(floor.step(token, fixed), wanted, rtol=1e-5, atol=1e-5)


def test_transformers_computes_our_logits_and_all_gradients() -> None:
    pytest.importorskip("transformers")
    peers = make_peers(SIZES)
    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
    for run in (lambda: peers.ours(ids), lambda: peers.floor(ids), lambda: peers.hf(ids).logits):
        loss_of(run(), ids).backward()
    expected = gradients(peers.ours)
    assert len(expected) == len(list(peers.ours.parameters()))
    for found in (floor_gradients(peers), hf_gradients(peers)):
        assert harness.difference(found, expected) < 1e-5
    with torch.no_grad():
        torch.testing.assert_close(peers.hf(ids).logits, peers.ours(ids), rtol=1e-5, atol=1e-5)


def test_without_transformers_the_table_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    model = LLaMA(LLaMAConfig(**SIZES))
    assert load_hf(model) == (None, {"HF": "transformers is not installed"})


def test_a_case_that_cannot_run_here_is_skipped_with_its_reason_and_fails_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def half(options: Options) -> Iterator[Group]:
        """Stops in the middle."""
        yield Group("first", {"floor": Run(lambda: None)})
        raise Skipped("there is no second one")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(CASES, "half", harness.Case("half", "Half", "", half))
    file, page = tmp_path / "results.json", tmp_path / "page.md"
    names = [name for name in CASES if name.startswith("gpu_")]
    threads = torch.get_num_threads()
    try:
        given = [*names, "half", "--json", str(file), "--markdown", str(page), "--threads", "1", "--rounds", "1"]
        code = command.main(given)
    finally:
        torch.set_num_threads(threads)
    found, text, printed = json.loads(file.read_text())["cases"], page.read_text(), capsys.readouterr().out
    assert code == 0 and len(names) >= 6
    for name in names:
        assert "no CUDA device" in found[name]["skipped"] and not found[name]["groups"]
        assert f"{name}: skipped - no CUDA device" in printed
    assert [group["title"] for group in found["half"]["groups"]] == ["first"]
    assert "### First" in text and "**Skipped:** there is no second one." in text
    assert text.count("**Skipped:** no CUDA device") == len(names)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("gpu_")])
def test_gpu_cases_run_in_tiny_sizes_anywhere(name: str) -> None:
    threads = torch.get_num_threads()
    try:
        found = harness.run_case(CASES[name], Options(threads=1, quick=True))
    finally:
        torch.set_num_threads(threads)
    assert found["groups"] and "skipped" not in found
    figures = {"gpu_decode": "of copy bandwidth", "gpu_prefill": "of matrix rate", "gpu_training": "of matrix rate"}
    for group in found["groups"]:
        compared = [one for one in group["competitors"].values() if one["kind"] == "compared"]
        assert name == "gpu_limits" or len(compared) > 1
        for one in compared if name in figures else ():
            assert one["figures"][figures[name]]["median"] > 0
        if name == "gpu_waits":
            assert group["facts"]["waits in a planned forward"] == 0


def test_times_on_a_device_are_means_without_resets_and_rates_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = Clock(), []
    monkeypatch.setattr("benchmarks.accelerator.time.perf_counter", clock)
    monkeypatch.setattr("benchmarks.accelerator.synchronize", lambda: order.append("wait"))
    work = clock.work(2.0)
    run = accelerator.timed(
        lambda: (order.append("call"), work()), 3, clock.work(100.0), rates={"TB/s": 8.0}  # type: ignore[func-returns-value]
    )
    assert harness.sample(run, 1, clock) == {"seconds": 2.0, "TB/s": 4.0}
    assert order == ["wait", "call", "call", "call", "wait"]


def test_operations_are_those_that_torch_counts_and_attention_is_causal() -> None:
    model = LLaMA(LLaMAConfig(**SIZES, num_kv_heads=2))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(3, 7, dtype=torch.int64))
    counts = counter.get_flop_counts()["Global"]
    assert accelerator.product_flops(model, 21, 21) == counts[torch.ops.aten.mm]
    pairs = sum(1 for query in range(7) for key in range(7) if key <= query)
    assert accelerator.attention_flops(model, 3, 7) == 3 * pairs * SIZES["num_layers"] * 2 * 2 * SIZES["hidden_size"]
    with FlopCounterMode(display=False) as counter:
        accelerator.products_alone(model, 21, 3, backward=True)()
    assert counter.get_total_flops() == 3 * accelerator.product_flops(model, 21, 3)


def test_a_step_reads_every_weight_but_embeddings_experts_and_towers(make: Callable[..., BaseModel]) -> None:
    model = make("llama", rope_tables="released").bfloat16()
    stored = sum(parameter.numel() for parameter in model.parameters()) - 61 * 32
    assert accelerator.bytes_per_token(model) == 2 * stored
    assert accelerator.bytes_per_token(make("cogagent").bfloat16()) == 2 * stored


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x[x > 0], lambda x: torch.equal(x, x + 1),
        lambda x: (x > 0).nonzero(), lambda x: x.unique(), lambda x: x + torch.tensor([1.0]),
    ],
)
def test_the_profiler_sees_what_a_host_would_wait_for(wait: Callable[[torch.Tensor], object]) -> None:
    x = torch.ones(5)
    assert host_waits(lambda: wait(x))
    assert not host_waits(lambda: torch.where(x > 0, x * 2, 0).cumsum(0))


def mixed_batch(model: BaseModel) -> dict[str, torch.Tensor]:
    """Padding, and rows with different numbers of pictures."""
    generator = torch.Generator().manual_seed(0)
    return collate([sample_row(model, count, length, generator) for count, length in ((1, 9), (2, 7), (0, 5))])


@pytest.mark.parametrize("kind", ["llama", "cogvlm", "cogvlm2", "cogagent"])
def test_a_planned_forward_reads_no_value_back(make: Callable[..., BaseModel], kind: str) -> None:
    model = make(kind)
    batch = mixed_batch(model)
    plan = model.plan(**batch)
    assert not host_waits(lambda: model(**batch, plan=plan))
    with torch.no_grad():
        assert not host_waits(lambda: model(**batch, plan=plan))
        cache = KVCache(model, 3, 40)
        plan = model.plan(**batch, cache=cache)
        assert not host_waits(lambda: model(**batch, cache=cache, plan=plan, last_only=True))
        token = torch.tensor([[3], [4], [5]])
        plan = model.plan(token, cache=cache)
        assert not host_waits(lambda: model(token, cache=cache, plan=plan))


class Reads(BaseMixin):
    """Waits for positions."""

    def before_forward(self, ctx: Any) -> None:
        ctx.position_ids.tolist()


@pytest.mark.parametrize("kind", ["llama", "cogvlm", "cogvlm2", "cogagent"])
def test_a_planned_forward_runs_where_tensors_have_no_values(make: Callable[..., BaseModel], kind: str) -> None:
    def without_values(model: BaseModel) -> torch.Size:
        batch = mixed_batch(model)
        plan = model.plan(**batch)
        for split in plan.routes._split.values():
            split.runs = None  # only a CPU has them
        file = io.BytesIO()
        torch.save((model, batch, plan), file)
        file.seek(0)
        model, batch, plan = torch.load(file, map_location="meta", weights_only=False)
        return model(**batch, plan=plan).shape

    model = make(kind)
    assert without_values(model) == (*mixed_batch(model)["input_ids"].shape, 61)
    model.add_mixin("reads", Reads())
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        without_values(model)


@pytest.mark.parametrize("kind", ["llama", "cogvlm", "cogagent"])
def test_a_compiled_step_reads_no_value_back(make: Callable[..., BaseModel], kind: str) -> None:
    model = make(kind)
    batch, cache = mixed_batch(model), KVCache(model, 3, 40, static=True)
    with torch.no_grad():
        model(**batch, cache=cache, last_only=True)
        steps = CompiledSteps(model, cache)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        token = torch.tensor([[3], [4], [5]])
        compiled(token, cache=steps.cache, last_only=True)
        assert not host_waits(lambda: compiled(token, cache=steps.cache, last_only=True))
    torch._dynamo.reset()
