"""The engine: look a call up and load its entry, or compute and store its result.

Written once, for sync and async functions.  Imports `coordination`, `keys`, `stores`, `validity`,
`records` and below; it does not know which store answers.
Start with `answering.py`, then `computing.py`.

`engine.answering` is imported at the first call of a cached function, and so are the stores: a
process that only decorates functions needs neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memo.runtime import lazy_attributes

if TYPE_CHECKING:
    from memo.engine import answering as answering
    from memo.engine.explaining import Explanation as Explanation
    from memo.engine.invalidating import Invalidation as Invalidation
else:
    __getattr__ = lazy_attributes(
        __name__,
        {
            "Explanation": "memo.engine.explaining",
            "Invalidation": "memo.engine.invalidating",
            "answering": "memo.engine.answering",
        },
    )
