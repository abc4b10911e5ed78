"""Connections that the tasks of an event loop share.

The rules are those of `thread_connections`, but tasks that wait for a connection are served in
order, and coalesced lookups use a connection of their own per server.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from contextvars import Context
from functools import partial
from typing import Any, TypeVar

from memo.settings.redis_urls import Address
from memo.stores.redis.transport.coalescing import Coalescer, Failure, Owner
from memo.stores.redis.transport.exchange import (
    LATE_SECONDS,
    MAX_EXCUSES,
    BusyError,
    Exchange,
    Stream,
)
from memo.stores.redis.transport.nodes import (
    BUSY_TEXT,
    MAX_CONNECTIONS,
    MIN_OPEN_WAIT_SECONDS,
    TOPOLOGY_REFRESH_SECONDS,
    LoopNodes,
    Route,
    abort,
    slow_step,
    was_renewed,
)
from memo.stores.redis.transport.resp import Command

T = TypeVar("T")
Ask = Callable[[Sequence[Command]], "asyncio.Future[Any]"]
"""Takes commands, and returns their future replies: a list of them, or a `Failure`."""
CONCURRENT_OPENINGS = 4
"""Connections that a loop opens concurrently: many callers without one share the first connections,
instead of each making a TLS handshake."""


class LoopConnections:
    """Connections that the tasks of one event loop share; created and used on that loop.

    Args:
        address, options: see `ThreadConnections`.
        owner: the client.
        ended: called when the loop has ended.

    Attributes:
        look_up: sends commands that only read; None: call `get_ready` first.
    """

    def __init__(
        self, address: Address, options: dict[str, Any], owner: Owner, ended: Callable[[], Any]
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self._owner = owner
        self._ended = ended
        self.nodes = LoopNodes(address, options)
        self._slow = slow_step(address)
        self._slots = {blocks: asyncio.Semaphore(MAX_CONNECTIONS) for blocks in (False, True)}
        self._openings = asyncio.Semaphore(CONCURRENT_OPENINGS)
        self._refreshing = asyncio.Lock()
        self._refreshed = -TOPOLOGY_REFRESH_SECONDS
        self._coalescers: dict[Any, Coalescer] = {}
        self._streams: dict[Stream, Any] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._keeper: AsyncGenerator[None, None] | None = None
        self.look_up: Ask | None = None

    # --- lookups --------------------------------------------------------------------------------

    async def get_ready(self) -> None:
        """Set `look_up`: register for the end of the loop, and query the topology of a cluster."""
        if self._keeper is None:
            await self._keep()
        if self.look_up is None:
            if self.nodes.cluster is None:
                self.look_up = self._coalescer(self.nodes.pool).ask
            else:
                await self._within_time(self._refresh_topology())

    def _look_up_at_each(self, commands: Sequence[Command]) -> asyncio.Future[Any]:
        """Look up commands at the servers of a cluster that have their keys."""
        parts: dict[Any, list[int]] = {}
        for place, (key, _) in enumerate(commands):
            parts.setdefault(self.nodes.of(key), []).append(place)
        if len(parts) == 1:
            (node,) = parts
            return self._coalescer(node).ask(commands)
        return _GatheredReplies(self.loop, len(commands)).gather(
            (self._coalescer(node).ask([commands[place] for place in places]), places)
            for node, places in parts.items()
        )

    def _coalescer(self, node: Any) -> Coalescer:
        found = self._coalescers.get(node)
        if found is None:
            opened = partial(self._open_stream, node)
            found = self._coalescers[node] = Coalescer(self._owner, opened, self._release_stream)
        return found

    # --- exchanges -------------------------------------------------------------------------------

    async def exchange(
        self, route: Route, exchange: Exchange, check: Callable[[], None], *, blocks: bool = False
    ) -> list[Any]:
        """Like `ThreadConnections.exchange`."""
        slots = self._slots[blocks]
        if slots.locked():
            if blocks:
                raise BusyError(BUSY_TEXT)
            await self._queue(slots, exchange.seconds, check)
        else:
            await slots.acquire()
        try:
            await self.get_ready()
            return await self._exchange(self.nodes.of(route), exchange, check)
        finally:
            slots.release()

    async def _queue(
        self, slots: asyncio.Semaphore, seconds: float, check: Callable[[], None]
    ) -> None:
        try:
            async with asyncio.timeout(seconds):
                await slots.acquire()
        except TimeoutError:
            raise BusyError(BUSY_TEXT) from None
        try:
            check()
        except BaseException:
            slots.release()
            raise

    async def _exchange(
        self, node: Any, exchange: Exchange, check: Callable[[], None]
    ) -> list[Any]:
        for again in (True, False):
            stream = await self._open_stream(node, check)
            fresh = not getattr(stream.connection, "used", False)
            stream.connection.used = True
            try:
                answer = await stream.run(exchange)
            except ConnectionError:
                self._release_stream(stream)
                if fresh or not again:
                    raise
                self._owner.record_replacement()
                exchange.restart()
                continue
            except BaseException:
                stream.fail(ConnectionError("given up"))
                self._release_stream(stream)
                raise
            self._streams.pop(stream, None)
            if stream.closed:  # closed meanwhile
                return answer
            await self.nodes.release(node, stream.detach())
            return answer
        raise AssertionError

    # --- connections -----------------------------------------------------------------------------

    async def _open_stream(self, node: Any, check: Callable[[], None] | None = None) -> Stream:
        waits = self._openings.locked()
        async with self._openings:
            if waits and check is not None:  # not for the probe of a server that may answer again
                check()
            connection = await self._within_time(
                self.nodes.acquire(node), lambda late: self._return_late(node, late)
            )
        if was_renewed(connection):
            self._owner.record_replacement()
        stream = Stream(connection)
        self._streams[stream] = node
        return stream

    async def _within_time(
        self, work: Coroutine[Any, Any, T], late: Callable[[T], None] | None = None
    ) -> T:
        """Return the result of connecting; the attempt goes on if its caller gives up.

        Raises:
            TimeoutError: it takes too long.
        """
        task = self.loop.create_task(work, name="memo-connect", context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            for _ in range(MAX_EXCUSES):
                seconds = max(MIN_OPEN_WAIT_SECONDS, self._owner.deadline)
                due = self.loop.time() + seconds
                await asyncio.wait({task}, timeout=seconds)
                if task.done() or self.loop.time() - due < LATE_SECONDS:
                    break
        finally:
            if not task.done():
                task.add_done_callback(partial(_finish_late, late))
        if not task.done():
            raise TimeoutError(self._slow)
        return task.result()

    def _return_late(self, node: Any, connection: Any) -> None:
        """Return a connection that came too late for its caller to its pool."""
        task = self.loop.create_task(self.nodes.release(node, connection), context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _release_stream(self, stream: Stream) -> None:
        """Return the connection of a closed stream to its pool, which reopens it."""
        node = self._streams.pop(stream, None)
        if node is None:
            return
        abort(stream.connection)
        if not self.loop.is_closed():
            self._return_late(node, stream.connection)

    async def _refresh_topology(self) -> None:
        """Query the topology of a cluster, unless another task has done so."""
        async with self._refreshing:
            if (
                self.look_up is None
                and self.loop.time() - self._refreshed > TOPOLOGY_REFRESH_SECONDS
            ):
                self._refreshed = self.loop.time()
                await self.nodes.refresh()
                self.look_up = self._look_up_at_each

    def reconnect_soon(self) -> None:
        """After a fault, query the topology before the next exchange; from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has been closed since
            self.loop.call_soon_threadsafe(self._reconnect)

    def _reconnect(self) -> None:
        if self.nodes.cluster is not None:
            self.look_up = None
        self.flush()

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
            self.close_now()
            for _ in range(3):  # so that the transports can close their sockets
                await asyncio.sleep(0)

    def flush(self) -> None:
        """Close the idle connections."""
        for coalescer in list(self._coalescers.values()):
            coalescer.flush()
        for connection in self.nodes.idle():
            if connection.is_connected:
                abort(connection)

    def close_now(self) -> None:
        """Close all connections, even those in use; on their own loop."""
        _live.discard(self)
        self.look_up = None
        for coalescer in list(self._coalescers.values()):
            coalescer.close()
        self._coalescers.clear()
        for task in list(self._tasks):
            task.cancel()
        for stream in list(self._streams):
            stream.fail(ConnectionError("closed here"))
        self._streams.clear()
        for connection in self.nodes.connections():
            abort(connection)

    async def aclose(self) -> None:
        """Close all connections and wait until they are closed; on their own loop."""
        keeper, self._keeper = self._keeper, None
        self.close_now()
        if keeper is not None:
            await keeper.aclose()

    def close(self) -> None:
        """Close all connections as soon as the loop can; from any thread."""
        if self.loop.is_closed():
            self.forget()
            return
        with contextlib.suppress(RuntimeError):  # the loop has been closed since
            self.loop.call_soon_threadsafe(self.close_now)

    def forget(self) -> None:
        """Drop the connections of a loop that ended without closing them."""
        _live.discard(self)
        self.look_up = None
        for connection in self.nodes.connections():
            connection._reader = connection._writer = None
        self._coalescers.clear()
        self._streams.clear()


