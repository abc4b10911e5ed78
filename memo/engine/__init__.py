"""A call and its answer: look up, judge, load or compute, store; written once for sync and async.

Imports `keys`, `stores`, `validity`, `records` and below; it never sees a particular store.
Start with `answering.py`, then `computing.py`.  `coordination/flights.py` lets callers share a
computation, and `coordination/leases.py` takes and renews the leases of `use_lock`.

`engine.answering` is imported at the first call of a cached function, as the stores are: a process
that only decorates functions does not need it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memo.runtime import later

if TYPE_CHECKING:
    from memo.engine import answering as answering
    from memo.engine.explaining import Explanation as Explanation
    from memo.engine.invalidating import Invalidation as Invalidation
else:
    __getattr__ = later(
        __name__,
        {
            "Explanation": "memo.engine.explaining",
            "Invalidation": "memo.engine.invalidating",
            "answering": "memo.engine.answering",
        },
    )
