"""The clock: two readings that together cannot be fooled by a step of the wall clock.

`wall_ns` is what other hosts understand.  `boot_ns` counts from the start of this machine and never
steps (`CLOCK_BOOTTIME` on Linux, which also counts while the machine sleeps; elsewhere the
monotonic clock).  Two readings of `boot_ns` can only be compared if their `boot_id` is the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property, partial

SECOND = 1_000_000_000
"""Nanoseconds in a second: the unit of every time inside an entry."""


def _boot_id() -> bytes:
    """16 bytes that name this start of the machine; zeros if the system has no such name."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return bytes.fromhex(file.read().strip().replace("-", ""))
    except (OSError, ValueError):
        return bytes(16)


class Clock:
    """Reads the time; tests put one of their own in its place.

    Attributes:
        wall_ns: nanoseconds since the Unix epoch.
        boot_ns: nanoseconds since this machine started.
        boot_id: 16 bytes; zeros when the start of the machine has no name, in which case ages are
            taken from the wall clock.
    """

    wall_ns: Callable[[], int] = staticmethod(time.time_ns)
    boot_ns: Callable[[], int] = staticmethod(
        partial(time.clock_gettime_ns, time.CLOCK_BOOTTIME)
        if hasattr(time, "CLOCK_BOOTTIME")
        else time.monotonic_ns
    )

    @cached_property
    def boot_id(self) -> bytes:
        """Read once: a process does not outlive the start of its machine."""
        return _boot_id()


SYSTEM = Clock()
"""The clock of this machine."""
