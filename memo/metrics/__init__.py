"""Counters of events, running computations, and snapshots of both as text, HTML and JSON.

Imports `coordination` and below, and never the engine, which imports it.
Start with `recorder.py`; `rendering.py` draws statistics and lists of entries, with the numbers and
tables of `formatting.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memo.runtime import lazy_attributes

if TYPE_CHECKING:
    from memo.metrics.snapshots import CacheInfo as CacheInfo
    from memo.metrics.snapshots import Stats as Stats
else:
    __getattr__ = lazy_attributes(
        __name__, dict.fromkeys(("CacheInfo", "Stats"), "memo.metrics.snapshots")
    )
