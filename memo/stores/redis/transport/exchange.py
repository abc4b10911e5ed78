"""One exchange with a Redis server: packed commands in, replies out, within one deadline.

Connections come from redis-py, connected and logged in.  Rules of this module:

1.  The last command of an exchange is an `ECHO` of a nonce.  Its replies count only if the nonce
    comes back in its place, so replies to an earlier exchange are never taken for an answer.
2.  An exchange has `seconds` in all, connecting not included, plus the time that the received bytes
    take at `MIN_BYTES_PER_SECOND`: a big reply may take longer, one that trickles in may not.
3.  Time for which the thread or the event loop was busy does not count against the server.
4.  A connection whose exchange did not end well is closed by its owner.
"""

from __future__ import annotations

import asyncio
import itertools
import selectors
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from memo.errors import TierError
from memo.records.payload_pieces import PayloadSink
from memo.stores.redis.transport.resp import (
    MAX_VALUE_BYTES,
    ErrorReply,
    GarbledError,
    Part,
    Reader,
    with_key,
)

SOCKET_READ_BYTES = 64 * 1024
"""Bytes that are read from a socket at a time, and up to which commands are sent in one piece."""
MIN_BYTES_PER_SECOND = 50_000_000
"""Bytes per second: a server that transfers a big value more slowly than this counts as down.  A
network of 1 Gbit/s transfers 120 MB/s."""
LATE_SECONDS = 0.02
"""Seconds by which a timer of a loop may be late before the loop, not Redis, counts as slow."""
MAX_EXCUSES = 20
"""Times that a slow loop excuses a missing answer; after that the exchange fails."""
_FIRST_READ_BYTES = 8 * 1024
_EXTRA_READ_COUNT, _EXTRA_READ_SECONDS = 3, 0.005
"""Number and seconds of the extra reads after the deadline: the thread may have been delayed."""

_nonces = itertools.count()


class BusyError(TierError):
    """All connections stay in use for too long, which says nothing about the server."""


class Exchange:
    """Packed commands, and the replies to them as they arrive.

    Args:
        commands: packed commands, in order.
        count: number of replies to them.
        seconds: the deadline; the time for transferring data at `MIN_BYTES_PER_SECOND` is added.
        body: called for each attempt: yields what is sent after the first of `commands`, in pieces.
        sink: takes the bytes of the first reply; over a blocking connection only.

    Attributes:
        given: the commands as they were given.
    """

    __slots__ = ("_nonce", "body", "commands", "count", "given", "replies", "seconds", "sink")

    def __init__(
        self,
        commands: Sequence[Part],
        count: int,
        seconds: float,
        body: Callable[[], Iterator[Part]] | None = None,
        sink: PayloadSink | None = None,
    ) -> None:
        nonce = self._nonce = b"%012x" % next(_nonces)
        echo = b"*2\r\n$4\r\nECHO\r\n$12\r\n%s\r\n" % nonce
        size = sum(map(len, commands))
        if body is None and size <= SOCKET_READ_BYTES:
            self.commands: Sequence[Part] = (b"".join((*commands, echo)),)
        else:
            self.commands = (*commands, echo)
        self.given = commands
        self.count = count
        self.seconds = seconds + size / MIN_BYTES_PER_SECOND
        self.body = body
        self.sink = sink
        self.replies: list[Any] = []

    def restart(self) -> None:
        """Forget what has arrived: the exchange is sent once more."""
        self.replies = []

    def pieces(self) -> Iterator[Part]:
        """Yield the pieces to send, in order."""
        if self.body is None:
            yield from self.commands
            return
        yield self.commands[0]
        yield from self.body()
        yield from self.commands[1:]

    def answer(self) -> list[Any]:
        """Return the replies, once all have arrived; error replies are among them.

        Raises:
            ErrorReply: nothing works on this connection.
            GarbledError: these are the replies to another exchange.
        """
        nonce = self.replies.pop()
        if isinstance(nonce, ErrorReply):
            raise self.first_error() or nonce
        if nonce != self._nonce:
            raise GarbledError("the reply to another exchange")
        return self.replies

    def first_error(self) -> ErrorReply | None:
        """Return the first error among the replies so far; a server may send one and hang up."""
        for place, reply in enumerate(self.replies):
            if type(reply) is ErrorReply:
                return with_key(reply, self.given[place]) if place < len(self.given) else reply
        return None


