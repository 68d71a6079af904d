"""What the training loop asks of the processes that it runs on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from mixformer.train.state import atomic_save


class Engine:
    """One process, one device. `mixformer.train.parallel` has those of many.

    Attributes:
        rank: number of this process.
        world_size: number of processes.
        gradient_scale: what losses are multiplied by so that gradients come out summed over the processes.
        state_is_folder: a state is a folder, which cannot be replaced at once: each gets a name of its own.
    """

    rank: int = 0
    world_size: int = 1
    gradient_scale: float = 1.0
    state_is_folder: bool = False

    def prepare(self, model: nn.Module) -> Any:
        """The model to call in training: itself, sharded in place or wrapped. Before the optimiser is made."""
        return model

    def losses(
        self, model: Any, loss: Callable[[Any, Any], dict[str, torch.Tensor]], batch: Any
    ) -> dict[str, torch.Tensor]:
        """Named losses of a batch; `model` is what `prepare` returned."""
        return loss(model, batch)

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a number over all processes."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """What each process gave, by rank; plain values only."""
        return [value]

    def agree(self, value: Any, what: str) -> None:
        """Make sure that every process found the same, such as a file; plain values only.

        Raises:
            ValueError: they did not.
        """
        found = self.gather(value)
        if any(each != found[0] for each in found):
            each = ", ".join(f"process {rank}: {each}" for rank, each in enumerate(found))
            raise ValueError(
                f"The processes do not find the same {what} ({each}). Put logs and states on a file system that all "
                f"machines share."
            )

    def in_step(self, batches: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
        """The batches, as many on every process, each with whether it is new.

        Where they run out, the last is given again until all processes are done: forwards need all of them.

        Raises:
            ValueError: a process has none, and others have.
        """
        for batch in batches:
            yield batch, True

    def accumulating(self, model: Any, last: bool) -> AbstractContextManager[Any]:
        """Entered around forward and backward of one batch of a step; gradients need to agree after the last only."""
        return nullcontext()

    def clip(self, parameters: Iterable[torch.Tensor], largest: float) -> torch.Tensor:
        """Scale the gradients so that their norm over all processes is at most `largest`; the norm before."""
        return nn.utils.clip_grad_norm_(list(parameters), largest)

    @contextmanager
    def whole(self, model: Any) -> Iterator[Any]:
        """The model with whole weights on the first process, to save it there; None on the others. All enter it."""
        yield model

    def save_state(
        self, path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, extra: dict[str, Any],
        averages: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Write the state of a run to `path`, whole or not at all; every process calls it.

        Args:
            path: a file, or a folder where `state_is_folder`.
            model, optimizer: what is trained.
            extra: plain values and tensors of this process.
            averages: tensors laid out as the trainable parameters.
        """
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **extra}
        atomic_save(state if averages is None else {**state, "averages": dict(averages)}, path)

    def load_state(
        self, path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer,
        averages: Mapping[str, torch.Tensor] | None = None,
    ) -> dict[str, Any]:
        """Read what `save_state` wrote into model, optimizer and averages, and return the rest.

        A folder that several processes wrote is read as well.

        Raises:
            ValueError: averages are asked for and the state has none.
        """
        if Path(path).is_dir():
            from mixformer.train.parallel import load_folder

            return load_folder(path, model, optimizer, averages)
        extra: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        model.load_state_dict(extra.pop("model"))
        optimizer.load_state_dict(extra.pop("optimizer"))
        stored = extra.pop("averages", None)
        if averages is not None:
            if stored is None or set(stored) != set(averages):
                raise ValueError(f"{path} has no averages of these weights: it was written without `ema`.")
            for name, value in averages.items():
                value.copy_(stored[name])
        return extra

    def close(self) -> None:
        """Leave the group of processes."""
