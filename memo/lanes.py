"""Lanes: connections of one loop on which batches of look-ups follow each other without a pause.

The rules are those of `links` and `loops`, and:

7.  A caller who finds the lane empty is sent at once.  Those who ask while it is not are gathered
    until the loop has come round, or their batch is full; no batch waits for the answer to another.
8.  One timer watches a lane, however many callers there are.  It looks at the oldest batch, which
    has its deadline and the time that all the bytes received since then take at `RATE`.
9.  When a lane is given up, all that is on it fails at once, with one fault.  What is on a lane
    that has answered before and is found closed is sent once more, over another.
10. While a reply of more than `HOG` bytes is coming in, whoever asks goes by another lane.
"""

from __future__ import annotations

import asyncio
import selectors
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import Context
from typing import Any, Protocol

from memo import breaker
from memo.batches import Batch, Failure
from memo.breaker import RATE
from memo.errors import TierError
from memo.links import fault_of, reader

LANES = 4
"""Lanes of a loop at most."""
LATE = 0.02
"""Seconds by which a timer of a loop may be late before the loop, not Redis, is held to be slow."""
SPARED = 20
"""So often that is held against the loop; then what waits is given up all the same."""
HOG = 256 * 1024
"""Bytes of a reply that is not whole yet, from which on its lane is left to it."""


class Home(Protocol):
    """What lanes need of those who use them.

    Attributes:
        deadline: seconds that an exchange may take.
    """

    deadline: float

    def explain(self, error: Exception) -> Failure:
        """What an exchange came to; called once for each that went wrong."""
        ...

    def arrived(self) -> None:
        """An exchange went well."""
        ...


class Road:
    """The lanes of one loop; made and used on that loop.

    Args:
        home: whose they are.
        link: makes a connection that is not open yet.
    """

    def __init__(self, home: Home, link: Callable[[], Any]) -> None:
        self.home = home
        self.link = link
        self._lanes: list[Lane] = []

    def ask(self, commands: Sequence[bytes]) -> asyncio.Future[Any]:
        """The replies to come to packed commands that only read: a list of them, or a `Failure`."""
        for lane in self._lanes:
            if not lane.hogged:
                return lane.ask(commands)
        return self._another().ask(commands)

    def _another(self) -> Lane:
        if len(self._lanes) >= LANES:
            return self._lanes[-1]
        lane = Lane(self)
        self._lanes.append(lane)
        return lane

    def resend(self, batches: Sequence[Batch]) -> None:
        """Send batches once more, over a new connection."""
        for batch in batches:
            batch.restart()
        self._lanes.append(Lane(self, batches))

    def leave(self, lane: Lane) -> None:
        """A lane is of no use any more."""
        if lane in self._lanes:
            self._lanes.remove(lane)

    def flush(self) -> None:
        """Close the lanes on which nothing is under way."""
        for lane in self._lanes.copy():
            if lane.idle:
                lane.give_up()

    def shut(self) -> None:
        """Close all lanes, also those in use."""
        for lane in self._lanes.copy():
            lane.give_up()

    def forget(self) -> None:
        """Let go of the lanes of a loop that ended without closing them."""
        for lane in self._lanes:
            lane.forget()
        self._lanes.clear()


