"""Task: what is learned from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from mixformer.train.engine import Engine

Losses = dict[str, torch.Tensor]
LossFunction = Callable[[Any, Any], Losses]


def model_losses(model: Any, batch: dict[str, Any]) -> Losses:
    """Losses by the objective of the model's class; without one, the auxiliary losses that its mixins made."""
    objective = getattr(model, "objective", None)
    losses: Losses = model.run(**batch).losses if objective is None else objective(model, batch)
    return losses


def model_count(model: Any, batch: Any) -> int:
    """What the objective of the model's class divides the losses of a batch by; 1 where it does not say."""
    count = getattr(getattr(model, "objective", None), "count", None)
    return 1 if count is None else int(count(batch))


class Task:
    """What a stage learns from. Subclasses give batches; the rest has defaults.

    A batch is what `loss` takes, commonly a dict of tensors for `model.run` with `labels`. `_samples`, a list of
    names, says where its rows come from: the loop takes it out, and names them when a loss is not finite.
    """

    def prepare(self, model: Any, processor: Any) -> None:
        """Get the model ready, say by adding mixins that only training needs."""

    def shard(self, rank: int, world_size: int) -> None:
        """Give only the rows of one process from now on; called before `batches`.

        Raises:
            ValueError: several processes, which would all learn the same.
        """
        if world_size > 1:
            raise ValueError(
                f"{type(self).__name__} gives every process the same batches: it must define shard(rank, world_size) "
                f"to be trained on {world_size} processes."
            )

    def batches(self) -> Iterator[Any]:
        """Yield batches without end; runs after `prepare`.

        Raises:
            TypeError: a task that gives none.
        """
        raise TypeError(f"{type(self).__name__} must define batches().")

    def validation(self) -> Iterable[Any] | None:
        """The batches to validate on, the same each time; None for no validation."""
        return None

    def loss(self, model: Any, batch: Any) -> Losses:
        """Named losses of a batch, means over what `count` counts; by default those of the model's objective."""
        return model_losses(model, batch)

    def count(self, model: Any, batch: Any) -> int:
        """How much a batch weighs among those of a step: the supervised tokens that its loss is a mean over.

        A task with a loss of its own counts 1 a batch unless it says otherwise.
        """
        return model_count(model, batch) if type(self).loss is Task.loss else 1

    def state_dict(self) -> dict[str, Any] | None:
        """Where the next batch begins, of plain values and tensors.

        None where a task cannot say: then a resumed run draws the batches once more that were learned from, and drops
        them.
        """
        return None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where `state_dict` was; called after `prepare`, before the first batch."""

    def finish(self, model: Any) -> None:
        """Undo what `prepare` did; also runs when training stops with an error."""


class GivenBatches(Task):
    """Batches that the caller has, with a loss. A resumed run takes the rest of them from the caller.

    Args:
        batches: an iterable.
        loss: (model, batch) -> named losses.
    """

    def __init__(self, batches: Iterable[Any], loss: LossFunction) -> None:
        self.given, self.given_loss = batches, loss

    def shard(self, rank: int, world_size: int) -> None:
        """Every process was given its own."""

    def batches(self) -> Iterator[Any]:
        return iter(self.given)

    def loss(self, model: Any, batch: Any) -> Losses:
        return self.given_loss(model, batch)

    def count(self, model: Any, batch: Any) -> int:
        return model_count(model, batch) if self.given_loss is model_losses else 1

    def state_dict(self) -> dict[str, Any]:
        return {}


class TaskStream:
    """The batches of a task with the cursor that a resumed run needs.

    Args:
        task: what is learned from.
        engine: the processes that share it.
    """

    def __init__(self, task: Task, engine: Engine) -> None:
        self.task, self.drawn = task, 0
        task.shard(engine.rank, engine.world_size)
        self.stream: Iterator[Any] | None = None

    def draw(self, step: int) -> tuple[Any, list[str]]:
        """The next batch, and the names of its samples.

        Raises:
            ValueError: there is none.
        """
        if self.stream is None:
            self.stream = iter(self.task.batches())
        try:
            batch = next(self.stream)
        except StopIteration:
            raise ValueError(
                f"The batches ran out at step {step}. Give `steps` x `accumulate` batches, or fewer steps."
            ) from None
        self.drawn += 1
        return without_samples(batch)

    def state_dict(self) -> dict[str, Any]:
        """The task's cursor, and how many batches were drawn."""
        return {"drawn": self.drawn, "task": self.task.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was."""
        if state["task"] is None:
            for _ in range(state["drawn"]):
                self.draw(0)
        else:
            self.task.load_state_dict(state["task"])
        self.drawn = state["drawn"]


def without_samples(batch: Any) -> tuple[Any, list[str]]:
    """A batch without its `_samples`, and those."""
    if not isinstance(batch, dict) or "_samples" not in batch:
        return batch, []
    return {name: value for name, value in batch.items() if name != "_samples"}, list(batch["_samples"])
