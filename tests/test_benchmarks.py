"""The benchmarks' own machinery: fair turns, right ratios, refused differences, complete tables."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from benchmarks import __main__ as command
from benchmarks import harness
from benchmarks.floor import Cache, load_floor
from benchmarks.harness import CASES, Group, Options, Run, Unequal
from benchmarks.peers import floor_gradients, gradients, hf_gradients, load_hf, loss_of, make_peers
from benchmarks.report import markdown

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
    assert results["machine"].keys() >= {"date", "processor", "cores", "threads", "torch", "python"}
    for name, found in results["cases"].items():
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
    results = {"machine": {"threads": 1}, "cases": {}}
    assert markdown(results, "## Gaps\n\nOne.\n").endswith("## Gaps\n\nOne.\n")


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
