"""Tiny models, and one thread so that runs compare."""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from mixformer import BaseModel
from mixformer.testing import jitter, tiny_model
from mixformer.train.state import seed_all

torch.set_num_threads(1)
LIMIT = 400  # seconds; a test that takes longer hangs, and a suite that hangs tells nobody where
_stderr: list[int] = []


def pytest_configure(config: pytest.Config) -> None:
    _stderr.append(os.dup(sys.__stderr__.fileno()))  # before output is captured
    if getattr(config.option, "numprocesses", None):  # of pytest-xdist: fixtures of a file are made once
        config.option.dist, config.option.maxworkerrestart = "loadfile", "0"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    """End the whole run, with the stacks of all threads, at a test that hangs."""
    faulthandler.dump_traceback_later(LIMIT, exit=True, file=_stderr[0])
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    """Whatever tests ran before, a test draws the same."""
    seed_all(0)


@pytest.fixture
def make() -> Callable[..., BaseModel]:
    """make(kind, **config options) -> a tiny jittered model in eval mode."""

    def build(kind: str = "llama", **changes: object) -> BaseModel:
        model = tiny_model(kind, **changes)
        jitter(model)
        return model.eval()

    return build
