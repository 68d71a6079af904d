"""Training in stages: each has a task, its own trainable parameters and its own schedule."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mixformer.filling import saving
from mixformer.train.engine import Engine
from mixformer.train.loop import TrainConfig, train
from mixformer.train.state import atomic_save, newest_state, remove_states, seed_all
from mixformer.train.task import Task

__all__ = ["EvaluateSection", "Evaluation", "Stage", "Task", "TrainSection", "evaluate", "run", "run_stages"]


STATE_SUFFIX = ".state.pt"


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
        validation: what it is validated on; None for what `task` keeps apart for that, if anything.
        trains: name of an entry of `stages` of the model's class, which says what is trainable and what is frozen;
            None where `loop` says it.
    """

    name: str
    task: Task
    loop: TrainConfig = field(default_factory=TrainConfig)
    trains: str | None = None
    validation: Task | None = None

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
        logs: folder of the stages' logs and states, and of the weights after each stage; None for `{output}-logs`.
        keep_stages: whether to keep the weights after each stage.
        resume: go on from the last state that was saved, or after the last stage whose weights were kept.
        engine: how the processes that torchrun starts share the work: `ddp`, `fsdp`, `single` for one process, or
            `auto`, which is ddp for models below a billion parameters.
        replicas: groups of processes that hold all weights each, with fsdp.
    """

    stages: list[Stage] = field(default_factory=list)
    output: str = "runs/trained"
    dtype: str | None = None
    logs: str | None = None
    keep_stages: bool = False
    resume: bool = False
    engine: str = "auto"
    replicas: int = 1


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
    resume: bool = False, engine: Engine | None = None,
) -> dict[str, dict[str, float]]:
    """Run the stages one after the other on one model.

    Args:
        model: changed in place.
        stages: in order; names must differ.
        processor: what tasks make their batches with.
        logs: folder of `{name}.jsonl` logs and `{name}.state.pt` states, for stages that name none of their own. Such
            a state is written every `loop.save_every` steps and on SIGTERM, and deleted when the next stage is done and
            has a state or weights of its own.
        keep_stages: write the weights after each stage to `{name}.pt` in that folder.
        resume: go on from the last state that was saved, or else after the last stage whose weights lie there.
        engine: the processes that train together; one by default.

    Returns:
        what `train` returned, by stage that ran.

    Raises:
        ValueError: no stages, two stages of one name, a stage that the model's class does not have, and what `train`
            raises.
    """
    names = [stage.name for stage in stages]
    if not stages or len(set(names)) < len(names):
        raise ValueError(f"Training takes one stage or more, each with a name of its own; got {names}.")
    engine = Engine() if engine is None else engine
    folder = None if logs is None else Path(logs)
    loops = [_with_files(stage.options(model), stage.name, folder) for stage in stages]
    states = [loop.state_path for loop in loops if loop.state_path is not None]
    if len(set(states)) < len(states):
        raise ValueError(f"Stages share a state_path ({', '.join(states)}): give each its own, or leave it out.")
    first, results = 0, {}
    if resume:
        first = _first_left(model, names, loops, folder)
        engine.agree(first, "stage to go on with")
        loops = [replace(loop, resume=True) for loop in loops]
    for index in range(first, len(stages)):
        stage, loop = stages[index], loops[index]
        prepared = [task for task in (stage.task, stage.validation) if task is not None]
        for task in prepared:
            task.prepare(model, processor)
        try:
            results[stage.name] = train(model, stage.task, loop, validation=stage.validation, engine=engine)
        finally:
            for task in reversed(prepared):
                task.finish(model)
        if folder is None:
            continue
        if keep_stages:
            _keep(model, folder / f"{stage.name}.pt", engine)
        has_state = loop.state_path is not None and newest_state(loop.state_path) is not None
        if index and engine.rank == 0 and (keep_stages or has_state):
            remove_states(folder / f"{names[index - 1]}{STATE_SUFFIX}")
    return results


def _keep(model: Any, path: Path, engine: Engine) -> None:
    """Write the weights after a stage; every process calls it."""
    with engine.whole(model) as whole:
        if whole is not None:
            with saving(whole):
                atomic_save(whole.state_dict(), path)


def _with_files(loop: TrainConfig, name: str, folder: Path | None) -> TrainConfig:
    if folder is not None and loop.log_path is None:
        loop = replace(loop, log_path=str(folder / f"{name}.jsonl"))
    if folder is not None and loop.state_path is None:
        state = str(folder / f"{name}{STATE_SUFFIX}")
        loop = replace(loop, state_path=state, save_at_end=loop.save_at_end and loop.save_every > 0)
    return loop


def _first_left(model: Any, names: list[str], loops: list[TrainConfig], folder: Path | None) -> int:
    """Number of the stage to go on with: the last that has a state, or the one after kept weights, which are loaded."""
    for index in reversed(range(len(names))):
        path = loops[index].state_path
        if path is not None and newest_state(path) is not None:
            return index
        kept = None if folder is None else folder / f"{names[index]}.pt"
        if kept is not None and kept.exists():
            model.load_state_dict(torch.load(kept, weights_only=True, map_location="cpu"))
            return index + 1
    return 0


def run(model: Any, processor: Any, settings: Any) -> dict[str, Any]:
    """Train by the `train:` section of the settings and save the result; every process of torchrun calls it.

    Raises:
        ValueError: there is no such section.
    """
    from mixformer.checkpoint import save_pretrained
    from mixformer.train.parallel import engine_of

    section = settings.train
    if section is None or not section.stages:
        raise ValueError("There is nothing to train on: give train.stages in the configuration file.")
    engine = engine_of(section.engine, model, section.replicas)
    try:
        seed_all(settings.seed + engine.rank)
        logs = section.logs or f"{section.output}-logs"  # a checkpoint is not written into a folder of other things
        results = run_stages(model, section.stages, processor, logs, section.keep_stages, section.resume, engine)
        with engine.whole(model) as whole:
            if whole is not None:
                whole = whole if section.dtype is None else whole.to(getattr(torch, section.dtype))
                save_pretrained(whole, section.output, processor=processor)
    finally:
        engine.close()
    return {**results, "saved": section.output}


def evaluate(model: Any, processor: Any, settings: Any) -> dict[str, Any]:
    """Judge the model by the `evaluate:` section of the settings.

    Raises:
        ValueError: there is no such section.
    """
    section = settings.evaluate
    if section is None or section.evaluation is None:
        raise ValueError("There is nothing to judge by: give evaluate.evaluation in the configuration file.")
    if getattr(section.evaluation, "checkpoint", "") is None and settings.weights is not None:
        section.evaluation.checkpoint = str(settings.weights)  # its hash goes into the results
    scores: dict[str, Any] = section.evaluation(model.eval(), processor)
    if section.output is not None:
        path = Path(section.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    return scores
