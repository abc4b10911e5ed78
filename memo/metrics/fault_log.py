"""Logging of faults: the first one of an outage is a warning, later ones are at debug level.

The loggers are named after the folders (`memo.stores`, `memo.engine`), and each record has the
facts as separate fields, for handlers that write JSON.  Outages of Redis are logged by its breaker,
which knows when they end.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable

from memo.errors import label
from memo.metrics.recorder import COUNTERS
from memo.runtime import events, fork
from memo.runtime.events import Event

OUTAGE_SECONDS = 60.0
"""Seconds without a fault of the same kind after which the next one is a new outage."""
MAX_FAULTS = 256
"""Maximum number of faults that are remembered; beyond it those of ended outages are dropped."""
_VAGUE_REASONS = frozenset({"error", "unavailable"})
"""Reasons that add nothing to the detail."""
_LOGGED_ELSEWHERE = frozenset({"redis"})
"""Tiers that log their faults themselves."""
_WARNED_ELSEWHERE = frozenset({"directory"})
"""Faults that also cause a Python warning."""


class FaultLog:
    """Receives faults of the cache, and logs them.

    Args:
        now: a monotonic clock in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self.start_over()

    def start_over(self) -> None:
        """Forget all faults: at creation, and in the child of a fork."""
        self._lock = threading.Lock()
        self._latest: dict[tuple[str, str], float] = {}

    def handle(self, event: Event) -> None:
        """Handle an error event."""
        if event.tier in _LOGGED_ELSEWHERE:
            return
        if not event.tier:
            self._log("memo.engine", event, warn=False)
        else:
            warn = self._begins(event) and event.reason not in _WARNED_ELSEWHERE
            self._log("memo.stores", event, warn=warn)

    def _begins(self, event: Event) -> bool:
        """True if an outage begins with this fault."""
        now = self._now()
        with self._lock:
            if len(self._latest) > MAX_FAULTS:
                self._latest = {
                    at: seen for at, seen in self._latest.items() if now - seen < OUTAGE_SECONDS
                }
            same = ((event.tier, event.reason), ("", event.detail))  # or the same fault elsewhere
            begins = all(
                now - self._latest.get(one, now - OUTAGE_SECONDS) >= OUTAGE_SECONDS for one in same
            )
            self._latest.update(dict.fromkeys(same, now))
        return begins

    @staticmethod
    def _log(name: str, event: Event, *, warn: bool) -> None:
        import logging

        level = logging.WARNING if warn else logging.DEBUG
        logger = logging.getLogger(name)
        if not logger.isEnabledFor(level):
            return
        where = event.tier or label(event.function)
        what = event.detail
        if event.reason not in _VAGUE_REASONS or not what:
            what = f"{event.reason}: {what}" if what else event.reason
        if not what.startswith(where):
            what = f"{where}: {what}"
        more = (
            ". Calls go on without it; more of the same is logged at debug level." if warn else ""
        )
        logger.log(level, "memo: %s%s", what, more, extra=fields(event))


def fields(event: Event) -> dict[str, str]:
    """Return the facts of an event as fields of a log record; never an argument or a value."""
    return {
        "memo_event": event.kind,
        "memo_function": label(event.function),
        "memo_tier": event.tier,
        "memo_reason": event.reason,
        "memo_detail": event.detail,
    }


FAULT_LOG = FaultLog()


@functools.cache
def listen() -> None:
    """Start to log faults; `import memo` does this, and a second call does nothing."""
    COUNTERS.listen(FAULT_LOG.handle, (events.ERROR,))
    fork.in_child(_after_fork)


def _after_fork() -> None:
    FAULT_LOG.start_over()
    COUNTERS.listen(FAULT_LOG.handle, (events.ERROR,))
