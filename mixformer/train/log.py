"""The log of a run: JSON lines always, tensorboard and wandb where asked for, and the running means it holds."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

TRACKERS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
"""Where the log can go besides its file, and the module that takes it there; each has an extra of its name."""


class RunningMeans:
    """Weighted means of the recent past of named numbers; what lies n steps back counts memory^n as much.

    Args:
        memory: share that stays after a step.
    """

    def __init__(self, memory: float = 0.95) -> None:
        self.memory = memory
        self.sums: dict[str, float] = {}
        self.weights: dict[str, float] = {}

    def update(self, values: Mapping[str, tuple[float, float]]) -> None:
        """Take the numbers of one more step in, as {name: (weighted sum, weight)}."""
        for name, (total, weight) in values.items():
            self.sums[name] = self.memory * self.sums.get(name, 0.0) + total
            self.weights[name] = self.memory * self.weights.get(name, 0.0) + weight

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Plain values to go on from."""
        return {"sums": dict(self.sums), "weights": dict(self.weights)}

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        """Go on from what `state_dict` returned."""
        self.sums, self.weights = dict(state["sums"]), dict(state["weights"])


def merged_means(states: Iterable[Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """Means over what several processes have, from the `state_dict` of each."""
    sums: dict[str, float] = {}
    weights: dict[str, float] = {}
    for state in states:
        for name, value in state["sums"].items():
            sums[name] = sums.get(name, 0.0) + value
            weights[name] = weights.get(name, 0.0) + state["weights"][name]
    return {name: sums[name] / weights[name] for name in sums if weights[name]}


class RunLog:
    """Writes records, one a line, with the step that they belong to.

    Args:
        path: JSON-lines file that is appended to; None for none.
        trackers: names out of `TRACKERS`.
        options: what the run was started with, for trackers that show it.

    Raises:
        ValueError: a tracker whose package is not installed, or trackers and no path: they are named after it.
    """

    def __init__(self, path: str | Path | None, trackers: Sequence[str], options: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        if trackers and self.path is None:
            raise ValueError(f"The log also goes to {', '.join(trackers)}, which takes its name from log_path: set it.")
        self.writers = [_tracker(name, self.path, dict(options)) for name in trackers if self.path is not None]

    def rewind(self, step: int) -> None:
        """Drop what a stopped run wrote after the step that is gone on from, and a last line that it did not finish."""
        if self.path is None or not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if (record := parsed_record(line)) is not None and record["step"] <= step]
        if kept != lines:
            rewritten = self.path.with_name(self.path.name + ".partial")
            rewritten.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            os.replace(rewritten, self.path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a record; it has `step`."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        numbers = flat_numbers(record)
        for writer in self.writers:
            writer.write(int(numbers.pop("step", record["step"])), numbers)

    def close(self) -> None:
        """Let the trackers finish."""
        for writer in self.writers:
            writer.close()


def parsed_record(line: str) -> dict[str, Any] | None:
    """The record of a line; None for one that was not written to its end."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def flat_numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record; those of a nested one as "outer/inner"."""
    numbers: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            numbers.update({f"{name}/{inner}": number for inner, number in flat_numbers(value).items()})
        elif isinstance(value, (int, float)):
            numbers[name] = value
    return numbers


def _tracker(name: str, path: Path, options: dict[str, Any]) -> Any:
    try:
        module = importlib.import_module(TRACKERS[name])
    except ImportError as error:
        raise ValueError(
            f"The log is to go to {name}, which is not installed: pip install 'mixformer[{name}]', or take it out of "
            f"trackers."
        ) from error
    return _Tensorboard(module, path) if name == "tensorboard" else _Wandb(module, path, options)


class _Tensorboard:
    def __init__(self, module: Any, path: Path) -> None:
        self.writer = module.SummaryWriter(log_dir=str(path.with_suffix("")))

    def write(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, module: Any, path: Path, options: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.run = module.init(project=path.parent.name, name=path.stem, dir=str(path.parent), config=options)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log(numbers, step=step)

    def close(self) -> None:
        self.run.finish()
