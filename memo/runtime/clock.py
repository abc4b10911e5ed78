"""The clock: two times that together are robust against steps of the wall clock.

`wall_ns` can be compared with other hosts.  `boot_ns` counts from the boot of this machine and
never steps (`CLOCK_BOOTTIME` on Linux, which also counts while the machine sleeps; elsewhere the
monotonic clock).  Two values of `boot_ns` can only be compared if their `boot_id` is the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property, partial

SECOND = 1_000_000_000
"""Nanoseconds in a second: the unit of every time inside an entry."""


def _boot_id() -> bytes:
    """Return 16 bytes that identify this boot of the machine.

    Zeros if the system has no such id.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return bytes.fromhex(file.read().strip().replace("-", ""))
    except (OSError, ValueError):
        return bytes(16)


class Clock:
    """Tells the time; tests replace it with a clock of their own.

    Attributes:
        wall_ns: nanoseconds since the Unix epoch.
        boot_ns: nanoseconds since this machine booted.
        boot_id: 16 bytes; zeros if the boot has no id, in which case ages are taken from the wall
            clock.
    """

    wall_ns: Callable[[], int] = staticmethod(time.time_ns)
    boot_ns: Callable[[], int] = staticmethod(
        partial(time.clock_gettime_ns, time.CLOCK_BOOTTIME)
        if hasattr(time, "CLOCK_BOOTTIME")
        else time.monotonic_ns
    )

    @cached_property
    def boot_id(self) -> bytes:
        """The id of this boot, read once: a process does not survive a reboot."""
        return _boot_id()


SYSTEM_CLOCK = Clock()
"""The clock of this machine."""
