"""Faults of memo itself: a step of its own that fails as no server and no disk makes it fail."""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from memo.engine import answering, refreshing
from memo.runtime import blocking
from memo.stores import authorities
from memo.stores.memory import Memory
from memo.stores.redis.client import Client
from memo.stores.redis.cluster_leases import RedisLeases

Work = Callable[..., Any]
STEPS: dict[str, tuple[tuple[Any, str], ...]] = {
    "acquire": ((answering, "acquire_lease"), (refreshing, "acquire_lease")),
    "release": ((RedisLeases, "release"),),
    "note": ((authorities, "with_receivers"),),
    "renew": ((RedisLeases, "renew"),),
    "thread": ((blocking, "start_thread"),),
    "list": ((Memory, "entries"),),
}
"""Step -> the functions that do it, and are replaced while it fails."""


@contextmanager
def _wrapped(
    step: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """In this block, what `around` makes of its functions does a step."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in STEPS[step]:
            patch.setattr(owner, name, around(getattr(owner, name)))
        yield


@contextmanager
def failing(step: str, times: int = 1 << 30, answer: Any = None) -> Iterator[list[str]]:
    """A step that fails in this block, so many times at most.

    Args:
        step: one of `STEPS`.
        times: how often it fails; then it works.
        answer: what it answers; None: it raises.

    Yields:
        The step, as often as it has failed.
    """
    failed: list[str] = []

    def fails() -> bool:
        if len(failed) >= times:
            return False
        failed.append(step)
        if answer is None:
            raise RuntimeError("on purpose")
        return True

    def around(work: Work) -> Work:
        async def broken(*args: Any, **kwargs: Any) -> Any:
            return answer if fails() else await work(*args, **kwargs)

        def broken_plainly(*args: Any, **kwargs: Any) -> Any:
            return answer if fails() else work(*args, **kwargs)

        return broken if inspect.iscoroutinefunction(work) else broken_plainly

    with _wrapped(step, around):
        yield failed


@contextmanager
def held_up(step: str, until: threading.Event) -> Iterator[threading.Event]:
    """An asynchronous step that does its work only after an event.

    Yields:
        An event that is set when the step begins.
    """
    begun = threading.Event()

    def around(work: Work) -> Work:
        async def late(*args: Any, **kwargs: Any) -> Any:
            begun.set()
            assert until.wait(20)
            return await work(*args, **kwargs)

        return late

    with _wrapped(step, around):
        yield begun


@contextmanager
def interrupted_each_time() -> Iterator[None]:
    """Between any two looks at Redis the connection counts as interrupted."""
    count = itertools.count()
    another = property(lambda _: next(count), lambda *_: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Client, "interruptions", another, raising=False)
        yield
