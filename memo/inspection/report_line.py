"""Reports: what the cache did in a span of time as one line, with the change behind a miss.

`magics` prints it under each cell; scripts use `memo.report()`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from memo.decorators import assembly
from memo.decorators.cached_function import CachedFunction, functions
from memo.engine.explaining import CODE_CHANGED, changed_code
from memo.errors import MemoError
from memo.metrics import rendering
from memo.metrics.recorder import COUNTERS, Span, open_span
from memo.runtime.blocking import BLOCKING, drive
from memo.runtime.reasons import ABSENT

EXPLAINING_SECONDS = 0.5
"""Seconds after which no more entries are read to explain misses."""
MAX_EXPLAINED_MISSES = 3
"""Maximum number of misses of one span whose code is compared with an earlier version."""


@contextmanager
def report(file: TextIO | None = None) -> Iterator[Span]:
    """Print what the cache did in a `with` block, in one line; nothing if it was not used.

    ::

        with memo.report():
            frame = load("EU")
        # 1 hit (disk) · saved 41.8 s

    Args:
        file: the stream to print to; by default standard error.

    Yields:
        The report; its `stats` has the numbers.
    """
    span = open_span()
    try:
        yield span
    finally:
        span.end()
        span.close()
        if span.used:
            explain_misses(span)
            print(f"memo: {rendering.report(span)}", file=file or sys.stderr)


def explain_misses(span: Span) -> None:
    """Name the changed code behind the first misses of a span, if that was the cause."""
    known = {function.function_id: function for function in functions()}
    absent = [at for at, miss in enumerate(span.misses) if miss.reason == ABSENT]
    for at in absent[:MAX_EXPLAINED_MISSES]:
        miss = span.misses[at]
        function = known.get(miss.function)
        if function is not None and not miss.detail:
            words = _changed_code(function, [miss.key]).get(miss.key, "")
            span.misses[at] = miss._replace(detail=words)


def explain_counts() -> None:
    """Count this process's misses as "code changed" if that was the cause."""
    known = {function.function_id: function for function in functions()}
    latest = time.monotonic() + EXPLAINING_SECONDS
    for identity, keys in COUNTERS.unexplained(ABSENT).items():
        if identity in known and time.monotonic() < latest:
            for _ in _changed_code(known[identity], keys):
                COUNTERS.explain(identity, ABSENT, CODE_CHANGED)


def _changed_code(function: CachedFunction[..., Any], keys: Sequence[str]) -> dict[str, str]:
    try:
        return drive(changed_code(BLOCKING, function._function, assembly.manifests(), keys))
    except MemoError:  # a fault of the cache: the event's reason is shown instead
        return {}
