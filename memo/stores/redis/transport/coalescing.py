"""Coalescing: lookups on one event loop, or of one thread, share round trips.

Rules of this module:

1.  A command that several callers ask for is sent once; each gets the reply.  All of them asked
    before it was sent, so the reply is fresh for each.
2.  If no batch is in flight, a lookup is sent immediately.  Others are collected until the loop's
    next iteration or until the batch is full; no batch waits for the answer to another.
3.  A batch fails as a whole, with one `Failure`.  If the connection had worked before and turns out
    to be closed, the batch is sent once more on another connection.
4.  Lookups that a thread begins before it needs a reply are sent together when it needs the first.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Coroutine, Sequence
from contextvars import Context
from functools import partial
from typing import Any, Protocol

from memo.errors import TierError
from memo.runtime.port import Deferred
from memo.stores.redis.transport.breaker import Breaker
from memo.stores.redis.transport.exchange import Exchange, Stream
from memo.stores.redis.transport.resp import Command, ErrorReply, with_key

COMMANDS_PER_BATCH = 64
"""Number of commands at which a batch is sent: enough to spread the cost of a packet, few enough
that the server works on them while the next are collected."""
BYTES_PER_BATCH = 64 * 1024
"""Bytes of commands at which a batch is sent."""
LOOKUPS_PER_BATCH = 256
"""Maximum number of lookup commands of a thread that share a round trip."""


class Failure:
    """The failure of an exchange that several callers share; each of them raises a copy."""

    __slots__ = ("_error",)

    def __init__(self, error: TierError) -> None:
        self._error = error

    def new_error(self) -> TierError:
        """Return a copy of the error, without the frames of other callers."""
        return copy.copy(self._error)


class Batch:
    """The commands of one exchange, and the callers that wait for their replies.

    Attributes:
        resent: it is sent for the second time.
        commands: each packed command, with its place among them.
        size: their bytes.
    """

    __slots__ = ("_futures", "_wanted", "commands", "resent", "size")

    def __init__(self) -> None:
        self.resent = False
        self.commands: dict[bytes, int] = {}
        self.size = 0
        self._futures: list[asyncio.Future[Any]] = []
        self._wanted: list[list[int]] = []

    def add(self, commands: Sequence[Command], future: asyncio.Future[Any]) -> None:
        """Add commands; the future gets their replies."""
        places = self.commands
        wanted = []
        for _, packed in commands:
            place = places.get(packed)
            if place is None:
                place = places[packed] = len(places)
                self.size += len(packed)
            wanted.append(place)
        self._futures.append(future)
        self._wanted.append(wanted)

    @property
    def full(self) -> bool:
        """True if it should be sent now."""
        return len(self.commands) >= COMMANDS_PER_BATCH or self.size >= BYTES_PER_BATCH

    def distribute(self, replies: list[Any], as_failure: Callable[[Exception], Failure]) -> bool:
        """Pass each caller its replies; True if none of them is an error."""
        failures: dict[str, Failure] = {}
        for command, reply in zip(self.commands, replies, strict=True):
            if type(reply) is ErrorReply and str(reply) not in failures:
                failures[str(reply)] = as_failure(with_key(reply, command))
        for future, wanted in zip(self._futures, self._wanted, strict=True):
            if future.done():
                continue
            mine: Any = list(map(replies.__getitem__, wanted))
            if failures:
                wrong = next((reply for reply in mine if type(reply) is ErrorReply), None)
                mine = mine if wrong is None else failures[str(wrong)]
            future.set_result(mine)
        return not failures

    def fail(self, failure: Failure) -> None:
        """Fail the batch for every caller."""
        for future in self._futures:
            if not future.done():
                future.set_result(failure)


class Owner(Protocol):
    """The part of a `Client` that connections use.

    Attributes:
        breaker: knows whether there was a fault.
        deadline: seconds that an exchange may take.
    """

    breaker: Breaker
    deadline: float

    def as_failure(self, error: Exception) -> Failure:
        """Record the error of an exchange, once, and return it for all its callers."""
        ...

    def record_recovery(self) -> None:
        """Record the first success after a fault."""
        ...

    def record_replacement(self) -> None:
        """Record that a connection died while idle, and was replaced."""
        ...


class Coalescer:
    """The lookups of one event loop on one server; created and used on that loop.

    Args:
        owner: the client.
        open_stream: opens a connection for it.
        release: takes back a stream that can no longer be used.
    """

    def __init__(
        self,
        owner: Owner,
        open_stream: Callable[[], Coroutine[Any, Any, Stream]],
        release: Callable[[Stream], None],
    ) -> None:
        self._owner = owner
        self._open = open_stream
        self._release = release
        self._loop = asyncio.get_running_loop()
        self._stream: Stream | None = None
        self._opening: asyncio.Task[None] | None = None
        self._next: Batch | None = None
        self._ready: list[Batch] = []

    def ask(self, commands: Sequence[Command]) -> asyncio.Future[Any]:
        """Return the future replies to commands that only read: a list of them, or a `Failure`."""
        future: asyncio.Future[Any] = self._loop.create_future()
        stream = self._stream
        if stream is not None and stream.closed:
            self._owner.record_replacement()
            self._drop_stream(stream)
            stream = None
        batch = self._next or Batch()
        batch.add(commands, future)
        if stream is not None and not stream.sent:
            self._next = None
            self._send(stream, batch)
            return future
        if self._next is None and stream is not None:
            self._loop.call_soon(self._flush)
        self._next = batch
        if stream is None:
            self._begin_opening()
        if batch.full:
            self._flush()
        return future

    def _flush(self) -> None:
        batch, self._next = self._next, None
        if batch is None:
            return
        if self._stream is None:
            self._ready.append(batch)
            self._begin_opening()
        else:
            self._send(self._stream, batch)

    def _send(self, stream: Stream, batch: Batch) -> None:
        exchange = Exchange(tuple(batch.commands), len(batch.commands), self._owner.deadline)
        stream.send(exchange, partial(self._finish, stream, batch, exchange))

    def _finish(
        self, stream: Stream, batch: Batch, exchange: Exchange, error: Exception | None
    ) -> None:
        if error is None:
            try:
                replies = exchange.answer()
            except Exception as wrong:
                error = wrong
            else:
                owner = self._owner
                if batch.distribute(replies, owner.as_failure) and not owner.breaker.healthy:
                    owner.record_recovery()
                return
        self._drop_stream(stream)
        if isinstance(error, ConnectionError) and stream.has_received and not batch.resent:
            batch.resent = True
            self._owner.record_replacement()
            self._ready.append(batch)
            self._begin_opening()
        else:
            batch.fail(self._failure_of(error))

    def _failure_of(self, error: Exception) -> Failure:
        """Return the one failure of all batches that the same error has ended."""
        known = getattr(error, "failure", None)
        if known is None:
            known = error.failure = self._owner.as_failure(error)  # type: ignore[attr-defined]
        return known

    def _begin_opening(self) -> None:
        if self._opening is None and self._stream is None:
            self._opening = self._loop.create_task(self._open_stream(), context=Context())

    async def _open_stream(self) -> None:
        try:
            self._stream = stream = await self._open()
        except Exception as error:
            self._opening = None
            self._fail(self._owner.as_failure(error))
            return
        except BaseException:  # the loop is being closed
            self._opening = None
            self._fail(Failure(TierError("the connection was closed here")))
            raise
        self._opening = None
        self._flush()
        ready, self._ready = self._ready, []
        for batch in ready:
            self._send(stream, batch)

    def _fail(self, failure: Failure) -> None:
        batches = [*self._ready, *([self._next] if self._next else [])]
        self._ready, self._next = [], None
        for batch in batches:
            batch.fail(failure)

    def _drop_stream(self, stream: Stream) -> None:
        if self._stream is stream:
            self._stream = None
            stream.fail(ConnectionError("closed"))
            self._release(stream)

    def flush(self) -> None:
        """Close the connection if nothing is in flight."""
        stream = self._stream
        if stream is not None and not stream.sent:
            self._drop_stream(stream)

    def close(self) -> None:
        """Close the connection, even if it is in use."""
        failure = Failure(TierError("the connection was closed here"))
        if self._opening is not None:
            self._opening.cancel()
        self._fail(failure)
        stream, self._stream = self._stream, None
        if stream is not None:
            closing = ConnectionError("closed here")
            closing.failure = failure  # type: ignore[attr-defined]
            stream.has_received = False
            stream.fail(closing)
            self._release(stream)


class ThreadBatch:
    """Lookups of one thread that are sent together when the first answer is needed.

    Args:
        read: sends commands, and returns the replies or a `Failure`.
    """

    def __init__(self, read: Callable[[Sequence[Command]], Any]) -> None:
        self._read = read
        self._places: dict[Command, int] = {}
        self._replies: Any = None

    @property
    def full(self) -> bool:
        """True if the next lookup needs another round trip."""
        return self._replies is not None or len(self._places) >= LOOKUPS_PER_BATCH

    def add(self, commands: Sequence[Command]) -> Deferred:
        """Add commands, and return their future replies.

        A command that was added before is sent once.
        """
        places = self._places
        wanted = [places.setdefault(command, len(places)) for command in commands]
        return Deferred(lambda: self._answers(wanted))

    def _answers(self, wanted: Sequence[int]) -> Any:
        if self._replies is None:
            self._replies = self._read(list(self._places))
        if not isinstance(self._replies, list):
            return self._replies
        return [self._replies[place] for place in wanted]