# --- over a connection of threads ----------------------------------------------------------------


def run_exchange(connection: Any, exchange: Exchange) -> list[Any]:
    """Run an exchange over a connected `redis.Connection`, in this thread.

    Raises:
        ErrorReply, GarbledError: see `Exchange.answer`.
        OSError: the connection broke, or the deadline has passed (`TimeoutError`).
    """
    line = _TimedSocket(connection._sock, exchange.seconds)
    for piece in exchange.commands if exchange.body is None else exchange.pieces():
        line.send(piece)
    reader = Reader()
    if exchange.sink is not None:
        exchange.replies.append(_receive(line, reader, exchange.sink))
    count = exchange.count + 1
    while not (reader.unread and reader.take(exchange.replies, count)):
        try:
            reader.feed(line.receive())
        except ConnectionError:
            raise exchange.first_error() or ConnectionError("closed") from None
    return exchange.answer()


class _TimedSocket:
    """A socket with one deadline for all its calls together."""

    __slots__ = ("_calls_left", "_ends", "_extra_reads", "_received", "_sock")

    def __init__(self, sock: Any, seconds: float) -> None:
        self._sock = sock
        self._ends = time.monotonic() + seconds
        self._received = self._extra_reads = 0
        self._calls_left = 2  # the timeout set here is right for the first send and receive
        if sock.gettimeout() != seconds:
            sock.settimeout(seconds)

    def _set_timeout(self) -> None:
        seconds = self._ends + self._received / MIN_BYTES_PER_SECOND - time.monotonic()
        if seconds <= 0:
            if self._extra_reads >= _EXTRA_READ_COUNT:
                raise TimeoutError("deadline")
            self._extra_reads += 1
            seconds = _EXTRA_READ_SECONDS
        self._sock.settimeout(seconds)

    def send(self, data: Part) -> None:
        if self._calls_left:
            self._calls_left -= 1
        else:
            self._set_timeout()
        self._sock.sendall(data)

    def receive(self) -> bytes:
        if self._calls_left:
            self._calls_left -= 1
        else:
            self._set_timeout()
        data: bytes = self._sock.recv(
            _FIRST_READ_BYTES if not self._received else SOCKET_READ_BYTES
        )
        if not data:
            raise ConnectionError("closed")
        self._received += len(data)
        return data

    def receive_into(self, room: memoryview) -> int:
        self._set_timeout()
        size: int = self._sock.recv_into(room)
        if not size:
            raise ConnectionError("closed")
        self._received += size
        return size


def _receive(line: _TimedSocket, reader: Reader, sink: PayloadSink) -> Any:
    """Read one value straight into a sink; False if it is missing or has another size."""
    while (header := reader.header()) is None:
        reader.feed(line.receive())
    if header[:1] in (b"-", b"!"):
        return ErrorReply(header[1:].decode("utf-8", "replace"))
    if header == b"$-1":
        return False
    if header != b"$%d" % sink.size:
        if header[:1] == b"$" and header[1:].isdigit() and int(header[1:]) <= MAX_VALUE_BYTES:
            raise WrongSizeError
        raise GarbledError("not a value")
    sink.begin()
    at = 0
    while at < sink.size:
        room = sink.buffer_at(at)[: sink.size - at]
        early = reader.take_bytes(len(room))
        done = len(early)
        room[:done] = early
        while done < len(room):
            done += line.receive_into(room[done:])
        sink.accept(room)
        at += len(room)
    while reader.unread < 2:
        reader.feed(line.receive())
    if reader.header() != b"":
        raise GarbledError("a value without its end")
    return True


class WrongSizeError(Exception):
    """A value has another size than expected: the connection is closed, not read to its end."""


# --- over a connection of an event loop ----------------------------------------------------------


class Callback(Protocol):
    """Called with None when an exchange has all its replies, else with the error."""

    def __call__(self, error: Exception | None, /) -> None: ...


