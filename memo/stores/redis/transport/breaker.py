"""The circuit breaker: refuses calls while a server is down, and explains its error replies.

Rules of this module:

1.  *Closed*: all calls pass.  It opens after one refused connection, one timeout (a second one
    would cost a second deadline), one reply that means "nothing works here", or `FAULTS_TO_OPEN`
    other faults in a row.
2.  *Open*: every call is refused at once, until a backoff has passed: `FIRST_BACKOFF_SECONDS`, then
    twice as long each time, up to `MAX_BACKOFF_SECONDS`.
3.  *Half open*: one caller probes, all others are still refused.  If the probe succeeds the breaker
    closes, if it fails the breaker opens with a longer backoff.  A probe that never reports back is
    given up after `PROBE_LIFE_SECONDS`.
4.  An outage causes one `TIER_DOWN` event, one warning and, at its end, one `TIER_UP` event.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable

from memo.errors import TierError, TierUnavailable
from memo.runtime import fork
from memo.runtime.events import TIER_DOWN, TIER_UP, Event, emit
from memo.stores.redis.transport.faults import REPLIES, Fault

FIRST_BACKOFF_SECONDS = 0.25
"""Seconds of the first backoff."""
MAX_BACKOFF_SECONDS = 5.0
"""Seconds of the longest backoff, and of uptime after which the backoff starts over."""
BACKOFF_JITTER = 0.2
"""A backoff is shortened by a random fraction of up to this, so that clients spread out."""
FAULTS_TO_OPEN = 2
"""Number of faults in a row that open the breaker."""
PROBE_LIFE_SECONDS = 1.0
"""Seconds after which a probe that has not reported back is given up."""

_log = logging.getLogger("memo.stores")


class Breaker:
    """Decides whether a server may be asked.  Thread-safe.

    Args:
        tier: the tier's name in events.
        where: the server's address for display, without user and password: `"127.0.0.1:6379/0"`.
        now: a monotonic clock in seconds.
        consequence: what happens while it is open, as a sentence.

    Attributes:
        open: calls are refused.
        healthy: closed, and no fault since the last success; a hit checks only this.
        fault: the last fault, or None.
    """

    def __init__(
        self,
        tier: str,
        where: str,
        now: Callable[[], float] = time.monotonic,
        *,
        consequence: str = "Calls go on without it, from the other tiers or by computing",
    ) -> None:
        self.tier = tier
        self.where = where
        self.healthy = True
        self.fault: Fault | None = None
        self._now = now
        self._consequence = consequence
        self._lock = threading.Lock()
        self.open = False
        self._probing = False
        self._faults = 0
        self.openings = 0
        self.retry_at = 0.0
        self._since = 0.0
        self._closed_at = -MAX_BACKOFF_SECONDS
        self._warned: set[str] = set()
        fork.renew_in_child(self)

    def __repr__(self) -> str:
        return f"<Breaker {self.where} {'open' if self.open else 'closed'}>"

    def admit(self) -> bool:
        """Admit a caller; True if it is the probe, which must report its result.

        Raises:
            TierUnavailable: the breaker is open.
        """
        if not self.open:
            return False
        with self._lock:
            if not self.open:
                return False
            if self._now() >= self.retry_at:
                self._probing = True
                self.retry_at = self._now() + PROBE_LIFE_SECONDS
                return True
        raise self.unavailable()

    def check(self) -> None:
        """Refuse a caller that had to wait since it was admitted, if the breaker has opened.

        Raises:
            TierUnavailable: the breaker is open.
        """
        if self.open:
            raise self.unavailable()

    def unavailable(self) -> TierUnavailable:
        """Return the error for callers while the breaker is open."""
        text = self.fault.text if self.fault else "cannot be reached"
        return TierUnavailable(f"Redis at {self.where} {text}", reported=True)

    def record_success(self) -> None:
        """Record that a caller got an answer."""
        with self._lock:
            self._faults = 0
            self.healthy = True
            was_open, self.open, self._probing = self.open, False, False
            if was_open:
                self._closed_at = self._now()
                self._warned.clear()
            away = self._closed_at - self._since
        if was_open:
            emit(Event(TIER_UP, tier=self.tier, seconds=away, detail=self.where))
            _log.info("memo: Redis at %s answers again after %.1f s.", self.where, away)

    def record_fault(
        self, fault: Fault, *, probe: bool = False, detail: str = "", reported: bool = False
    ) -> TierError:
        """Record that a caller met a fault.

        Args:
            fault: the fault.
            probe: the caller was admitted as the probe.
            detail: the message of the server or of the operating system.
            reported: give no warning, since it is reported elsewhere.

        Returns:
            The error to raise.
        """
        error = self._error(fault, detail)
        if not fault.down:
            if not reported:
                self._warn_once(fault, detail)
            if probe:  # it answers, so the probe has succeeded
                self.record_success()
            return error
        with self._lock:
            self.fault = fault
            self.healthy = False
            self._faults += 1
            opens = not self.open and (fault.at_once or self._faults >= FAULTS_TO_OPEN)
            if opens or (probe and self._probing):
                self._back_off(fresh=opens)
        if opens:
            message = self._message(fault, detail)
            emit(Event(TIER_DOWN, tier=self.tier, reason=fault.kind, detail=message))
            _log.warning("%s", message)
        return error

    def record_refusal(self, error: TierError, *, probe: bool = False) -> TierError:
        """Open this breaker of writes for an error that the server's own breaker has recorded.

        Args:
            error: the error that `record_fault` of that breaker returned.
        """
        fault = REPLIES[error.kind]._replace(down=True, at_once=True)
        self._warned.add(fault.kind)
        self.record_fault(fault, probe=probe, detail=error.detail)
        return error

    def _error(self, fault: Fault, detail: str) -> TierError:
        if fault.down:
            error: TierError = TierUnavailable(
                f"Redis at {self.where} {_with_detail(fault.text, detail)}"
            )
        else:
            error = TierError(
                f"Redis at {self.where} {_with_detail(f'{fault.text} ({fault.kind})', detail)}"
            )
        error.kind, error.detail = fault.kind, detail
        return error

    def abandon_probe(self) -> None:
        """Record that the probe ended without a result, so that the next caller probes."""
        with self._lock:
            if self._probing:
                self._probing = False
                self.retry_at = self._now()

    def _back_off(self, *, fresh: bool) -> None:
        now = self._now()
        if fresh:
            self._since = now
            if now - self._closed_at >= MAX_BACKOFF_SECONDS:  # not flapping
                self.openings = 0
        self.open, self._probing = True, False
        seconds = min(MAX_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2 ** min(self.openings, 16))
        self.openings += 1
        self.retry_at = now + seconds * (1 - random.random() * BACKOFF_JITTER)

    def _message(self, fault: Fault, detail: str) -> str:
        return (
            f"memo: Redis at {self.where} {_with_detail(fault.text, detail)}."
            f" {self._consequence}; it is "
            f"tried again at least every {MAX_BACKOFF_SECONDS:g} s. {fault.fix}"
        )

    def _warn_once(self, fault: Fault, detail: str) -> None:
        if fault.kind in self._warned or fault.kind == "NOSCRIPT":
            return
        self._warned.add(fault.kind)
        _log.warning(
            "memo: Redis at %s %s (%s); calls go on without it. %s",
            self.where,
            _with_detail(fault.text, detail),
            fault.kind,
            fault.fix,
        )

    def after_fork(self) -> None:
        self._lock = threading.Lock()
        self._probing = False


def _with_detail(text: str, detail: str) -> str:
    """Append the detail to the text of a fault."""
    return f"{text} [{detail}]" if detail else text
