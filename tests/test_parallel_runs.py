"""Whole runs of several processes: their logs are those of one, and a kill at any moment loses nothing."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
import yaml
from safetensors.torch import load_file

from mixformer import BaseModel
from mixformer.cli import main
from mixformer.objectives import LanguageObjective
from mixformer.testing import collate, jitter, sample_row, tiny_model
from mixformer.train import Stage, Task, TrainConfig, run_stages, train
from mixformer.train.loop import _TokenRate
from mixformer.train.parallel import engine_of
from mixformer.train.state import keep_newest, newest_state, put_in_place, seed_all, state_file

ROOT = Path(__file__).parents[1]
TIMED = ("seconds", "tokens_per_second", "supervised_per_second")


def lines(log: Path) -> list[dict[str, Any]]:
    """The records of a log that are whole, without what depends on the clock."""
    written = log.read_text().split("\n")[:-1] if log.exists() else []
    return [{name: value for name, value in json.loads(line).items() if name not in TIMED} for line in written]


# ------------------------------------------------------------------------------------- logs and weights
#
# A step has 12 batches of one row, of other lengths and numbers of labels; few have pictures, and a loss of their own.

BATCHES, STEPS, RATE, MEMORY = 12, 2, 1e-3, 0.95
PICTURES = [[1, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]]  # by step
objective = LanguageObjective()


class MixedTask(Task):
    """The batches of all processes are the same whatever their number."""

    def __init__(self, model: BaseModel) -> None:
        self.model, self.rank, self.world_size, self.position = model, 0, 1, 0
        self.seen: list[tuple[int, int, float]] = []

    def shard(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size

    def batches(self) -> Iterator[dict[str, Any]]:
        while True:
            number, self.position = self.position + self.rank, self.position + self.world_size
            yield self.make(number)

    def validation(self) -> list[dict[str, Any]]:
        return [self.make(100 + number) for number in range(5)][self.rank :: self.world_size]

    def make(self, number: int) -> dict[str, Any]:
        step, place = divmod(number, BATCHES)
        pictures = PICTURES[step % STEPS][place]
        row = collate([sample_row(self.model, pictures, 7 + number % 4, torch.Generator().manual_seed(number))])
        ignored = row["token_type_ids"] == 1 if "token_type_ids" in row else row["input_ids"] < 0
        ignored[:, -1 - number % 3 :] = True
        return {**row, "labels": row["input_ids"].masked_fill(ignored, -100)}

    def count(self, model: Any, batch: Any) -> int:
        return objective.count(batch)

    def loss(self, model: Any, batch: Any) -> dict[str, torch.Tensor]:
        losses = objective(model, batch)
        if "images" in batch:
            losses["pictures"] = 0.1 * losses["language"] * len(batch["images"])
            if torch.is_grad_enabled():
                self.seen.append((self.position, self.count(model, batch), losses["pictures"].item()))
        return losses

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def mixed_model() -> BaseModel:
    model = tiny_model("cogvlm")
    jitter(model)
    return model


def train_mixed(folder: Path, engine: Any = None, stages: bool = False, **further: Any) -> tuple[MixedTask, BaseModel]:
    """Train, and leave log, state and weights in the folder."""
    world_size, rank = (1, 0) if engine is None else (engine.world_size, engine.rank)
    seed_all(rank)
    model = mixed_model()
    task = MixedTask(model)
    config = TrainConfig(**{
        "steps": STEPS, "warmup_steps": 1, "learning_rate": RATE, "clip": 0.05, "accumulate": BATCHES // world_size,
        "frozen": ["*word_embeddings*", "*attention.dense*"], "log_every": 1, "log_path": str(folder / "log.jsonl"),
        "state_path": str(folder / "run.pt"), "save_every": 1, "keep_last": 2, "progress": False, "ema": 0.5,
        "ema_for": "validation", **further,
    })  # fmt: skip
    if stages:
        config = replace(config, steps=1, state_path=None, resume=False)
        parts = {"first": ["image.projector*"], "second": ["vision_expert*"], "third": ["*"]}
        run_stages(
            model, [Stage(name, MixedTask(model), replace(config, trainable=part, frozen=[])) for name, part in
            parts.items()], engine=engine,
        )
    else:
        train(model, task, config, engine=engine)
    if engine is None:
        torch.save(model.state_dict(), folder / "weights.pt")
    else:
        with engine.whole(model) as whole:
            if whole is not None:
                torch.save(whole.state_dict(), folder / "weights.pt")
    return task, model


def several(folder: Path, names: list[str]) -> None:
    """What processes do: runs named by their engine, those that are resumed with a state that lies there already."""
    engines = {"ddp": engine_of("ddp", minutes=3), "fsdp": engine_of("fsdp", minutes=3)}
    world_size, rank = engines["ddp"].world_size, engines["ddp"].rank
    if world_size % 2 == 0:
        engines["hsdp"] = engine_of("fsdp", replicas=2, minutes=3)
    draws = {}
    for name in names:
        saved = {"save_every": int(world_size == 2), "save_at_end": False, "resume": True}
        train_mixed(folder / name, engines[name.partition("-")[0]], name.endswith("-stages"), **saved)
        draws[name] = torch.rand(()).item()
    engine = engines["fsdp"]
    tokens = _TokenRate(torch.device("cpu"))
    mask = torch.arange(1000).view(2, 500) < 100 * (rank + 1)
    tokens.add({"input_ids": torch.zeros(2, 500), "attention_mask": mask}, 30)
    tokens.since -= 100.0
    found = {"draws": draws, "rates": tokens.rates(engine), "in_step": list(engine.in_step(range(rank + 1)))}
    try:
        list(engine.in_step(range(rank)))
    except ValueError as error:
        found["nothing"] = str(error)
    try:
        engine.agree(rank // 2, "file")
    except ValueError as error:
        found["differ"] = str(error)
    torch.save(found, folder / f"found.{rank}.pt")
    engines["ddp"].close()


STAGES = ["ddp-stages", "fsdp-stages"]
RUNS = {2: ["fsdp"], 3: ["fsdp", "ddp-from-two"], 4: ["ddp", "hsdp", "fsdp-from-two", "ddp-from-one"]}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What runs of one, two, three and four processes left, in folders of their number and name."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "1").mkdir()
    task, _ = train_mixed(folder / "1")
    torch.save(task.seen, folder / "seen.pt")
    train_mixed(folder / "1-stages", stages=True)
    for world_size, names in RUNS.items():
        for name in names:
            if "-" in name:
                target = folder / str(world_size) / name
                target.mkdir(parents=True)
                copy = shutil.copytree if "two" in name else shutil.copy
                copy(folder / ("2/fsdp" if "two" in name else "1") / "run-00000001.pt", target / "run-00000001.pt")
        names = [*names, *STAGES] if world_size == 2 else names
        forks.shared().run("test_parallel_runs.several", folder / str(world_size), names, world_size=world_size)
    return folder


every_run = pytest.mark.parametrize(
    ("world_size", "name"), [(world_size, name) for world_size, names in RUNS.items() for name in names]
)


@every_run
def test_the_log_of_several_processes_is_that_of_one(world_size: int, name: str, mixed: Path) -> None:
    expected = lines(mixed / "1/log.jsonl")["-" in name :]
    found = lines(mixed / str(world_size) / name / "log.jsonl")
    assert len(found) == len(expected) and [list(line) for line in found] == [list(line) for line in expected]
    for one, other in zip(expected, found, strict=True):
        for key in ("step", "rate"):
            assert other.get(key) == one.get(key)
        for key, tolerance in {"step_loss": 1e-6, "language": 1.1e-4, "pictures": 1.1e-4, "total": 1.1e-4}.items():
            assert other.get(key, 0) == pytest.approx(one.get(key, 0), abs=tolerance, rel=0)
        assert other.get("gradient_norm", 0) == pytest.approx(one.get("gradient_norm", 0), rel=1e-5)
        for key, value in one.get("validation", {}).items():
            assert other["validation"][key] == pytest.approx(value, abs=2e-6, rel=0)


@every_run
def test_the_weights_of_several_processes_are_those_of_one_and_frozen_ones_stay(
    world_size: int, name: str, mixed: Path
) -> None:
    before = mixed_model().state_dict()
    expected, found = (torch.load(mixed / place / "weights.pt") for place in ("1", f"{world_size}/{name}"))
    torch.testing.assert_close(found, expected, atol=0.01 * STEPS * RATE, rtol=0)  # AdamW divides small gradients too
    frozen = [key for key in before if "word_embeddings" in key or "attention.dense" in key]
    assert frozen and all(torch.equal(found[key], before[key]) for key in frozen)
    moved = "vision_expert", "mixins.image.tower", "transformer.layers.1.attention_norm"
    assert all(any(part in key and not torch.equal(found[key], before[key]) for key in found) for part in moved)


@pytest.mark.parametrize("name", STAGES)
def test_stages_that_train_other_parts_give_the_losses_of_one_process(name: str, mixed: Path) -> None:
    places = [mixed / "1-stages", mixed / "2" / name]
    logs = [lines(place / "log.jsonl") for place in places]
    one, two = ([record["step_loss"] for record in log if "rate" in record] for log in logs)
    assert len(one) == 3
    torch.testing.assert_close(two, one, atol=1e-6, rtol=0)
    expected, found = (torch.load(place / "weights.pt") for place in places)
    torch.testing.assert_close(found, expected, atol=0.01 * STEPS * RATE, rtol=0)


def test_a_loss_that_few_batches_have_is_averaged_over_those_by_their_labels(mixed: Path) -> None:
    seen: list[tuple[int, int, float]] = torch.load(mixed / "seen.pt")
    seen = [(position - 1, count, value) for position, count, value in seen]
    task, labels = MixedTask(mixed_model()), []
    for step in range(STEPS):
        labels.append(sum(objective.count(task.make(step * BATCHES + place)) for place in range(BATCHES)))
    for number, record in enumerate(lines(mixed / "1/log.jsonl")[:STEPS]):
        known = [each for each in seen if each[0] // BATCHES <= number]
        steps = [place // BATCHES for place, _, _ in known]
        weights = [MEMORY ** (number - step) * each[1] / labels[step] for step, each in zip(steps, known, strict=True)]
        mean = sum(weight * each[2] for weight, each in zip(weights, known, strict=True)) / sum(weights)
        assert record["pictures"] == pytest.approx(mean, abs=6e-5)


def found_by(mixed: Path, world_size: int) -> list[dict[str, Any]]:
    return [torch.load(mixed / f"{world_size}/found.{rank}.pt") for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_speed_in_the_log_is_that_of_all_processes(world_size: int, mixed: Path) -> None:
    for found in found_by(mixed, world_size):
        real = sum(100 * (rank + 1) for rank in range(world_size))
        assert found["rates"]["tokens_per_second"] == pytest.approx(real / 100, rel=0.2)
        assert found["rates"]["supervised_per_second"] == pytest.approx(30 * world_size / 100, rel=0.2)


@pytest.mark.parametrize("world_size", [3, 4])
def test_processes_that_are_resumed_do_not_all_draw_the_same(world_size: int, mixed: Path) -> None:
    found = found_by(mixed, world_size)
    for name in RUNS[world_size]:
        assert len({each["draws"][name] for each in found}) == world_size


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_process_that_has_run_out_of_batches_goes_on_with_its_last_and_one_without_any_is_named(
    world_size: int, mixed: Path
) -> None:
    for rank, found in enumerate(found_by(mixed, world_size)):
        expected = [(min(number, rank), number <= rank) for number in range(world_size)]
        assert found["in_step"] == expected
        assert f"Of {world_size} processes, 0 got no batch" in found["nothing"]


def test_processes_that_see_different_files_say_so(mixed: Path) -> None:
    for found in found_by(mixed, 4):
        assert "do not find the same file (process 0: 0, process 1: 0, process 2: 1, process 3: 1)" in found["differ"]


# ------------------------------------------------------------------------------------- kill and resume


class Job:
    """A folder with a configuration of a small run, and what the run leaves there."""

    def __init__(self, folder: Path, engine: str, keep_stages: bool = False, **loop: Any) -> None:
        folder.mkdir(parents=True)
        self.folder, self.config, self.hold = folder, folder / "config.yaml", folder / "hold"
        self.log, self.output = folder / "logs/texts.jsonl", folder / "trained"
        self.state = folder / "logs/texts.state.pt"
        content = yaml.safe_load((ROOT / "examples/zoo/llama/tiny.yaml").read_text())
        content["processor"] = str(ROOT / "examples/zoo/llama")
        content["tokenizer"] = str(ROOT / "examples/zoo/shapes/tokenizer.model")
        task = {"file": str(ROOT / "examples/zoo/shapes/train.jsonl"), "hold": str(self.hold)}
        given = {
            "steps": 6, "learning_rate": 1e-2, "warmup_steps": 2, "accumulate": 2, "log_every": 1, "save_every": 2,
            "ema": 0.9, "progress": False, **loop,
        }  # fmt: skip
        content["train"] = {
            "output": str(self.output), "logs": str(folder / "logs"), "engine": engine, "resume": True,
            "keep_stages": keep_stages,
            "stages": [{
                "name": "texts", "task": {"class_path": "held_task.HeldTextTask", "init_args": task}, "loop": given,
            }],
        }  # fmt: skip
        self.config.write_text(yaml.safe_dump(content))

    @property
    def arguments(self) -> list[str]:
        return ["--config", str(self.config), "--job", "train"]

    def run(self, call: str = "job", world_size: int = 2, *further: str) -> forks.Group:
        """Run it to its end."""
        call = f"test_parallel_runs.{call}"
        return forks.shared().run(call, self.folder, self.arguments, *further, world_size=world_size)

    def start(self, call: str = "job", world_size: int = 2) -> forks.Group:
        """Start it."""
        return forks.shared().start(f"test_parallel_runs.{call}", self.folder, self.arguments, world_size=world_size)

    def hold_after(self, number: int) -> None:
        """Each process that is started waits after so many batches."""
        self.hold.write_text(str(number))
        for mark in self.folder.glob("hold.*"):
            mark.unlink()

    def wait_until_held(self, world_size: int = 2, alive: Callable[[], bool] = lambda: True) -> None:
        marks = [self.hold.with_name(f"hold.{rank}") for rank in range(world_size)]
        deadline = time.monotonic() + 60
        while not all(mark.exists() for mark in marks):
            assert alive() and time.monotonic() < deadline
            time.sleep(0.002)

    def let_go(self) -> None:
        self.hold.unlink()

    def assert_equals(self, whole: Job) -> None:
        """Every loss and every weight is the same, bit for bit, and nothing half-written is left."""
        assert lines(self.log) == lines(whole.log)
        found, expected = (load_file(job.output / "model.safetensors") for job in (self, whole))
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
        assert not [path for path in self.state.parent.iterdir() if path.suffix in (".partial", ".old")]


def job(folder: Path, arguments: list[str]) -> None:
    main("models.llama:LLaMA", arguments)


def job_killed_in_a_state(folder: Path, arguments: list[str]) -> None:
    """The second process dies while it writes its part of a state."""
    from mixformer.train import parallel

    if os.environ["RANK"] == "1":
        parallel.atomic_save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    main("models.llama:LLaMA", arguments)


def job_killed_in_the_result(folder: Path, arguments: list[str]) -> None:
    """The process that writes the result dies when the weights are written, and tokenizer files are not."""
    from mixformer.data.processor import Processor

    Processor.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    main("models.llama:LLaMA", arguments)


def job_without_steps(folder: Path, arguments: list[str]) -> None:
    """Nothing is left to train."""
    from mixformer.train import loop

    loop._Run._step = None
    main("models.llama:LLaMA", arguments)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Job]:
    """The unbroken run of an engine, and what its processes printed."""
    made: dict[tuple[str, int], Job] = {}

    def find(engine: str, world_size: int = 2) -> Job:
        if (engine, world_size) not in made:
            made[engine, world_size] = Job(tmp_path_factory.mktemp("whole") / engine, engine)
            made[engine, world_size].run(world_size=world_size)
        return made[engine, world_size]

    return find


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_processes_killed_at_random_moments_lose_nothing(engine: str, whole: Any, tmp_path: Path) -> None:
    broken, source = Job(tmp_path / "broken", engine), random.Random(engine)
    broken.hold_after(9)  # of 12
    running = broken.start()
    while not lines(broken.log):
        time.sleep(0.002)
    time.sleep(source.random() * 0.1)
    running.kill()
    assert running.wait() == [-signal.SIGKILL] * 2

    broken.hold_after(1 + source.randrange(3))
    running = broken.start()
    broken.wait_until_held()
    running.kill(ranks=[1])
    broken.let_go()
    codes = running.wait()
    assert codes[0] > 0 and codes[1] == -signal.SIGKILL

    assert broken.start("job_killed_in_a_state").wait()[1] == -signal.SIGKILL
    partial = list(broken.state.parent.glob("*.partial"))
    assert len(partial) == 1 and (partial[0] / "extra.0.pt").exists() and not (partial[0] / "extra.1.pt").exists()

    broken.run()
    broken.assert_equals(whole(engine))


def torchrun(job: Job) -> subprocess.Popen[str]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    command += ["-m", "models.llama", *job.arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    with (job.folder / "torchrun").open("w") as out:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out, text=True)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_torchrun_ends_all_when_one_is_killed_and_the_same_command_goes_on_until_sigterm_saves_every_process(
    whole: Any, tmp_path: Path
) -> None:
    broken = Job(tmp_path / "broken", "fsdp")
    broken.hold_after(5)  # within the third step
    launcher = torchrun(broken)
    broken.wait_until_held(alive=lambda: launcher.poll() is None)
    ranks = children(launcher.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    assert launcher.wait(timeout=60) != 0
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)

    broken.hold_after(1)  # again, from the state of the second step
    launcher = torchrun(broken)
    broken.wait_until_held(alive=lambda: launcher.poll() is None)
    launcher.terminate()
    assert launcher.wait(timeout=60) != 0
    state = newest_state(broken.state)
    assert state is not None and state.name == "texts.state-00000003.pt" and len(lines(broken.log)) == 3
    extras = [torch.load(state / f"extra.{rank}.pt", weights_only=True)["extra"] for rank in range(2)]
    assert [(extra["step"], extra["rank"]) for extra in extras] == [(3, 0), (3, 1)]
    assert (broken.folder / "torchrun").read_text().count("Training was stopped by SIGTERM after step 3") == 1

    broken.let_go()
    broken.run()
    broken.assert_equals(whole("fsdp"))


# ------------------------------------------------------------------------------------- the end of a run


@pytest.mark.parametrize(("engine", "world_size"), [("auto", 1), ("fsdp", 2)])
def test_a_run_killed_while_it_saves_the_result_is_finished_without_training(
    engine: str, world_size: int, whole: Any, tmp_path: Path
) -> None:
    broken = Job(tmp_path / "broken", engine)
    codes = broken.start("job_killed_in_the_result", world_size).wait()
    assert codes[0] == -signal.SIGKILL and 0 not in codes and not broken.output.exists()
    for _ in range(3 - world_size):  # a run that was finished can be finished again
        broken.run("job_without_steps", world_size)
        broken.assert_equals(whole(engine, world_size))


def test_a_run_that_was_stopped_before_saves_its_end_though_it_saves_nothing_on_the_way(
    whole: Any, tmp_path: Path
) -> None:
    broken = Job(tmp_path / "broken", "auto", save_every=0)
    broken.hold_after(6)
    running = broken.start(world_size=1)
    broken.wait_until_held(1)
    running.kill(signal.SIGTERM)
    assert running.wait() == [143]
    broken.let_go()
    assert broken.start("job_killed_in_the_result", 1).wait() == [-signal.SIGKILL]
    broken.run("job_without_steps", 1)
    broken.assert_equals(whole("auto", 1))


@pytest.mark.parametrize(("engine", "world_size"), [("auto", 1), ("fsdp", 2)])
def test_weights_that_were_kept_after_the_last_stage_are_the_result(
    engine: str, world_size: int, whole: Any, tmp_path: Path
) -> None:
    broken = Job(tmp_path / "broken", engine, keep_stages=True, save_every=0)
    assert broken.start("job_killed_in_the_result", world_size).wait()[0] == -signal.SIGKILL
    assert newest_state(broken.state) is None and (broken.folder / "logs/texts.pt").exists()
    broken.run("job_without_steps", world_size)
    broken.assert_equals(whole(engine, world_size))


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_only_the_first_process_prints(engine: str, whole: Any) -> None:
    found = whole(engine)
    first, second = ((found.folder / f"out.{rank}").read_text() for rank in range(2))
    assert "saved: " in first and "texts: " in first
    assert second == ""


def test_evaluation_in_several_processes_is_refused(
    whole: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stopped:
        main("models.llama:LLaMA", ["--weights", str(whole("fsdp").output), "--job", "evaluate"])
    assert stopped.value.code == 2
    assert "evaluate runs in one process, and torchrun started several" in capsys.readouterr().err


class CursorlessTask(MixedTask):
    """Cannot say where it is."""

    def state_dict(self) -> None:  # type: ignore[override]
        return None


def test_a_task_that_cannot_say_where_it_is_is_not_resumed_by_another_number_of_processes(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    config = TrainConfig(steps=1, progress=False, state_path=str(path), resume=True)
    model = mixed_model()
    train(model, CursorlessTask(model), config)
    train(model, CursorlessTask(model), config)
    torch.save({**torch.load(path, weights_only=True), "world_size": 3}, path)
    with pytest.raises(ValueError, match=r"state\.pt is of 3 processes, and CursorlessTask cannot say"):
        train(model, CursorlessTask(model), config)


# ------------------------------------------------------------------------------------- states that are folders


def folder_with(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "part").write_text(text)
    return path


def test_while_a_folder_is_replaced_there_is_always_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file operation of the replacement is in turn the last that is done."""
    real = {"rename": Path.rename, "replace": os.replace, "rmtree": shutil.rmtree}
    for last in range(6):
        place = tmp_path / f"{last}/state-00000003.pt"
        place.parent.mkdir()
        folder_with(place, "old")
        left = [last]

        def dying(name: str, left: list[int] = left) -> Callable[..., Any]:
            def operation(*arguments: Any) -> Any:
                if not left[0]:
                    raise KeyboardInterrupt
                left[0] -= 1
                return real[name](*arguments)

            return operation

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", dying("rename"))
            patch.setattr(os, "replace", dying("replace"))
            patch.setattr(shutil, "rmtree", dying("rmtree"))
            try:
                put_in_place(folder_with(place.with_name(place.name + ".partial"), "new"), place)
            except KeyboardInterrupt:
                done = False
            else:
                done = True
        state = newest_state(place.with_name("state.pt"))
        assert state is not None and (state / "part").read_text() in ("old", "new")
        assert not done or (state / "part").read_text() == "new"
        again = place.with_name(place.name + ".partial")
        shutil.rmtree(again, ignore_errors=True)
        put_in_place(folder_with(again, "newer"), place)
        assert [path.name for path in place.parent.iterdir()] == [place.name]
        assert (place / "part").read_text() == "newer"
    assert done


def test_states_of_an_earlier_run_do_not_outlive_those_of_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    for step in (38, 40, 2):
        folder_with(state_file(path, step, numbered=True), str(step))
    folder_with(tmp_path / "state-00000038.pt.old", "38")
    keep_newest(path, 2, step=2)
    assert [state.name for state in tmp_path.iterdir()] == ["state-00000002.pt"]
    for step in (4, 6):
        folder_with(state_file(path, step, numbered=True), str(step))
        keep_newest(path, 2, step=step)
    assert sorted(state.name for state in tmp_path.iterdir()) == ["state-00000004.pt", "state-00000006.pt"]
