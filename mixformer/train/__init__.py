"""Training: one loop, tasks that say what is learned from, and stages of both."""

from mixformer.train.loop import TrainConfig, train
from mixformer.train.roles import Role, select_parameters
from mixformer.train.stages import EvaluateSection, Evaluation, Stage, Task, TrainSection, evaluate, run, run_stages
from mixformer.train.tasks import (
    ClassTask,
    ConversationTask,
    FileTask,
    InfillingTask,
    MaskedTextTask,
    PairTask,
    TextTask,
)

__all__ = [
    "ClassTask", "ConversationTask", "EvaluateSection", "Evaluation", "FileTask", "InfillingTask", "MaskedTextTask",
    "PairTask", "Role", "Stage", "Task", "TextTask", "TrainConfig", "TrainSection", "evaluate", "run", "run_stages",
    "select_parameters", "train",
]  # fmt: skip
