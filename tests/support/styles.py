"""One test, three ways to call: `def`, `async def`, and `def` from several threads.

A test is written once over a `Style`; it makes its functions and runs its calls through it.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from memo import cache


class Style:
    """A style of writing and calling functions.

    Attributes:
        name: `"sync"`, `"async"` or `"threads"`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_async = name == "async"

    def __repr__(self) -> str:
        return self.name

    def cached(self, body: Callable[..., Any], **options: Any) -> Any:
        """`body`, a plain function, cached as this style writes functions.

        `body` may call `pause(seconds)`, which it gets as its keyword argument of that name if it
        has one; in an async function that is awaited in between: `body` is then a generator
        function that yields the seconds to sleep and returns the result.
        """
        return cache(**options)(self.written(body))

    def written(self, body: Callable[..., Any]) -> Any:
        """`body` as a `def` or an `async def` of the same name and parameters."""
        steps = inspect.isgeneratorfunction(body)

        def run_sync(*args: Any, **kwargs: Any) -> Any:
            if not steps:
                return body(*args, **kwargs)
            generator = body(*args, **kwargs)
            return _finish(generator)

        async def run_async(*args: Any, **kwargs: Any) -> Any:
            if not steps:
                return body(*args, **kwargs)
            generator = body(*args, **kwargs)
            advance = partial(generator.send, None)
            while True:
                try:
                    step = advance()
                except StopIteration as stop:
                    return stop.value
                try:
                    sent = await step if inspect.isawaitable(step) else await asyncio.sleep(step)
                    advance = partial(generator.send, sent)
                except Exception as error:
                    advance = partial(generator.throw, error)

        written: Any = run_async if self.is_async else run_sync
        written.__signature__ = inspect.signature(body)
        written.__name__ = body.__name__
        written.__qualname__ = body.__qualname__
        written.__module__ = body.__module__
        return written

    def call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """One call, from outside any event loop."""
        if self.name == "threads":
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(function, *args, **kwargs).result()
        if self.is_async:
            return asyncio.run(function(*args, **kwargs))
        return function(*args, **kwargs)

    def together(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """Several calls at once; what they gave, exceptions included."""
        if self.is_async:
            return asyncio.run(_gathered(calls))
        barrier = threading.Barrier(len(calls))

        def one(call: Callable[[], Any]) -> Any:
            barrier.wait()
            try:
                return call()
            except Exception as error:
                return error

        with ThreadPoolExecutor(len(calls)) as pool:
            return list(pool.map(one, calls))


async def _gathered(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    return await asyncio.gather(*(call() for call in calls), return_exceptions=True)


def _finish(generator: Any) -> Any:
    """Run a generator body to its end: sleep what it yields, send back what it calls."""
    sent: Any = None
    while True:
        try:
            step = generator.send(sent)
        except StopIteration as stop:
            return stop.value
        sent = time.sleep(step) if isinstance(step, (int, float)) else step


STYLES = [Style("sync"), Style("async"), Style("threads")]
