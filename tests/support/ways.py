"""Ways to call: one body as `def`, `async def`, or `def` called from another thread.

A test takes the fixtures `way` and `place`; a test of a whole pipeline `way` and `site`, which may
also be two hosts.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import itertools
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from inside import set_clock

import memo
from memo.testing import ManualClock

WAYS = ("sync", "async", "threads")
PLACES = ("disk", "redis over disk")
SITES = (*PLACES, "two hosts")
PAIRS = (
    tuple(itertools.product(WAYS, SITES))
    if os.environ.get("MEMO_TEST_LONG")
    else tuple(zip(WAYS, SITES, strict=True))
)
"""Each way at each site; without `MEMO_TEST_LONG=1` each way and each site once."""


class Way:
    """A way of calling cached functions in a test."""

    def __init__(self, name: str) -> None:
        self.name = name

    def cached(self, body: Callable[..., Any], **options: Any) -> Any:
        """A cached function over a body, with one parameter `x` unless the body is wrapped."""
        options = {"name": "tests:load", "version": "1", "ttl": None, **options}
        if self.name == "async":

            @memo.cache(**options)
            async def aload(x: Any) -> Any:
                await asyncio.sleep(0)
                return await asyncio.to_thread(body, x)

            return aload

        @memo.cache(**options)
        def load(x: Any) -> Any:
            return body(x)

        return load

    def define(self, body: Callable[..., Any], **options: Any) -> Any:
        """A cached function of a body that is written once, as `async def`.

        The body awaits other cached functions by `ask`, and events by `wait`.
        """
        options = {"name": f"tests:{body.__name__}", "version": "1", "ttl": None, **options}
        if self.name == "async":
            return memo.cache(**options)(body)

        def plain(*args: Any, **kwargs: Any) -> Any:
            return _ended(body(*args, **kwargs))

        def items(*args: Any, **kwargs: Any) -> Iterator[Any]:
            made = body(*args, **kwargs)
            while True:
                try:
                    yield _ended(made.__anext__())
                except StopAsyncIteration:
                    return

        made: Any = items if inspect.isasyncgenfunction(body) else plain
        made.__signature__ = inspect.signature(body)
        return memo.cache(**options)(made)

    async def ask(self, function: Callable[..., Any], *args: Any) -> Any:
        """The result of a cached function, in a body or in what `run` runs."""
        made = function(*args)
        return await made if self.name == "async" else made

    async def read(self, stream: Any, most: int | None = None) -> list[Any]:
        """The items of a stream, or so many of them at most; then it is closed."""
        items: list[Any] = []
        if self.name == "async":
            async for item in stream:
                items.append(item)
                if len(items) == most:
                    break
            await stream.aclose()
            return items
        for item in stream:
            items.append(item)
            if len(items) == most:
                break
        stream.close()
        return items

    async def wait(self, event: threading.Event) -> None:
        """Wait for an event of another thread."""
        if self.name == "async":
            assert await asyncio.to_thread(event.wait, 20)
        else:
            assert event.wait(20)

    def run(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Run what uses cached functions by `ask`: in a loop, here, or in another thread."""
        if self.name == "async":
            return self.call(work)
        return self.call(lambda: _ended(work()))

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The result of one call."""
        if self.name == "async":

            async def main() -> Any:
                try:
                    return await function(*args, **kwargs)
                finally:
                    await memo.drain(10)

            return asyncio.run(main())
        if self.name == "threads":
            context = contextvars.copy_context()
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(context.run, lambda: function(*args, **kwargs)).result()
        return function(*args, **kwargs)

    def together(self, *calls: Callable[[], Any]) -> list[Any]:
        """The results of calls that are made at the same time: as tasks of one loop, or threads."""
        if self.name == "async":

            async def main() -> list[Any]:
                return list(await asyncio.gather(*(call() for call in calls)))

            return asyncio.run(main())
        start = threading.Barrier(len(calls))

        def begin(call: Callable[[], Any]) -> Any:
            start.wait(10)
            return call()

        with ThreadPoolExecutor(len(calls)) as pool:
            return list(pool.map(begin, calls))


def _ended(work: Awaitable[Any]) -> Any:
    """The result of a coroutine that never waits."""
    try:
        work.__await__().send(None)  # type: ignore[attr-defined]
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it waits for something")


class Site:
    """The place where a pipeline runs: one host, or two on one Redis.

    Attributes:
        name: one of `SITES`.
        url: of the Redis, or None.
    """

    def __init__(self, name: str, directory: Path, url: str | None) -> None:
        self.name = name
        self.url = url
        self._hosts = [directory / "host0", directory / "host1"][: 2 if name == "two hosts" else 1]
        self._clock: ManualClock | None = None
        self._open()

    def _open(self) -> None:
        memo.configure(directory=self._hosts[0], redis_url=self.url, deadline=5)
        self.set(self._clock)

    def set(self, clock: ManualClock | None) -> None:
        """Let a clock tell the time here."""
        self._clock = clock
        if clock is not None:
            set_clock(clock)

    def elsewhere(self) -> None:
        """Go on as a process that begins now does; of the other host, where there are two."""
        fresh_process()
        self._hosts.reverse()
        self._open()


def fresh_process() -> None:
    """Forget what this process has in memory and what it has open, as a new process would."""
    from memo.decorators import assembly

    memo.runtime.blocking.drain_blocking(5)
    assembly.reset()


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    """A way to call; with `site` only those of `PAIRS`, by `pytest.mark.parametrize`."""
    return Way(request.param)


@pytest.fixture
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Site:
    """Disk alone, a real Redis over the disk, or that with two hosts."""
    name: str = request.param
    url = None if name == "disk" else request.getfixturevalue("redis_server").url
    return Site(name, tmp_path, url)


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> str:
    """Disk alone, or a real Redis over the disk."""
    if request.param != "disk":
        server = request.getfixturevalue("redis_server")
        memo.configure(redis_url=server.url)
    name: str = request.param
    return name


def kinds(events: Sequence[Any]) -> list[str]:
    """The kinds of events that say how calls were answered."""
    wanted = {"hit", "miss", "computed", "failed", "coalesced", "stale"}
    return [event.kind for event in events if event.kind in wanted]


@pytest.fixture(params=["disk", "redis"])
def where(request: pytest.FixtureRequest) -> AbstractContextManager[Any]:
    """Disk alone, or Redis over disk."""
    if request.param == "disk":
        return nullcontext()
    server = request.getfixturevalue("redis_server")
    return memo.configure(redis_url=server.url, deadline=5)
