"""Learning rate schedules: factors on the highest rate, by step."""

from __future__ import annotations

import math
from typing import Protocol

SCHEDULES = ("cosine", "linear", "constant")


class Scheduled(Protocol):
    """What a schedule reads; `TrainConfig` has it."""

    schedule: str
    steps: int
    warmup_steps: int
    final_rate: float
    schedule_start: int
    schedule_steps: int | None


def learning_rate_factor(step: int, config: Scheduled) -> float:
    """Factor on the rate at a step (from 0): linear warm-up, then down to `final_rate` at the schedule's last step.

    `cosine` falls slowly at both ends, `linear` evenly, `constant` stays at 1.
    """
    step += config.schedule_start
    steps = config.schedule_steps or config.schedule_start + config.steps
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    left = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.final_rate + (1 - config.final_rate) * left
