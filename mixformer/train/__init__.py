"""Training: one loop, tasks that say what is learned from, and stages of both."""

from mixformer.train.loop import TrainConfig, select_parameters, train
from mixformer.train.stages import EvaluateSection, Evaluation, Stage, Task, TrainSection, evaluate, run, run_stages

__all__ = [
    "EvaluateSection", "Evaluation", "Stage", "Task", "TrainConfig", "TrainSection", "evaluate", "run", "run_stages",
    "select_parameters", "train",
]  # fmt: skip
