"""Training in stages: each has a task, its own trainable parameters and its own schedule."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mixformer.train.loop import Losses, TrainConfig, atomic_save, model_losses, train


class Task:
    """What a stage learns from. Subclasses give batches; the rest has defaults."""

    def prepare(self, model: Any, processor: Any) -> None:
        """Get the model ready, say by adding mixins that only training needs."""

    def batches(self) -> Iterator[Any]:
        """Yield batches without end; runs after `prepare`.

        Raises:
            TypeError: a task that gives none.
        """
        raise TypeError(f"{type(self).__name__} must define batches().")

    def loss(self, model: Any, batch: Any) -> Losses:
        """Named losses of a batch; by default those of the objective of the model's class."""
        return model_losses(model, batch)

    def finish(self, model: Any) -> None:
        """Undo what `prepare` did; also runs when training stops with an error."""


class Evaluation:
    """What `--job evaluate` runs."""

    def __call__(self, model: Any, processor: Any) -> dict[str, Any]:
        """Return scores by name.

        Raises:
            TypeError: an evaluation that does not say how.
        """
        raise TypeError(f"{type(self).__name__} must define __call__(model, processor).")


@dataclass
class Stage:
    """One stage.

    Attributes:
        name: for the log.
        task: what it learns from.
        loop: the loop's options.
        trains: name of an entry of `stages` of the model's class, which says what is trainable and what is frozen;
            None where `loop` says it.
    """

    name: str
    task: Task
    loop: TrainConfig = field(default_factory=TrainConfig)
    trains: str | None = None

    def options(self, model: Any) -> TrainConfig:
        """The loop's options, with the parameters that `trains` names.

        Raises:
            ValueError: the class has no such stage, or `loop` says what is trained as well.
        """
        if self.trains is None:
            return self.loop
        known = getattr(type(model), "stages", None) or {}
        if self.trains not in known:
            names = f"it has {', '.join(known)}" if known else "it has none; say it in loop.trainable and loop.frozen"
            raise ValueError(
                f"Stage '{self.name}' trains '{self.trains}', which is no stage of {type(model).__name__}: {names}."
            )
        default = TrainConfig()
        if (self.loop.trainable, self.loop.frozen) != (default.trainable, default.frozen):
            raise ValueError(
                f"Stage '{self.name}' says what it trains twice, in trains: {self.trains} and in loop.trainable or "
                f"loop.frozen: keep one."
            )
        return replace(self.loop, trainable=list(known[self.trains].trainable), frozen=list(known[self.trains].frozen))


@dataclass
class TrainSection:
    """The `train:` section of a configuration.

    Attributes:
        stages: in order.
        output: folder that the trained model and its processor are saved to, relative to where the command runs.
        dtype: of the saved weights; None for the model's.
        logs: folder of the stages' logs, and of the weights after each stage; None for `{output}-logs`.
        keep_stages: whether to keep the weights after each stage.
        resume: go on after the last stage whose weights were kept.
    """

    stages: list[Stage] = field(default_factory=list)
    output: str = "runs/trained"
    dtype: str | None = None
    logs: str | None = None
    keep_stages: bool = False
    resume: bool = False


@dataclass
class EvaluateSection:
    """The `evaluate:` section of a configuration.

    Attributes:
        evaluation: what is judged.
        output: JSON file that the scores are written to, relative to where the command runs; None for no file.
    """

    evaluation: Evaluation | None = None
    output: str | None = None


def run_stages(
    model: Any, stages: list[Stage], processor: Any = None, logs: str | Path | None = None, keep_stages: bool = False,
    resume: bool = False,
) -> dict[str, dict[str, float]]:
    """Run the stages one after the other on one model.

    Args:
        model: changed in place.
        stages: in order; names must differ.
        processor: what tasks make their batches with.
        logs: folder of `{name}.jsonl` logs, for stages that name no log of their own.
        keep_stages: write the weights after each stage to `{name}.pt` in that folder.
        resume: go on after the last stage whose weights lie there.

    Returns:
        what `train` returned, by stage that ran.

    Raises:
        ValueError: no stages, two stages of one name, a stage that the model's class does not have, and what `train`
            raises.
    """
    names = [stage.name for stage in stages]
    if not stages or len(set(names)) < len(names):
        raise ValueError(f"Training takes one stage or more, each with a name of its own; got {names}.")
    folder = None if logs is None else Path(logs)
    first, results = 0, {}
    if resume and folder is not None:
        kept = [index for index, name in enumerate(names) if (folder / f"{name}.pt").exists()]
        if kept:
            first = kept[-1] + 1
            model.load_state_dict(torch.load(folder / f"{names[kept[-1]]}.pt", weights_only=True))
    loops = [stage.options(model) for stage in stages]
    for stage, loop in list(zip(stages, loops, strict=True))[first:]:
        if folder is not None and loop.log_path is None:
            loop = replace(loop, log_path=str(folder / f"{stage.name}.jsonl"))
        stage.task.prepare(model, processor)
        try:
            results[stage.name] = train(model, stage.task.batches(), loop, stage.task.loss)
        finally:
            stage.task.finish(model)
        if keep_stages and folder is not None:
            atomic_save(model.state_dict(), folder / f"{stage.name}.pt")
    return results


def run(model: Any, processor: Any, settings: Any) -> dict[str, Any]:
    """Train by the `train:` section of the settings and save the result.

    Raises:
        ValueError: there is no such section.
    """
    from mixformer.checkpoint import save_pretrained

    section = settings.train
    if section is None or not section.stages:
        raise ValueError("There is nothing to train on: give train.stages in the configuration file.")
    torch.manual_seed(settings.seed)
    logs = section.logs or f"{section.output}-logs"  # a checkpoint is not written into a folder of other things
    results = run_stages(model, section.stages, processor, logs, section.keep_stages, section.resume)
    if section.dtype is not None:
        model = model.to(getattr(torch, section.dtype))
    save_pretrained(model, section.output, processor=processor)
    return {**results, "saved": section.output}


def evaluate(model: Any, processor: Any, settings: Any) -> dict[str, Any]:
    """Judge the model by the `evaluate:` section of the settings.

    Raises:
        ValueError: there is no such section.
    """
    section = settings.evaluate
    if section is None or section.evaluation is None:
        raise ValueError("There is nothing to judge by: give evaluate.evaluation in the configuration file.")
    scores: dict[str, Any] = section.evaluation(model.eval(), processor)
    if section.output is not None:
        path = Path(section.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    return scores
