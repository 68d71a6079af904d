"""Tiny models, and one thread so that runs compare."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mixformer import BaseModel
from mixformer.testing import jitter, tiny_model

torch.set_num_threads(1)


@pytest.fixture
def make() -> Callable[..., BaseModel]:
    """make(kind, **config options) -> a tiny jittered model in eval mode."""

    def build(kind: str = "llama", **changes: object) -> BaseModel:
        model = tiny_model(kind, **changes)
        jitter(model)
        return model.eval()

    return build
