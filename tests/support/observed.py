"""The functions of memo that are called: seen by a profiler, with nothing replaced."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def calls_of(
    *functions: Callable[..., Any],
    note: Callable[[Mapping[str, Any]], Any] | None = None,
    then: Callable[[], object] = lambda: None,
) -> Iterator[list[Any]]:
    """The names of some functions as they are called, here and in threads that begin meanwhile.

    Args:
        functions: plain ones; a coroutine begins anew each time it goes on.
        note: gives what is listed for a call, from its arguments, in place of the name.
        then: called as each of them begins.
    """
    seen: list[Any] = []
    wanted = {function.__code__: function.__name__ for function in functions}

    def look(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code in wanted:
            seen.append(note(frame.f_locals) if note else wanted[frame.f_code])
            then()

    before = sys.getprofile()
    threading.setprofile(look)
    sys.setprofile(look)
    try:
        yield seen
    finally:
        sys.setprofile(before)
        threading.setprofile(before)
