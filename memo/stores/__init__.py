"""Storage of entries: the chain of tiers, memory, disk, Redis, and a user's own store.

Imports `validity`, `records` and below; it never imports the engine.
Start with `protocols.py` for the interface of a tier, then `chain.py`; `authorities.py` decides
what is valid, and replays invalidations that a tier has missed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memo.runtime import lazy_attributes

if TYPE_CHECKING:
    from memo.stores.chain import Chain as Chain
else:
    __getattr__ = lazy_attributes(__name__, {"Chain": "memo.stores.chain"})
