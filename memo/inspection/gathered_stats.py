"""`memo.stats`: what the cache did, after the causes of misses have been found out."""

from __future__ import annotations

import atexit
from contextlib import suppress
from typing import Any, Protocol

from memo import metrics
from memo.errors import OptionError
from memo.metrics.recorder import COUNTERS, publish, publish_now
from memo.runtime import events
from memo.settings import configuration, options


class HasFunctionId(Protocol):
    """A cached function."""

    @property
    def function_id(self) -> str: ...


def stats(*patterns: str | HasFunctionId, shared: bool = False) -> metrics.Stats:
    """Return a snapshot of what the cache did.

    Args:
        patterns: cached functions, or names of them, whole or with wildcards; none: all.
        shared: add up all processes that use the same directory, including those that have ended.

    Raises:
        OptionError: a pattern is neither a cached function nor a name.
    """
    named: list[str] = []
    for pattern in patterns:
        name: Any = getattr(pattern, "function_id", pattern)
        if not isinstance(name, str):
            raise OptionError("patterns", pattern, "must be a cached function, or its name.")
        named.append(name)
    options.flag("shared", shared)
    _explain_misses()
    snapshot = COUNTERS.snapshot()
    publish()
    if shared:
        from memo.metrics.shared_counters import SharedSnapshots

        snapshot = SharedSnapshots(configuration.home()).gather(snapshot)
    return snapshot.select(*named)


def _explain_misses() -> None:
    """Find the causes of misses; the code for that is imported only if there were any."""
    if COUNTERS.has_unexplained:
        from memo.inspection import report_line

        report_line.explain_counts()


def _publish_last() -> None:
    if COUNTERS.used:
        try:
            _explain_misses()  # the last chance: other processes cannot tell these misses apart
        except Exception as error:
            events.emit(events.Event(events.ERROR, reason="statistics", detail=repr(error)))
        with suppress(ImportError):  # memo was removed from the disk
            publish_now()


atexit.register(_publish_last)
