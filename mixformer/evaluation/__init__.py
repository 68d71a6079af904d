"""Judging models: metrics, and evaluations of files of questions with known answers."""

from mixformer.evaluation.metrics import METRICS, box_accuracy, centre_in_box, exact_match, perplexity, vqa_accuracy
from mixformer.evaluation.run import FileEvaluation, checkpoint_hash

__all__ = [
    "METRICS", "FileEvaluation", "box_accuracy", "centre_in_box", "checkpoint_hash", "exact_match", "perplexity",
    "vqa_accuracy",
]  # fmt: skip
