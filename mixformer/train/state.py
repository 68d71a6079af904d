"""The state of a run: written whole or not at all, found again, and with every random state in it."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a path beside `path` to write a file to, and move it there once it is whole and on the disk.

    A process that is killed meanwhile leaves the old file as it was. A folder can be written too, to a path that does
    not exist yet.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    _remove(partial)
    yield partial
    if partial.is_file():
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
    os.replace(partial, path)


def atomic_save(state: Any, path: str | Path) -> None:
    """Write a file of tensors so that the old one stays whole until the new one is."""
    with replacing(path) as partial:
        torch.save(state, partial)


def state_file(path: str | Path, step: int, numbered: bool) -> Path:
    """Where the state after a step goes: `path` itself, or `stem-step` beside it."""
    path = Path(path)
    return path.with_name(f"{path.stem}-{step:08d}{path.suffix}") if numbered else path


def newest_state(path: str | Path) -> Path | None:
    """The state to go on from: the newest of `path` and the numbered ones beside it; None if there is none."""
    path = Path(path)
    numbered = _numbered(path)
    found = [*numbered[-1:], *([path] if path.exists() else [])]
    return max(found, key=lambda file: file.stat().st_mtime_ns) if found else None


def keep_newest(path: str | Path, number: int) -> None:
    """Delete all numbered states but the newest `number`, and what a killed process left unfinished."""
    path = Path(path)
    for old in _numbered(path)[: -number or None]:
        _remove(old)
    for unfinished in path.parent.glob(f"{path.stem}-*{path.suffix}.partial"):
        _remove(unfinished)


def remove_states(path: str | Path) -> None:
    """Delete `path` and the numbered states beside it."""
    for old in (Path(path), *_numbered(Path(path))):
        _remove(old)


def _numbered(path: Path) -> list[Path]:
    pattern = re.compile(re.escape(path.stem) + r"-(\d{8})" + re.escape(path.suffix))
    beside = path.parent.iterdir() if path.parent.is_dir() else iter(())
    return sorted(file for file in beside if pattern.fullmatch(file.name))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def seed_all(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_states() -> dict[str, Any]:
    """The states of Python's, numpy's, torch's and CUDA's generators, of plain values and tensors."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [torch.from_numpy(np.asarray(keys, np.int64)), int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Set the generators to what `random_states` returned; on more or fewer GPUs, those that both have."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available():
        for index, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, index)


@contextmanager
def kept_random_states() -> Iterator[None]:
    """Whatever is drawn while entered, the generators go on after it as if nothing had been."""
    states = random_states()
    try:
        yield
    finally:
        restore_random_states(states)


class StopRequest:
    """Whether SIGTERM has come; a second one ends the process at once.

    Only the main thread of a process can listen; in others, nothing is changed.
    """

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """While entered, SIGTERM is noted instead of ending the process."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = signal.getsignal(signal.SIGTERM)

        def note(number: int, frame: Any) -> None:
            self.asked = True
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

        signal.signal(signal.SIGTERM, note)
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
