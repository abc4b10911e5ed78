"""Ways to call: one body as `def`, `async def`, or `def` called from another thread.

A test takes the fixtures `way` and `place`.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import memo

WAYS = ("sync", "async", "threads")
PLACES = ("disk", "redis over disk")


class Way:
    """How a test calls its cached functions."""

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


def fresh_process() -> None:
    """Forget what this process has in memory and what it has open, as a new process would."""
    from memo.decorators import assembly

    memo.runtime.ports.drain_blocking(5)
    assembly.reset()


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    return Way(request.param)


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
