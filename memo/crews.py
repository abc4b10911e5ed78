"""Crews: threads whose look-ups share round trips.

The rules are those of `batches` and `links`, and:

1.  A thread that finds fewer than `CREWS` exchanges under way asks at once, by itself.  Those that
    find more are gathered, and one of them leads: it sends for all as soon as an exchange has ended
    or the batch is full, and hands out the replies.
2.  Nobody waits for an exchange of others longer than `PATIENCE`: then one of those who wait leads
    over a connection more.  So silence costs one deadline and `PATIENCE`, whoever else asks.
3.  Who leads after he has waited asks the breaker again, for all.
4.  A leader who is interrupted takes nobody along: the others ask by themselves, at once where he
    can tell them, else after `STRANDED`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol

from memo.batches import Batch, Failure

CREWS = 2
"""Exchanges under way from which on those who ask are gathered.  With 1, eight threads and more get
answers 1.2 times as fast from a server on the same host, and two threads wait for each other."""
PATIENCE = 0.002
"""Seconds that a batch waits for an exchange of others to end."""
STRANDED = 5.0
"""Seconds after which one who waits asks by himself, whatever has become of the others."""
_ALONE: Any = object()
"""Instead of an answer: ask by yourself."""


class Home(Protocol):
    """What crews need of those who use them."""

    def read_alone(self, commands: Sequence[bytes]) -> list[Any] | Failure:
        """Ask for one, in this thread: the replies to packed commands."""
        ...

    def read_for(self, batch: Batch) -> None:
        """Ask for a batch, in this thread, and settle it, if the breaker still lets it."""
        ...


class Crews:
    """The threads of a process that look something up on one server."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way = 0
        self._next: Batch | None = None
        self._first: _Waiting | None = None

    def ask(self, home: Home, commands: Sequence[bytes]) -> list[Any] | Failure:
        """The replies to packed commands that only read.

        Args:
            home: the same each time; given here, so that it is not kept alive by its crews.
        """
        with self._lock:
            alone = self._under_way < CREWS and self._next is None
            self._under_way += alone
        if not alone:
            return self._together(home, commands)
        try:
            return home.read_alone(commands)
        finally:
            self._ended()

    def _together(self, home: Home, commands: Sequence[bytes]) -> list[Any] | Failure:
        mine = _Waiting()
        with self._lock:
            batch = self._next
            if batch is None:
                batch = self._next = Batch(time.monotonic())
                self._first = mine
            batch.add(commands, mine)
            leads = (self._under_way < CREWS or batch.full) and self._take(batch)
        while not (leads or mine.done()):
            mine.wait(PATIENCE)
            with self._lock:
                leads = not mine.done() and self._take(batch)
            if time.monotonic() - batch.begun > STRANDED:
                break
        if leads:
            self._lead(home, batch)
        return home.read_alone(commands) if mine.answer in (None, _ALONE) else mine.answer

    def _take(self, batch: Batch) -> bool:
        """Whether the batch was still to be sent; now it is the caller's to do so."""
        if self._next is not batch:
            return False
        self._next = self._first = None
        self._under_way += 1
        return True

    def _lead(self, home: Home, batch: Batch) -> None:
        try:
            home.read_for(batch)
        except BaseException:
            batch.fail(_ALONE)
            raise
        finally:
            self._ended()

    def _ended(self) -> None:
        with self._lock:
            self._under_way -= 1
            first = self._first
        if first is not None:
            first.wake()


class _Waiting:
    """A thread that waits, as a slot of a batch."""

    __slots__ = ("_asleep", "answer")

    def __init__(self) -> None:
        self._asleep = threading.Lock()
        self._asleep.acquire()
        self.answer: Any = None

    def done(self) -> bool:
        """See `Slot`."""
        return self.answer is not None

    def set_result(self, answer: Any) -> None:
        """See `Slot`."""
        self.answer = answer
        self.wake()

    def wait(self, seconds: float) -> None:
        """Until woken, or so long."""
        self._asleep.acquire(timeout=seconds)

    def wake(self) -> None:
        """Let it look again."""
        try:
            self._asleep.release()
        except RuntimeError:
            return  # it is awake already, and looks after what was written before
