"""A run that is stopped at any moment and gone on with gives, bit for bit, what an unbroken one gives."""

import json
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forks
import numpy as np
import pytest
import torch

from mixformer.train import Stage, Task, TrainConfig, run_stages, train
from mixformer.train.state import (
    atomic_save,
    keep_newest,
    kept_random_states,
    newest_state,
    random_states,
    replacing,
    restore_random_states,
    state_file,
)
from models.llama import LLaMA, LLaMAConfig


def small_model() -> LLaMA:
    config = LLaMAConfig(vocab_size=11, hidden_size=16, num_layers=2, num_heads=2, inner_hidden_size=24)
    return LLaMA(config, generator=torch.Generator().manual_seed(3))


class DrawingTask(Task):
    """Rows that count up from a start that depends on the batch's number, and on draws of every generator.

    Args:
        knows_its_place: whether it has a cursor.
        delay: seconds a batch takes.
    """

    def __init__(self, knows_its_place: bool = True, delay: float = 0.0) -> None:
        self.knows_its_place, self.delay = knows_its_place, delay
        self.position = self.made = 0

    def batches(self) -> Iterator[dict[str, Any]]:
        while True:
            time.sleep(self.delay)
            number, self.position, self.made = self.position, self.position + 1, self.made + 1
            generator = random.Random(number)
            ids = torch.tensor([[generator.randrange(11) + step for step in range(6)] for _ in range(4)]) % 11
            yield {"input_ids": ids, "labels": ids.masked_fill(torch.rand(ids.shape) < 0.2, -100)}

    def loss(self, model: Any, batch: Any) -> dict[str, torch.Tensor]:
        drawn = random.random() + float(np.random.rand())
        return {name: value * (1 + 0.1 * drawn) for name, value in super().loss(model, batch).items()}

    def state_dict(self) -> dict[str, Any] | None:
        return {"position": self.position} if self.knows_its_place else None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def options(folder: Path, **further: Any) -> TrainConfig:
    return TrainConfig(**{
        "steps": 40, "warmup_steps": 4, "learning_rate": 1e-2, "accumulate": 2, "ema": 0.9, "log_every": 1,
        "validate_every": 7, "validation_batches": 2, "log_path": str(folder / "log.jsonl"),
        "state_path": str(folder / "state.pt"), "save_every": 3, "resume": True, "progress": False, **further,
    })  # fmt: skip


def seed_all() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)


def run_once(folder: Path, seed: int | None, further: dict[str, Any], task: dict[str, Any]) -> None:
    """Train to the end and leave the weights in the folder; what a process does."""
    torch.set_num_threads(1)
    seed_all()
    if seed is not None:  # a process that is started anew has other random states
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
    model = small_model()
    train(model, DrawingTask(**task), options(folder, **further), validation=DrawingTask())
    torch.save(model.state_dict(), folder / "weights.pt")


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    timed = ("seconds", "tokens_per_second", "supervised_per_second")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def start(folder: Path, *arguments: Any) -> forks.Group:
    """Call `run_once` in a process of its own."""
    return forks.shared().start("test_resume.run_once", folder, *arguments, world_size=1)


