"""A process that runs for minutes under small limits: `python -m benchmarks soak --minutes 5`.

Threads and tasks call, invalidate by tag and by function, and refresh, on a memory tier of 16 MiB,
a disk tier of 60 MiB and a Redis of 48 MiB that evicts.  Descriptors, threads, memory, disk and
Redis must be flat: the highest of the second half is compared with the highest of the first.  Ends
with status 1 where one is not.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import memo
from benchmarks.machine import ROOT, places

EVERY = 1.0
"""Seconds between two samples."""
MEMORY, DISK, REDIS = 16 << 20, 60 << 20, 48 << 20
MARGIN = 1.1
"""The second half may be so much higher than the first."""


class Series(NamedTuple):
    """A figure that is watched.

    Attributes:
        title: the figure, with its unit.
        read: returns the present value.
        slack: the rise that is always allowed, in the same unit.
        limit: the highest value allowed; 0: none.
    """

    title: str
    read: Callable[[], float]
    slack: float = 0.0
    limit: float = 0.0


def _descriptors() -> float:
    return len(os.listdir("/proc/self/fd"))


def _resident() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def _disk(directory: str) -> float:
    total = 0
    seen: set[int] = set()
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                facts = os.stat(os.path.join(folder, name))
            except OSError:
                continue
            if facts.st_ino not in seen:
                seen.add(facts.st_ino)
                total += facts.st_size
    return total / 2**20


class Work:
    """The functions, and the calls of them until `stop` is set."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.calls = 0
        self.errors: list[str] = []

        @memo.cache(ttl=5, tags=["all", "user:{user}"], key_prefix="users", name="soak:load")
        def load(user: int) -> bytes:
            return os.urandom(100 + user % 2900)

        @memo.cache(ttl=None, name="soak:big")
        def big(number: int) -> bytes:
            return os.urandom((1 << 15) + number % 400 * 1200)

        @memo.cache(ttl=2, refresh_ahead=True, use_lock=True, name="soak:outer")
        async def outer(user: int) -> int:
            return len(load(user)) + len(big(user % 400))

        self.load, self.big, self.outer = load, big, outer

    def thread(self) -> None:
        """Call, and invalidate now and then, until stopped."""
        chance = random.Random()
        while not self.stop.is_set():
            user = int(chance.expovariate(1 / 3000))
            try:
                self.load(user)
                if user % 5 == 0:
                    self.big(user % 400)
                if user % 50 == 0:
                    memo.invalidate(tag=f"user:{user}")
                if chance.random() < 0.0005:
                    memo.invalidate(function="soak:load")
            except Exception as error:
                self.errors.append(f"{type(error).__name__}: {error}")
            self.calls += 1
            time.sleep(0.001)

    def tasks(self) -> None:
        """Gather calls in an event loop of this thread, until stopped."""

        async def go() -> None:
            while not self.stop.is_set():
                users = [random.randrange(2000) for _ in range(20)]
                found = await asyncio.gather(
                    *(self.outer(user) for user in users), return_exceptions=True
                )
                self.errors += [repr(one) for one in found if isinstance(one, Exception)]
                self.calls += len(users)
                await asyncio.sleep(0.02)

        asyncio.run(go())


def _soak(seconds: float, series: Sequence[Series], work: Work) -> list[list[float]]:
    """Run the work and sample the figures."""
    threads = [threading.Thread(target=work.thread) for _ in range(3)]
    threads.append(threading.Thread(target=work.tasks))
    for thread in threads:
        thread.start()
    samples: list[list[float]] = [[] for _ in series]
    try:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(EVERY)
            for values, one in zip(samples, series, strict=True):
                values.append(one.read())
    finally:
        work.stop.set()
        for thread in threads:
            thread.join()
    return samples


def is_flat(one: Series, values: Sequence[float]) -> bool:
    """True if the second half is no higher than the first and the limit is kept."""
    half = len(values) // 2
    first, second = max(values[:half]), max(values[half:])
    kept = not one.limit or max(values) <= MARGIN * one.limit
    return kept and second <= max(MARGIN * first, first + one.slack)