def _finish_late(late: Callable[[Any], None] | None, task: asyncio.Task[Any]) -> None:
    """Pass on the result of an attempt that ended too late for its caller."""
    if not task.cancelled() and task.exception() is None and late is not None:
        late(task.result())


class _GatheredReplies:
    """The replies of several servers, in the order of the commands."""

    def __init__(self, loop: asyncio.AbstractEventLoop, count: int) -> None:
        self.future: asyncio.Future[Any] = loop.create_future()
        self._found: list[Any] = [None] * count
        self._missing = 0

    def gather(self, parts: Iterable[tuple[asyncio.Future[Any], list[int]]]) -> asyncio.Future[Any]:
        """Wait for all parts, each a future and the positions of its replies."""
        both = list(parts)
        self._missing = len(both)
        for future, places in both:
            future.add_done_callback(partial(self._take_part, places))
        return self.future

    def _take_part(self, places: list[int], part: asyncio.Future[Any]) -> None:
        self._missing -= 1
        if self.future.done() or part.cancelled():
            return
        answer = part.result()
        if type(answer) is Failure:
            self.future.set_result(answer)
            return
        for place, reply in zip(places, answer, strict=True):
            self._found[place] = reply
        if not self._missing:
            self.future.set_result(self._found)


_live: set[LoopConnections] = set()
"""Loops with open connections: these are closed explicitly, never left to the garbage collector."""