class Lane(asyncio.Protocol):
    """One connection, and what is under way on it.

    Args:
        road: those that it is one of.
        batches: what is to be sent first.
    """

    def __init__(self, road: Road, batches: Sequence[Batch] = ()) -> None:
        self._road = road
        self._loop = asyncio.get_running_loop()
        self._link: Any = None
        self._reader: Any = None
        self._transport: Any = None
        self._next: Batch | None = None
        self._ready = list(batches)
        self._sent: deque[tuple[Batch, int]] = deque()
        self._received = self._unfinished = 0
        self._proven = False
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._spared = 0
        if batches:
            self._watch(batches[0])
        self._opening = self._loop.create_task(self._open(), name="memo-lane", context=Context())

    @property
    def hogged(self) -> bool:
        """Whether a big reply is on its way."""
        return self._unfinished > HOG

    @property
    def idle(self) -> bool:
        """Whether nobody waits for anything."""
        return not (self._sent or self._next or self._ready)

    # --- asking ----------------------------------------------------------------------------------

    def ask(self, commands: Sequence[bytes]) -> asyncio.Future[Any]:
        """See `Road.ask`."""
        future: asyncio.Future[Any] = self._loop.create_future()
        batch = self._next
        if batch is None:
            batch = self._begin()
        batch.add(commands, future)
        if batch.full or (self._transport is not None and not self._sent):
            self._flush()
        return future

    def _begin(self) -> Batch:
        batch = self._next = Batch(self._loop.time())
        if self._timer is None:
            self._watch(batch)
        if self._sent:
            self._loop.call_soon(self._flush)
        return batch

    def _flush(self) -> None:
        batch, self._next = self._next, None
        if batch is None:
            return
        if self._transport is None:
            self._ready.append(batch)
        else:
            batch.begun = self._loop.time()
            self._send(batch)

    def _send(self, batch: Batch) -> None:
        self._sent.append((batch, self._received))
        self._transport.write(batch.packed())

    async def _open(self) -> None:
        self._link = link = self._road.link()
        try:
            await link.connect()
        except Exception as error:
            self.fail(error)
        except BaseException:  # the loop is going down
            self.give_up()
            raise
        else:
            self._reader = reader()
            self._transport = link.hand_over(self)
            self._flush()
            ready, self._ready = self._ready, []
            for batch in ready:
                self._send(batch)

    # --- answers ---------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Hand out the replies of each batch that is whole."""
        self._received += len(data)
        self._unfinished += len(data)
        try:
            self._reader.feed(data)
            while self._take():
                self._proven = True
                self._spared = 0
        except Exception as error:  # not RESP, or not what was asked for
            self.fail(error)

    def _take(self) -> bool:
        """Take the replies of the oldest batch; whether it has them all."""
        gets = self._reader.gets
        if not self._sent:
            if gets() is not False:
                raise ValueError("an answer that nobody asked for")
            return False
        batch = self._sent[0][0]
        replies = batch.replies
        for _ in range(batch.missing):
            reply = gets()
            if reply is False:
                return False
            replies.append(reply)
            self._unfinished = 0
        if batch.land(self._road.home.explain):
            self._road.home.arrived()
        self._sent.popleft()
        return True

    # --- the end ---------------------------------------------------------------------------------

    def connection_lost(self, exc: Exception | None) -> None:
        """The other side, or the network, has closed it."""
        told = self._sent[0][0].replies[:1] if self._sent else []
        last_words = next((reply for reply in told if isinstance(reply, Exception)), None)
        self.fail(last_words or exc or ConnectionError("closed"))

    def _watch(self, batch: Batch) -> None:
        self._due = batch.begun + self._road.home.deadline
        self._timer = self._loop.call_at(self._due, self._look)

    def _look(self) -> None:
        """See whether the oldest batch has had its time, unless the loop is too busy to read."""
        self._timer = None
        batch, before = self._oldest()
        if batch is None:
            return
        now = self._loop.time()
        deadline = self._road.home.deadline
        earned = batch.begun + deadline + (self._received - before) / RATE
        if now < earned:
            self._due = earned
        elif self._spared < SPARED and (now - self._due > LATE or self._unread()):
            self._spared += 1
            self._due = now + min(deadline, 2 * LATE)
        else:
            self.fail(TimeoutError("deadline"))
            return
        self._timer = self._loop.call_at(self._due, self._look)

    def _unread(self) -> bool:
        """Whether something has come that the loop has not got round to reading."""
        if self._transport is None:
            return False
        with selectors.DefaultSelector() as selector:
            selector.register(self._transport.get_extra_info("socket"), selectors.EVENT_READ)
            return bool(selector.select(0))

    def _oldest(self) -> tuple[Batch | None, int]:
        if self._sent:
            return self._sent[0]
        return (self._ready[0] if self._ready else self._next), 0

    def fail(self, error: Exception) -> None:
        """Give the lane up, and all that is on it, or send that once more."""
        again = self._proven and fault_of(error) is breaker.CLOSED
        batches = self._leave()
        fresh = [batch for batch in batches if again and not batch.again]
        lost = [batch for batch in batches if batch not in fresh]
        if fresh:
            self._road.resend(fresh)
        if lost:
            failure = self._road.home.explain(error)
            for batch in lost:
                batch.fail(failure)

    def give_up(self) -> None:
        """Close it, for no fault of Redis."""
        failure = Failure(TierError("the connection was closed here"))
        for batch in self._leave():
            batch.fail(failure)

    def forget(self) -> None:
        """Let go of the connection: its loop is closed."""
        if self._link is not None:
            self._link.forget()

    def _leave(self) -> list[Batch]:
        """Close at once; what was under way."""
        self._road.leave(self)
        batches = [batch for batch, _ in self._sent] + self._ready
        batches += [self._next] if self._next is not None else []
        self._sent.clear()
        self._ready, self._next = [], None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._link is not None:
            self._link.abort()
        if not self._opening.done():
            self._opening.cancel()
        return batches
