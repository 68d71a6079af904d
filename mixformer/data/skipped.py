"""Samples that are left out: told to whoever watches, and said in the log of the process."""

from __future__ import annotations

import logging
import weakref
from typing import Any, NamedTuple, Protocol

log = logging.getLogger(__name__)


class Skipped(NamedTuple):
    """A sample that was left out.

    Attributes:
        where: its name.
        kind: `broken` or `unusable`.
        reason: why.
    """

    where: str
    kind: str
    reason: str


class Watcher(Protocol):
    """What wants to know."""

    def skipped(self, sample: Skipped) -> None:
        """A sample is left out."""
        ...


_watchers: weakref.WeakSet[Any] = weakref.WeakSet()


def watch(watcher: Watcher) -> None:
    """Tell it of every sample that this process leaves out from now on, as long as it lives."""
    _watchers.add(watcher)


def unwatch(watcher: Watcher) -> None:
    """Tell it no more."""
    _watchers.discard(watcher)


def report(sample: Skipped, number: int) -> None:
    """Say that a sample is left out.

    Args:
        sample: it.
        number: how many were left out so far by the one who says so, with this one.
    """
    log.warning("skipped %s sample %s (%d so far): %s", sample.kind, sample.where, number, sample.reason)
    for watcher in list(_watchers):
        watcher.skipped(sample)
