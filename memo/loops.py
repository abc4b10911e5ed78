"""Loops: connections to Redis of one event loop.

The rules are those of `links`, and:

5.  Connections of a loop are closed when the loop shuts its asynchronous generators down, which
    `asyncio.run` does.
6.  A loop that was held up by something else is not held against Redis.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import Any

import redis  # noqa: F401 - whole before its parts, or two threads get half of it each
import redis.asyncio.connection as loops
from redis import exceptions

from memo import breaker
from memo.breaker import RATE
from memo.dial import connect_async, dial_async
from memo.lanes import LATE, SPARED, Home, Road
from memo.links import CHUNK, QUEUE, BusyError, Part, fault_of, options
from memo.scripts import Question


class _Counting(asyncio.StreamReader):
    """A stream reader that knows how much it has received."""

    received = 0

    def feed_data(self, data: Any) -> None:
        self.received += len(data)
        super().feed_data(data)


class LoopLink:
    """What the three kinds of connections of a loop have in common."""

    _transport: asyncio.Transport | None = None
    _reader: asyncio.StreamReader | None
    _writer: asyncio.StreamWriter | None

    @property
    def received(self) -> int:
        """Bytes received so far."""
        return getattr(self._reader, "received", 0)

    async def _connect(self: Any) -> None:
        sock, tls = await self._dial()
        loop = asyncio.get_running_loop()
        reader = _Counting(limit=CHUNK, loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        try:
            transport, _ = await loop.create_connection(lambda: protocol, sock=sock, **tls)
        except BaseException:
            sock.close()
            raise
        self._transport = transport
        self._reader = reader
        self._writer = asyncio.StreamWriter(transport, protocol, reader, loop)

    async def exchange(self: Any, parts: Sequence[Part], replies: int) -> Any:
        """Send, and read one reply, or a list of several with the errors among them."""
        if len(parts) == 1 and len(parts[0]) <= CHUNK:
            await self.send_packed_command(parts, check_health=False)
        else:
            for piece in _pieces(parts):
                await self.send_packed_command([piece], check_health=False)
                await asyncio.sleep(0)
        if replies == 1:
            return await self.read_response()
        return [await self._reply() for _ in range(replies)]

    async def _reply(self: Any) -> Any:
        try:
            return await self.read_response()
        except exceptions.ResponseError as error:
            return error

    def hand_over(self: Any, protocol: asyncio.BaseProtocol) -> Any:
        """Let `protocol` have all that comes from now on; the transport to write to.

        The writer stays where it is: one that is collected closes its transport.
        """
        self._transport.set_protocol(protocol)
        return self._transport

    def forget(self) -> None:
        """Let go of streams whose loop is closed."""
        self._reader = self._writer = None

    def abort(self: Any) -> None:
        """Close at once, whatever is still to be sent or read; never raises, never waits."""
        self._parser.on_disconnect()
        if self._transport is not None:
            self._transport.abort()
            self._transport = None
        self._reader = self._writer = None


def _pieces(parts: Sequence[Part]) -> Iterator[Part]:
    for part in parts:
        view = memoryview(part)
        for at in range(0, len(view), CHUNK):
            yield view[at : at + CHUNK]


class TcpLoopLink(LoopLink, loops.Connection):
    """TCP."""

    async def _dial(self) -> tuple[socket.socket, dict[str, Any]]:
        return await dial_async(self.host, self.port), {}


class TlsLoopLink(LoopLink, loops.SSLConnection):
    """TLS."""

    async def _dial(self) -> tuple[socket.socket, dict[str, Any]]:
        tls = {"ssl": self._connection_arguments()["ssl"], "server_hostname": self.host}
        return await dial_async(self.host, self.port), tls


class UnixLoopLink(LoopLink, loops.UnixDomainSocketConnection):
    """A Unix socket."""

    async def _dial(self) -> tuple[socket.socket, dict[str, Any]]:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        await connect_async(sock, self.path)
        return sock, {}


class _Watch:
    """Ends an exchange when its time is over, unless the loop itself was too busy to look."""

    __slots__ = ("_begun", "_due", "_link", "_loop", "_received", "_seconds", "_spared", "timer")

    def __init__(self, link: Any, seconds: float, timeout: asyncio.Timeout) -> None:
        self._loop = asyncio.get_running_loop()
        self._link = link
        self._begun = self._loop.time()
        self._due = self._begun + seconds
        self._received = link.received
        self._seconds = seconds
        self._spared = 0
        self.timer = self._loop.call_at(self._due, self._look, timeout)

    def _look(self, timeout: asyncio.Timeout) -> None:
        now = self._loop.time()
        received = max(0, self._link.received - self._received)
        earned = self._begun + self._seconds + received / RATE
        if now - self._due > LATE and self._spared < SPARED:
            self._spared += 1
            self._due = now + min(self._seconds, 2 * LATE)
        elif now < earned:
            self._due = earned
        else:
            timeout.reschedule(now)
            return
        self.timer = self._loop.call_at(self._due, self._look, timeout)


class LoopPool:
    """Connections that the tasks of one loop share; made and used on that loop.

    Args:
        url: where to.
        size: how many at most, lanes not counted.
        home: whose lanes they are.
        ended: called when the loop has ended.

    Attributes:
        road: its lanes.
    """

    def __init__(self, url: str, size: int, home: Home, ended: Callable[[], Any]) -> None:
        self._ended = ended
        kind, self._options = options(url)
        kinds = {"tcp": TcpLoopLink, "tls": TlsLoopLink, "unix": UnixLoopLink}
        self._kind: Any = kinds[kind]
        self.loop = asyncio.get_running_loop()
        self._slots = asyncio.Semaphore(size)
        self._idle: list[Any] = []
        self._links: set[Any] = set()
        self._keeper: AsyncGenerator[None, None] | None = None
        self.road = Road(home, self._link)

    def _link(self) -> Any:
        return self._kind(**self._options)

    @property
    def kept(self) -> bool:
        """Whether the loop knows that it has connections to close."""
        return self._keeper is not None

    async def ask(self, commands: Sequence[bytes]) -> Any:
        """As `Road.ask`, also at first."""
        if self._keeper is None:
            await self._keep()
        return await self.road.ask(commands)

    async def exchange(self, question: Question, check: Callable[[], None]) -> Any:
        """As `ThreadPool.exchange`."""
        if self._slots.locked():
            await self._queue(QUEUE * question.seconds, check)
        else:
            await self._slots.acquire()
        try:
            if self._keeper is None:
                await self._keep()
            return await self._within(question)
        finally:
            self._slots.release()

    async def _queue(self, seconds: float, check: Callable[[], None]) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._slots.acquire()
        except TimeoutError:
            raise BusyError("all connections to Redis are busy") from None
        try:
            check()
        except BaseException:
            self._slots.release()
            raise

    async def _within(self, question: Question) -> Any:
        ends = self.loop.time() + question.seconds
        if self._idle:
            link = self._idle.pop()
            try:
                return await self._on(link, question, question.seconds)
            except exceptions.ConnectionError as error:
                if fault_of(error) is not breaker.CLOSED:
                    raise
                self.flush()
        return await self._on(self._link(), question, max(0.001, ends - self.loop.time()))

    async def _on(self, link: Any, question: Question, seconds: float) -> Any:
        self._links.add(link)
        try:
            async with asyncio.timeout(None) as timeout:
                watch = _Watch(link, seconds, timeout)
                try:
                    answer = await link.exchange(question.parts, question.replies)
                finally:
                    watch.timer.cancel()
        except exceptions.ResponseError:
            self._put_back(link)
            raise
        except BaseException:
            self._links.discard(link)
            link.abort()
            raise
        self._put_back(link)
        return answer

    def _put_back(self, link: Any) -> None:
        if link in self._links:
            self._idle.append(link)
        else:  # the pool was closed meanwhile
            link.abort()

    async def _keep(self) -> None:
        """Have the loop close the connections when it ends."""
        _live.add(self)
        self._keeper = self._until_the_end()
        await self._keeper.__anext__()

    async def _until_the_end(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            self._ended()
            self.shut()
            for _ in range(3):  # for the transports to let go of their sockets
                await asyncio.sleep(0)

    def flush(self) -> None:
        """Close the connections that are idle."""
        self.road.flush()
        while self._idle:
            link = self._idle.pop()
            self._links.discard(link)
            link.abort()

    def shut(self) -> None:
        """Close all connections, also those in use.  On the pool's own loop."""
        _live.discard(self)
        self.flush()
        self.road.shut()
        while self._links:
            self._links.pop().abort()

    async def aclose(self) -> None:
        """Close all connections and wait until they are closed.  On the pool's own loop."""
        keeper, self._keeper = self._keeper, None
        self.shut()
        if keeper is not None:
            await keeper.aclose()

    def close(self) -> None:
        """Close all connections, from any thread, as soon as the loop gets to it."""
        if self.loop.is_closed():
            self.forget()
            return
        with contextlib.suppress(RuntimeError):  # the loop has been closed since
            self.loop.call_soon_threadsafe(self.shut)

    def forget(self) -> None:
        """Let go of the connections of a loop that ended without closing them."""
        _live.discard(self)
        self.road.forget()
        for link in self._links:
            link.forget()
        self._idle.clear()
        self._links.clear()


_live: set[LoopPool] = set()
"""Pools with connections: they are closed, never just collected, however they were forgotten."""
