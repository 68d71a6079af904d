"""Places that checkpoints are converted to: checked before anything is written, and told of when writing fails."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SPARE = 64 * 2**20
"""Bytes beside the tensors: headers, index and config files."""


def check_places(folder: Path, goal: Path) -> None:
    """Check that a target is a new or empty folder, and apart from its source.

    Raises:
        ValueError: it is not.
    """
    if goal == folder or folder in goal.parents or goal in folder.parents:
        raise ValueError(f"{goal} is {folder}, or one lies in the other. Convert to a folder elsewhere.")
    check_fresh(goal)


def check_fresh(goal: Path) -> None:
    """Check that a target is a new or empty folder.

    Raises:
        ValueError: it is not.
    """
    if goal.exists() and (not goal.is_dir() or any(goal.iterdir())):
        raise ValueError(f"{goal} exists and is left as it is. Choose a new folder, or an empty one.")


def leftovers(goal: Path) -> list[str]:
    """What is to be said of folders that killed conversions to the same place left behind."""
    found = sorted(goal.parent.glob(f".{goal.name}.new-*")) if goal.parent.is_dir() else []
    sizes = [sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) for folder in found]
    return [
        f"{folder} ({in_words(size)}) is left of a conversion that was killed, or belongs to one that is running. "
        f"Remove it if none is."
        for folder, size in zip(found, sizes, strict=True)
    ]


def lacking_space(goal: Path, size: int) -> list[str]:
    """What is to be said where the target's file system has no room for it; nothing where it has.

    Args:
        goal: the target.
        size: of what will be written, in bytes.
    """
    place = next(path for path in (goal, *goal.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free >= size + SPARE:
        return []
    return [
        f"{goal} takes {in_words(size + SPARE)}, and the file system of {place} has {in_words(free)} free. Free some "
        f"space, or convert to another disk."
    ]


@contextmanager
def told(folder: Path, goal: Path) -> Iterator[None]:
    """What says where a failure to write happened, and what is left."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{goal} could not be written: {error}. What there was of it is removed, and {folder} is as it was. If the "
            f"disk is full, free some space, or convert to another one."
        ) from error


def in_words(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / 10**9:.1f} GB" if size >= 10**8 else f"{size / 10**6:.1f} MB"
