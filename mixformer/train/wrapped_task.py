"""A task around another."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mixformer.train.task import Losses, Task


class WrappedTask(Task):
    """Give the batches of another task in another form; all that it does not change is the other's.

    Args:
        task: the other one.
    """

    def __init__(self, task: Task) -> None:
        self.task = task

    def prepare(self, model: Any, processor: Any) -> None:
        self.task.prepare(model, processor)

    def shard(self, rank: int, world_size: int) -> None:
        self.task.shard(rank, world_size)

    def validation(self) -> Iterable[Any] | None:
        return self.task.validation()

    def loss(self, model: Any, batch: Any) -> Losses:
        return self.task.loss(model, batch)

    def count(self, model: Any, batch: Any) -> int:
        return self.task.count(model, batch)

    def state_dict(self) -> dict[str, Any] | None:
        return self.task.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.task.load_state_dict(state)

    def finish(self, model: Any) -> None:
        self.task.finish(model)
