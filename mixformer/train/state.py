"""The state of a run: written whole or not at all, found again, and with every random state in it."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

PARTIAL, OLD = ".partial", ".old"
"""What is put behind the name of a state that is not whole yet, and behind that of one that is being replaced."""


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a path beside `path` to write a file or a folder to, and move it there once it is whole.

    A process that is killed meanwhile leaves the old state, where `newest_state` finds it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(path, PARTIAL)
    remove(partial)
    yield partial
    put_in_place(partial, path)


def put_in_place(partial: Path, path: Path) -> None:
    """Move a file or folder that is whole to its place, once it is on the disk.

    A folder cannot be replaced at once: the old one stands beside it meanwhile.
    """
    if partial.is_file():
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
    old = _beside(path, OLD)
    if path.is_dir():
        remove(old)
        path.rename(old)
    os.replace(partial, path)
    remove(old)


def atomic_save(state: Any, path: str | Path) -> None:
    """Write a file of tensors so that the old one stays whole until the new one is."""
    with replacing(path) as partial:
        torch.save(state, partial)


def state_file(path: str | Path, step: int, numbered: bool) -> Path:
    """Where the state after a step goes: `path` itself, or `stem-step` beside it."""
    path = Path(path)
    return path.with_name(f"{path.stem}-{step:08d}{path.suffix}") if numbered else path


def newest_state(path: str | Path) -> Path | None:
    """The state to go on from: the newest of `path` and the numbered ones beside it; None if there is none.

    Of a folder that was being replaced when the process was killed, it is the old one.
    """
    path = Path(path)
    places = [*_numbered(path)[-1:], path]
    found = [place if place.exists() else _beside(place, OLD) for place in places]
    return max((file for file in found if file.exists()), key=lambda file: file.stat().st_mtime_ns, default=None)


def keep_newest(path: str | Path, number: int, step: int | None = None) -> None:
    """Delete all numbered states but the newest `number`, and what a killed process left unfinished.

    With the `step` that was just saved, those of later steps are deleted too: they are of an earlier run.
    """
    path = Path(path)
    known = _numbered(path)
    mine = [state for state in known if step is None or state <= state_file(path, step, numbered=True)]
    for state in known:
        if state not in mine[-number:]:
            remove(state)
            remove(_beside(state, OLD))
    for ending in (PARTIAL, OLD + PARTIAL):
        for state in _numbered(path, [ending]):
            remove(_beside(state, ending))


def remove_states(path: str | Path) -> None:
    """Delete `path` and the numbered states beside it."""
    for state in (Path(path), *_numbered(Path(path))):
        remove(state)
        remove(_beside(state, OLD))


def _numbered(path: Path, endings: Sequence[str] = ("", OLD)) -> list[Path]:
    """The places of numbered states, by step, at which there is something with one of the endings behind its name."""
    name = re.escape(path.stem) + r"-\d{8}" + re.escape(path.suffix)
    pattern = re.compile(f"({name})({'|'.join(map(re.escape, endings))})")
    beside = path.parent.iterdir() if path.parent.is_dir() else iter(())
    found = [pattern.fullmatch(file.name) for file in beside]
    return sorted({path.with_name(match[1]) for match in found if match})


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def remove(path: Path) -> None:
    """Delete a file or folder if it is there; half a folder never has the name of a whole one."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if path.suffix != PARTIAL:
        remove(_beside(path, PARTIAL))
        path = path.rename(_beside(path, PARTIAL))
    shutil.rmtree(path)


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
    """Whether SIGTERM or Ctrl-C (SIGINT) has come; the same one again ends the process at once.

    Only the main thread of a process can listen; in others, nothing is changed.

    Attributes:
        number: of the signal that came first; None if none did.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    @property
    def asked(self) -> bool:
        """Whether one has come."""
        return self.number is not None

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """While entered, the signals are noted instead of ending the process."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def note(number: int, frame: Any) -> None:
            if number == signal.SIGINT:
                os.write(2, b"\nStopping after this step; Ctrl-C again stops at once.\n")
            self.number = number if self.number is None else self.number
            signal.signal(number, signal.SIG_DFL)

        for number, handler in before.items():
            if number == signal.SIGTERM or handler is signal.default_int_handler:
                signal.signal(number, note)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