def is_closed(connection: Any) -> bool:
    """True if an idle `redis.asyncio.Connection` was closed, at either end.

    Its transport reports that only once, to redis-py's reader, which then keeps it half open.
    """
    return bool(connection._writer.transport.is_closing() or connection._reader.at_eof())


class Stream(asyncio.Protocol):
    """A connected `redis.asyncio.Connection` with pipelined exchanges.

    Args:
        connection: taken from its pool for as long as this object lives.

    Attributes:
        has_received: something was received on it.
        closed: it can no longer be used.
        sent: the exchanges in flight, oldest first.
    """

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.has_received = False
        self._loop = asyncio.get_running_loop()
        self._transport = connection._writer.transport
        self.closed = is_closed(connection)
        self._before = self._transport.get_protocol()
        self._transport.set_protocol(self)
        self._reader = Reader()
        self.sent: deque[tuple[Exchange, Callback, float, int]] = deque()
        self._received = self._excuses = 0
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0

    def send(self, exchange: Exchange, done: Callback) -> None:
        """Send an exchange after those that are in flight."""
        if self.closed:
            self._loop.call_soon(done, ConnectionError("closed"))
            return
        now = self._loop.time()
        self.sent.append((exchange, done, now, self._received))
        if self._timer is None:
            self._due = now + exchange.seconds
            self._timer = self._loop.call_at(self._due, self._check_deadline)
        for piece in exchange.commands:
            self._transport.write(piece)

    async def run(self, exchange: Exchange) -> list[Any]:
        """Send an exchange and wait for its replies.

        Raises:
            ErrorReply, GarbledError: see `Exchange.answer`.
            OSError: the connection broke, or the deadline has passed (`TimeoutError`).
        """
        ended: asyncio.Future[Exception | None] = self._loop.create_future()
        self.send(exchange, lambda error: None if ended.done() else ended.set_result(error))
        error = await ended
        if error is not None:
            raise error
        return exchange.answer()

    def data_received(self, data: bytes) -> None:
        """Complete the exchanges whose replies have arrived."""
        self._received += len(data)
        self.has_received = True
        self._excuses = 0
        sent = self.sent
        try:
            self._reader.feed(data)
            while sent and self._reader.take((first := sent[0][0]).replies, first.count + 1):
                sent.popleft()[1](None)
        except Exception as error:
            self.fail(error)
        if not sent and self._reader.unread and not self.closed:
            self.fail(GarbledError("a reply without a command"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail what is in flight: the server or the network has closed the connection."""
        last_error = self.sent[0][0].first_error() if self.sent else None
        self.fail(last_error or exc or ConnectionError("closed"))

    def _check_deadline(self) -> None:
        """Check the deadline of the oldest exchange, unless the loop is too busy to read."""
        self._timer = None
        if not self.sent:
            return
        exchange, _, begun, before = self.sent[0]
        now = self._loop.time()
        due_at = begun + exchange.seconds + (self._received - before) / MIN_BYTES_PER_SECOND
        if now < due_at:
            self._due = due_at
        elif self._excuses < MAX_EXCUSES and (now - self._due > LATE_SECONDS or self._unread()):
            self._excuses += 1
            self._due = now + min(exchange.seconds, 2 * LATE_SECONDS)
        else:
            self.fail(TimeoutError("deadline"))
            return
        self._timer = self._loop.call_at(self._due, self._check_deadline)

    def _unread(self) -> bool:
        """True if data has arrived that the loop has not read yet."""
        if self._transport.is_closing():
            return False
        with selectors.DefaultSelector() as selector:
            selector.register(self._transport.get_extra_info("socket"), selectors.EVENT_READ)
            return bool(selector.select(0))

    def detach(self) -> Any:
        """Return the connection in its original state."""
        self._stop_timer()
        self.closed = True
        self._transport.set_protocol(self._before)
        return self.connection

    def fail(self, error: Exception) -> None:
        """Close the connection at once; everything in flight fails with one error."""
        if self.closed:
            return
        self.closed = True
        self._stop_timer()
        self._transport.abort()
        sent = [done for _, done, _, _ in self.sent]
        self.sent.clear()
        for done in sent:
            done(error)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
