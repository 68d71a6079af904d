"""Samples that training leaves out: named and counted in its log, once each, whatever stops and resumes it."""

import json
import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mixformer.cli import main
from mixformer.data.skipped import Skipped, report
from mixformer.train.log import RunLog, flat_numbers
from mixformer.train.plot import read_curves

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
ROOT = Path(__file__).parents[1]
SIZE = {"hidden_size": 16, "num_heads": 2, "inner_hidden_size": 16}
CONFIG = {
    "model_class": "models.llava:LLaVA",
    "processor": str(ROOT / "examples" / "zoo" / "llava"),
    "tokenizer": str(ROOT / "examples" / "zoo" / "shapes" / "tokenizer.model"),
    "model": {"vocab_size": 119, "num_layers": 1, "max_positions": 256, "image_token_id": 5, **SIZE,
              "vision": {"num_layers": 1, "num_layers_run": 1, "image_size": 32, "patch_size": 8, **SIZE}},
}  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_data(folder: Path) -> Path:
    """Ten samples: line 3 has a picture that is none, line 6 no JSON, line 8 an empty answer."""
    rows = []
    for number in range(1, 11):
        Image.new("RGB", (8, 6), (number, 0, 0)).save(folder / f"{number}.png")
        said = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "" if number == 8 else "red"}]
        rows.append(json.dumps({"messages": said, "images": [f"{number}.png"]}))
    (folder / "3.png").write_bytes(b"<html>")
    rows[5] = rows[5][:-9]
    (folder / "data.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder / "data.jsonl"


def train_job(folder: Path, *further: str, steps: int = 8, save_every: int = 0, workers: int = 0) -> str:
    file = write_data(folder)
    reading = {"num_workers": workers, "broken": "skip", "unusable": "skip"}
    task = {"class_path": "mixformer.train.tasks.ConversationTask",
            "init_args": {"file": str(file), "batch_size": 3, "reading": reading}}  # fmt: skip
    loop = {"steps": steps, "log_every": 3, "progress": False, "save_every": save_every}
    stages = [{"name": "only", "task": task, "loop": loop}]
    config = {**CONFIG, "train": {"stages": stages, "output": str(folder / "out"), "logs": str(folder / "logs")}}
    (folder / "train.yaml").write_text(json.dumps(config), encoding="utf-8")
    main("models.llava:LLaVA", ["--config", str(folder / "train.yaml"), "--job", "train", *further])
    return str(file)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_training_job_names_and_counts_what_it_leaves_out(
    tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    file = train_job(tmp_path, workers=workers)  # 24 samples drawn: two rounds of ten, and some
    log = tmp_path / "logs" / "only.jsonl"
    named = [record["skipped_sample"] for record in lines(log) if "skipped_sample" in record]
    assert {(sample["sample"], sample["kind"]) for sample in named} == {
        (f"{file}:3", "broken"), (f"{file}:6", "broken"), (f"{file}:8", "unusable")
    }  # fmt: skip
    assert len(named) == 3
    reasons = {sample["sample"].rpartition(":")[2]: sample["reason"] for sample in named}
    assert "not a picture" in reasons["3"] and "not valid JSON" in reasons["6"] and "empty answer" in reasons["8"]
    assert all(sample["reason"].startswith(f"{file}, line ") for sample in named)
    last = lines(log)[-1]
    assert last["step"] == 8 and last["skipped"] == {"broken": 2, "unusable": 1}
    messages = [record.getMessage() for record in caplog.records]
    assert f"3 sample(s) were left out of the training: 2 broken, 1 unusable. {log} names them." in messages
    assert sum("(1 so far)" in message for message in messages) == 1
    assert [name for name in read_curves(log)[0]["losses"] if "skipped" in name] == []  # no loss of that name


def test_a_resumed_job_names_every_sample_once(tmp_path: Path) -> None:
    for stop in (2, 4):
        folder = tmp_path / f"{stop}"
        folder.mkdir()
        log = folder / "logs" / "only.jsonl"
        train_job(folder, steps=stop, save_every=1)
        with log.open("a", encoding="utf-8") as file:  # what a run that was killed later has written on
            late = {"sample": f"{folder}/data.jsonl:3", "kind": "broken", "reason": "x"}
            file.write(json.dumps({"step": stop + 1, "skipped_sample": late}) + '\n{"step": 7, "skip')
        train_job(folder, "--train.resume=true", steps=8, save_every=1)
        named = [record["skipped_sample"]["sample"] for record in lines(log) if "skipped_sample" in record]
        assert sorted(Path(name).name for name in named) == ["data.jsonl:3", "data.jsonl:6", "data.jsonl:8"]
        assert lines(log)[-1]["skipped"] == {"broken": 2, "unusable": 1}


def test_trackers_get_the_number_of_samples_left_out_and_go_back_with_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    class Writer:
        def __init__(self, log_dir: str, purge_step: int | None = None) -> None:
            self.folder, self.purge_step, self.written = log_dir, purge_step, list[tuple[str, float, int]]()
            self.closed = False
            made.append(self)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.written.append((name, value, step))

        def close(self) -> None:
            self.closed = True

    boards: Any = types.ModuleType("torch.utils.tensorboard")
    boards.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", boards)
    log = RunLog(tmp_path / "log.jsonl", ["tensorboard"], {})
    log.write({"step": 1, "total": 2.0})
    report(Skipped("a.jsonl:1", "broken", "why"), 1)
    report(Skipped("a.jsonl:1", "broken", "why"), 2)
    log.write({"step": 2, "total": 1.0})
    assert made[0].written == [("total", 2.0, 1), ("total", 1.0, 2), ("skipped/broken", 1, 2)]
    log.close()
    report(Skipped("a.jsonl:2", "broken", "why"), 3)  # nobody listens
    assert [record["step"] for record in lines(tmp_path / "log.jsonl")] == [1, 1, 2]
    resumed = RunLog(tmp_path / "log.jsonl", ["tensorboard"], {})
    resumed.rewind(1)
    assert made[1].closed and made[2].purge_step == 2 and made[2].folder == made[0].folder
    assert resumed.counts() == {"broken": 1}
    report(Skipped("a.jsonl:1", "broken", "why"), 1)
    assert [record["step"] for record in lines(tmp_path / "log.jsonl")] == [1, 1]
    resumed.close()


def test_processes_without_a_file_count_too(caplog: pytest.LogCaptureFixture) -> None:
    log = RunLog(None, (), {})
    with caplog.at_level(logging.WARNING):
        report(Skipped("a.jsonl:1", "unusable", "why"), 1)
        log.close()
    assert caplog.messages[-1] == "1 sample(s) were left out of the training: 1 unusable."
    quiet = RunLog(None, (), {})
    quiet.close()
    assert len(caplog.messages) == 2


def test_numbers_of_a_record_are_not_those_of_samples_left_out() -> None:
    record = {"step": 3, "skipped": {"broken": 2}, "validation": {"total": 1.5}, "skipped_sample": {"sample": "a"}}
    assert flat_numbers(record) == {"step": 3, "validation/total": 1.5}


def test_the_real_tensorboard_reads_every_number_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path / "run.jsonl", ["tensorboard"], {})
    for step in range(1, 6):
        log.write({"step": step, "total": 1.0 / step, "validation": {"total": 2.0 / step}})
    resumed = RunLog(tmp_path / "run.jsonl", ["tensorboard"], {})  # the first was killed
    resumed.rewind(3)
    for step in range(4, 8):
        resumed.write({"step": step, "total": 1.0 / step, "validation": {"total": 2.0 / step}})
    resumed.close()
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    for name, scale in (("total", 1.0), ("validation/total", 2.0)):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(step, float(torch.tensor(scale / step))) for step in range(1, 8)]
        assert found == expected
    log.close()