def num_lines(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


def equal_weights(a: Path, b: Path) -> bool:
    first, second = (torch.load(folder / "weights.pt") for folder in (a, b))
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_killed_at_random_moments_gives_the_losses_of_an_unbroken_one(tmp_path: Path) -> None:
    further = {"steps": 30}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    run_once(whole, None, further, {})
    source, killed = random.Random(5), 0
    log = broken / "log.jsonl"
    while not (broken / "weights.pt").exists():
        resumed = newest_state(broken / "state.pt") is not None
        process = start(broken, killed if resumed else None, further, {"delay": 0.003})
        wanted, deadline = num_lines(log) + source.randrange(1, 6), time.monotonic() + 60
        while killed < 6 and num_lines(log) < wanted:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        if killed < 6:
            time.sleep(source.random() * 0.02)
            process.kill()
            killed += 1
        assert process.wait() in ([0], [-signal.SIGKILL])
    assert killed == 6
    assert records(broken) == records(whole)
    assert len(records(whole)) == 30 + 5
    assert equal_weights(whole, broken)
    assert not list(broken.glob("*.partial"))


def test_sigterm_saves_the_state_and_ends_with_143(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    further = {"save_every": 0, "steps": 25}
    run_once(whole, None, further, {})
    process = start(broken, None, further, {"delay": 0.01})
    while num_lines(broken / "log.jsonl") == 0:
        time.sleep(0.002)
    process.kill(signal.SIGTERM)
    assert process.wait() == [143]
    done = torch.load(broken / "state.pt")["step"]
    assert 1 <= done < 25 and len(records(broken)) in (done, done + done // 7)
    run_once(broken, 8, further, {})
    assert records(broken) == records(whole) and equal_weights(whole, broken)


def test_a_stopped_run_says_so_and_where_its_state_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Stopping(DrawingTask):
        def count(self, model: Any, batch: Any) -> int:
            if self.position == 4 and not self.asked:
                self.asked = True
                os.kill(os.getpid(), signal.SIGTERM)
            return 1

        asked = False

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        train(small_model(), Stopping(), options(tmp_path))
    assert stopped.value.code == 143
    assert re.search(r"SIGTERM after step 2; .*state\.pt has its state", capsys.readouterr().err)
    assert torch.load(tmp_path / "state.pt")["step"] == 2
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("knows_its_place", [True, False])
def test_a_resumed_task_goes_on_with_the_batches_that_it_has_not_given(tmp_path: Path, knows_its_place: bool) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    kept = {"knows_its_place": knows_its_place}
    run_once(whole, None, {"steps": 9}, kept)

    class Failing(DrawingTask):
        def loss(self, model: Any, batch: Any) -> dict[str, torch.Tensor]:
            if self.made == 10:
                raise RuntimeError
            return super().loss(model, batch)

    seed_all()
    with pytest.raises(RuntimeError):
        train(small_model(), Failing(**kept), options(broken, steps=9), validation=DrawingTask())
    assert len(records(broken)) == 4
    task = DrawingTask(**kept)
    model = small_model()
    train(model, task, options(broken, steps=9), validation=DrawingTask())
    assert records(broken) == records(whole)
    assert task.made == (12 if knows_its_place else 18)


def test_a_log_cut_in_the_middle_of_a_line_is_mended(tmp_path: Path) -> None:
    run_once(tmp_path, None, {"steps": 6}, {})
    unbroken = records(tmp_path)
    log = tmp_path / "log.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([*lines, '{"step": 7, "ra']))
    run_once(tmp_path, 1, {"steps": 6}, {})
    assert records(tmp_path) == unbroken


def test_a_state_of_a_run_that_trained_other_parameters_is_refused(tmp_path: Path) -> None:
    train(small_model(), DrawingTask(), options(tmp_path, steps=3, ema=None, validate_every=0))
    with pytest.raises(ValueError, match=r"state\.pt .*trained other parameters|group"):
        train(small_model(), DrawingTask(), options(tmp_path, steps=6, ema=None, frozen=["*.layers.0.*"]))


def test_a_state_without_averages_is_not_resumed_with_them(tmp_path: Path) -> None:
    train(small_model(), DrawingTask(), options(tmp_path, steps=3, ema=None))
    with pytest.raises(ValueError, match="written without `ema`"):
        train(small_model(), DrawingTask(), options(tmp_path, steps=6))


def test_the_last_states_are_kept_with_their_steps_and_the_newest_is_gone_on_from(tmp_path: Path) -> None:
    train(small_model(), DrawingTask(), options(tmp_path, steps=11, keep_last=2))
    names = sorted(path.name for path in tmp_path.glob("state*"))
    assert names == ["state-00000009.pt", "state-00000011.pt"]
    assert newest_state(tmp_path / "state.pt") == tmp_path / "state-00000011.pt"


def test_a_write_that_fails_leaves_the_old_file_and_another_write_succeeds(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    atomic_save({"step": 1}, path)
    with pytest.raises(RuntimeError), replacing(path) as partial:
        partial.write_bytes(b"half")
        raise RuntimeError
    assert torch.load(path) == {"step": 1}
    atomic_save({"step": 2}, path)
    assert torch.load(path) == {"step": 2} and [file.name for file in tmp_path.iterdir()] == ["state.pt"]


def test_states_that_are_folders_are_found_and_deleted_like_files(tmp_path: Path) -> None:
    for step in (10, 9, 100):
        with replacing(state_file(tmp_path / "state", step, numbered=True)) as partial:
            partial.mkdir()
            (partial / "part").write_text("x")
    (tmp_path / "state-00000101.partial").mkdir()
    keep_newest(tmp_path / "state", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state-00000010", "state-00000100"]
    assert newest_state(tmp_path / "state") == tmp_path / "state-00000100"


def test_every_generator_goes_on_as_it_would_have() -> None:
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), float(np.random.randn()), float(torch.rand(()))]

    seed_all()
    draw()  # gauss and randn hold back a second number each
    states = random_states()
    expected = draw()
    assert draw() != expected
    restore_random_states(states)
    assert draw() == expected
    restore_random_states(states)
    with kept_random_states():
        draw()
    assert draw() == expected


def test_a_state_is_read_without_trusting_its_pickle(tmp_path: Path) -> None:
    train(small_model(), DrawingTask(), options(tmp_path, steps=3))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] == 3 and state["data"] == {"drawn": 6, "task": {"position": 6}}


def stages(**further: Any) -> list[Stage]:
    loop = {"steps": 4, "warmup_steps": 1, "progress": False, "log_every": 1, **further}
    return [Stage(name, DrawingTask(), TrainConfig(**loop)) for name in ("first", "second", "third")]


@pytest.mark.parametrize("dies", [(1, 0), (1, 3), (2, 1)], ids=["before a save", "after a save", "in the last"])
def test_stages_go_on_within_the_one_that_was_stopped(tmp_path: Path, dies: tuple[int, int]) -> None:
    class Dying(DrawingTask):
        def loss(self, model: Any, batch: Any) -> dict[str, torch.Tensor]:
            if self.made > dies[1]:
                raise RuntimeError
            return super().loss(model, batch)

    seed_all()
    whole, broken, again = small_model(), small_model(), small_model()
    run_stages(whole, stages())
    seed_all()
    plan = stages(save_every=2)
    plan[dies[0]].task = Dying()
    with pytest.raises(RuntimeError):
        run_stages(broken, plan, logs=tmp_path)
    torch.manual_seed(99)
    run_stages(again, stages(save_every=2), logs=tmp_path, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert [path.name for path in tmp_path.glob("*.pt")] == ["third.state.pt"]
    for name in ("first", "second", "third"):
        lines = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4]


def test_stages_do_not_share_a_state(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="share a state_path"):
        run_stages(small_model(), stages(state_path=str(tmp_path / "state.pt")))


def test_stages_write_no_state_unless_asked_to(tmp_path: Path) -> None:
    run_stages(small_model(), stages(), logs=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.jsonl", "second.jsonl", "third.jsonl"]