def picture(series: Sequence[Series], samples: Sequence[Sequence[float]], minutes: float) -> str:
    """Draw an SVG with one small plot for each series, from zero."""
    width, height, left = 760, 92, 190
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="13"',
        f'viewBox="0 0 {width} {height * len(series) + 24}">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for place, (one, values) in enumerate(zip(series, samples, strict=True)):
        top, bottom = height * place + 14, height * (place + 1)
        most = max(*values, one.limit) or 1.0
        step = (width - left - 70) / max(1, len(values) - 1)
        dots = " ".join(
            f"{left + n * step:.1f},{bottom - v / most * (bottom - top):.1f}"
            for n, v in enumerate(values)
        )
        parts.append(f'<text x="{left - 12}" y="{(top + bottom) / 2}" text-anchor="end">')
        parts.append(f"{one.title}</text>")
        parts.append(f'<line x1="{left}" x2="{width - 70}" y1="{bottom}" y2="{bottom}"')
        parts.append('stroke="#999"/>')
        parts.append(f'<polyline points="{dots}" fill="none" stroke="#0b6e4f" stroke-width="1.5"/>')
        parts.append(f'<text x="{width - 62}" y="{top + 8}">{max(values):,.0f}</text>')
        if one.limit:
            at = bottom - one.limit / most * (bottom - top)
            parts.append(f'<line x1="{left}" x2="{width - 70}" y1="{at:.1f}" y2="{at:.1f}"')
            parts.append('stroke="#c0392b" stroke-dasharray="4 4"/>')
    parts.append(f'<text x="{left}" y="{height * len(series) + 18}">0</text>')
    parts.append(
        f'<text x="{width - 70}" y="{height * len(series) + 18}" text-anchor="end">'
        f"{minutes:g} min</text>"
    )
    return "\n".join([*parts, "</svg>", ""])


def main(arguments: Sequence[str]) -> int:
    """Run the soak test, print and draw the figures; return 0 if all are flat."""
    options = argparse.ArgumentParser(prog="python -m benchmarks soak", description=__doc__)
    options.add_argument("--minutes", type=float, default=5.0)
    options.add_argument("--output", type=Path, help="the picture (docs/soak.svg)")
    given = options.parse_args(arguments)
    with places() as machine, machine.place() as place:
        import redis

        client: Any = redis.Redis(port=place.port)
        client.config_set("maxmemory", REDIS)
        client.config_set("maxmemory-policy", "volatile-lru")
        memo.configure(
            directory=place.directory,
            redis_url=place.redis,
            memory_limit=MEMORY,
            size_limit=DISK,
            secret="soak" * 10,
        )
        series = (
            Series("descriptors", _descriptors, slack=8),
            Series("threads", lambda: float(threading.active_count()), slack=4),
            Series("memory, MiB", _resident, slack=MEMORY / 2**20 / 4),
            Series("disk, MiB", lambda: _disk(place.directory), limit=DISK / 2**20),
            Series("Redis, MB", lambda: client.info("memory")["used_memory"] / 1e6, slack=4),
            Series("keys in Redis", lambda: float(client.dbsize()), slack=500),
        )
        work = Work()
        samples = _soak(given.minutes * 60, series, work)
        info = client.info("keyspace").get("db0", {"keys": 0, "expires": 0})
    print(f"{work.calls:,} calls in {given.minutes:g} minutes, {len(work.errors)} errors")
    print(*sorted(set(work.errors))[:5], sep="\n")
    print("| what | first half, at most | second half, at most | flat |")
    print("| --- | --- | --- | --- |")
    flat = not work.errors
    for one, values in zip(series, samples, strict=True):
        half, good = len(values) // 2, is_flat(one, values)
        flat = flat and good
        said = f"{max(values[:half]):,.1f} | {max(values[half:]):,.1f}"
        print(f"| {one.title} | {said} | {'yes' if good else '**no**'} |")
    print(f"keys in Redis without an expiry: {info['keys'] - info['expires']}")
    output = given.output or ROOT / "docs" / "soak.svg"
    output.write_text(picture(series, samples, given.minutes), encoding="utf-8")
    return 0 if flat else 1
