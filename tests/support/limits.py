"""Limits of memo that tests lower or raise, to reach them sooner: each is named once, here.

Where a setting or a real load reaches the limit as well, tests use that.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

_BANDS = "memo.keys.encoding.libraries.array_order"
_PANDAS = "memo.keys.encoding.libraries.for_pandas"
LIMITS = {
    "cleared_at_once": ("memo.stores.disk.index:ROWS_PER_TRANSACTION",),
    "counting_seconds": ("memo.engine.invalidating:COUNT_SECONDS",),
    "lease": ("memo.stores.protocols:LEASE_SECONDS", "memo.coordination.leases:LEASE_SECONDS"),
    "verified_payloads": ("memo.engine.loading:MAX_VERIFIED_PAYLOADS",),
    "waiting_invalidations": ("memo.stores.disk.host_state:MAX_WAITING_INVALIDATIONS",),
    "mirror": (
        "memo.stores.disk.host_database:MAX_MIRRORED_GROUPS",
        "memo.stores.disk.host_state:MAX_MIRRORED_GROUPS",
    ),
    "connections": (
        "memo.stores.redis.transport.nodes:MAX_CONNECTIONS",
        "memo.stores.redis.transport.thread_connections:MAX_CONNECTIONS",
    ),
    "just_written": ("memo.validity.dependencies:RACY_SECONDS",),
    "transfer_rate": ("memo.stores.redis.transport.exchange:MIN_BYTES_PER_SECOND",),
    "tracking_bound": ("memo.stores.redis.tracking:MAX_OUTDATED_SECONDS",),
    "tracking_pause": ("memo.stores.redis.tracking:REFUSED_PAUSE_SECONDS",),
    "step_seconds": ("memo.runtime.port:MAX_STEP_SECONDS",),
    "entries_per_step": ("memo.engine.computing:ENTRIES_PER_STEP",),
    "mounts": ("memo.runtime.ownership:MOUNTS_FILE",),
    "stored_format": ("memo.runtime:FORMAT",),
    "parts_of_cycles": ("memo.keys.encoding.canonical:MAX_IN_CYCLES",),
    "threads": (f"{_BANDS}:COPY_THREADS",),
    "band_bytes": (f"{_BANDS}:BAND_BYTES",),
    "tile_bytes": (f"{_BANDS}:TILE_BYTES",),
    "hashed_tile_bytes": (f"{_BANDS}:HASHED_TILE_BYTES",),
    "tile_rows": (f"{_BANDS}:TILE_ROWS",),
    "parallel_from": (f"{_BANDS}:PARALLEL_COPY_FROM_BYTES",),
    "copied_whole": ("memo.keys.encoding.libraries.for_arrays:MAX_COPIED_WHOLE_BYTES",),
    "long_column": (f"{_PANDAS}:LONG_COLUMN_BYTES",),
    "strip_bytes": (f"{_PANDAS}:STRIP_BYTES",),
}
"""Limit -> the constants that hold it.  Their modules are imported when one is changed."""


def change(set_: Callable[..., None] = setattr, /, **values: Any) -> None:
    """Set limits by their names, in a process of its own; in a test use the fixture `set_limits`.

    Args:
        set_: how a constant of a module is set; as it is, for as long as the process lives.
        values: limit -> value.
    """
    for limit, value in values.items():
        for place in LIMITS[limit]:
            module, _, name = place.partition(":")
            assert hasattr(import_module(module), name), place
            set_(import_module(module), name, value)
