"""The log of a run: JSON lines always, tensorboard and wandb where asked for, and the running means it holds."""

from __future__ import annotations

import importlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mixformer.data.skipped import Skipped, unwatch, watch

TRACKERS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
"""Where the log can go besides its file, and the module that takes it there; each has an extra of its name.

In tensorboard a resumed run replaces what was written after the step that it goes on from; in wandb it is a run of its
own of the same name.
"""

SKIPPED = "skipped"
"""The field of a record that has the number of samples left out so far, by kind."""

SKIPPED_SAMPLE = "skipped_sample"
"""The field of a record that names one of them: `sample`, `kind` and `reason`."""

log = logging.getLogger(__name__)


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


def summed_means(states: Iterable[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """What several processes have, from the `state_dict` of each, as the state of one that has it all."""
    found: dict[str, dict[str, float]] = {"sums": {}, "weights": {}}
    for state in states:
        for part, numbers in found.items():
            for name, value in state[part].items():
                numbers[name] = numbers.get(name, 0.0) + value
    return found


def merged_means(states: Iterable[Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """Means over what several processes have, from the `state_dict` of each."""
    found = summed_means(states)
    return {name: found["sums"][name] / weight for name, weight in found["weights"].items() if weight}


class RunLog:
    """Writes records, one a line, with the step that they belong to.

    Each sample that a process leaves out gets a record when it is left out for the first time, with the step of the
    record before it; from then on every record has their number, and at the end it is said.

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
        self.step, self._news = 0, list[Skipped]()
        self.samples: dict[str, str] = {}
        self.writers = [_tracker(name, self.path, dict(options)) for name in trackers if self.path is not None]
        watch(self)

    def rewind(self, step: int) -> None:
        """Drop what a stopped run wrote after the step that is gone on from, and a last line that it did not finish."""
        self.step = step
        for writer in self.writers:
            writer.rewind(step)
        if self.path is None or not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines()
        records = [(line, parsed_record(line)) for line in lines]
        left = [(line, record) for line, record in records if record is not None and record["step"] <= step]
        named = [record[SKIPPED_SAMPLE] for _, record in left if SKIPPED_SAMPLE in record]
        self.samples.update((sample["sample"], sample["kind"]) for sample in named)
        kept = [line for line, _ in left]
        if kept != lines:
            rewritten = self.path.with_name(self.path.name + ".partial")
            rewritten.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            os.replace(rewritten, self.path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a record; it has `step`."""
        self.step, counts = int(record["step"]), self.counts()
        self._append({**record, SKIPPED: counts} if counts else record)
        numbers = {**flat_numbers(record), **{f"{SKIPPED}/{kind}": number for kind, number in counts.items()}}
        numbers.pop("step")
        for writer in self.writers:
            writer.write(self.step, numbers)

    def skipped(self, sample: Skipped) -> None:
        """Name a sample that is left out, the first time that it is."""
        if sample.where not in self.samples:
            self.samples[sample.where] = sample.kind
            self._news.append(sample)
            told = {"sample": sample.where, "kind": sample.kind, "reason": sample.reason}
            self._append({"step": self.step, SKIPPED_SAMPLE: told})

    def news(self) -> list[Skipped]:
        """The samples that were named since this was asked for the last time, to tell the process that writes."""
        news, self._news = self._news, []
        return news

    def counts(self) -> dict[str, int]:
        """How many different samples were left out, by kind; those of the run that is gone on with as well."""
        return dict(sorted(Counter(self.samples.values()).items()))

    def _append(self, record: Mapping[str, Any]) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Let the trackers finish, and say how many samples were left out."""
        unwatch(self)
        for writer in self.writers:
            writer.close()
        if self.samples:
            kinds = ", ".join(f"{number} {kind}" for kind, number in self.counts().items())
            named = "" if self.path is None else f" {self.path} names them."
            log.warning("%d sample(s) were left out of the training: %s.%s", len(self.samples), kinds, named)


def parsed_record(line: str) -> dict[str, Any] | None:
    """The record of a line; None for one that was not written to its end."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def flat_numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record but those of samples left out; those of a nested one as "outer/inner"."""
    numbers: dict[str, float] = {}
    for name, value in record.items():
        if name == SKIPPED:
            continue
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
        self.module, self.folder = module, str(path.with_suffix(""))
        self.writer = module.SummaryWriter(log_dir=self.folder)

    def rewind(self, step: int) -> None:
        self.writer.close()
        self.writer = self.module.SummaryWriter(log_dir=self.folder, purge_step=step + 1)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, module: Any, path: Path, options: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.run = module.init(project=path.parent.name, name=path.stem, dir=str(path.parent), config=options)

    def rewind(self, step: int) -> None:
        """A run in wandb cannot go back."""

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log(numbers, step=step)

    def close(self) -> None:
        self.run.finish()
