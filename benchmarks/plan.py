"""The rows of the table: what each measures, and memo's target."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MB = 1_000_000
GB = 1_000 * MB


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        title: what is measured.
        measure: of `benchmarks.samples`, in the processes that count.
        ours: memo's subjects.
        floor: the lowest possible time, or "".
        peers: the other caches.
        target: the target in words.
        bound: the most that each of ours may take, in the unit of `figure`, from the floor's
            and the best peer's figures.
        store: the measure of the process that stores first, or "".
        kind, size: of the value; `quick_size` in quick mode.
        figure: which of the figures counts, `"value"` in seconds, or of the `store` process.
        runs: how often the function may run, where that counts.
        notes: what a reader must know of the peers.
    """

    title: str
    measure: str
    ours: tuple[str, ...]
    floor: str
    peers: tuple[str, ...]
    target: str
    bound: Callable[[float, float], float]
    store: str = ""
    kind: str = ""
    size: int = 0
    quick_size: int = 0
    figure: str = "value"
    runs: int = 0
    notes: str = ""

    def named(self, *, quick: bool) -> str:
        """Return the title, with the size that is measured."""
        if not quick or self.size == self.quick_size:
            return self.title
        number, unit = (self.quick_size // MB, " MB") if self.size >= MB else (self.quick_size, "")
        return _SIZE.sub(f"{number:,}{unit}", self.title, count=1)


_SIZE = re.compile(r"\d[\d,]*(?: [MG]B)?(?= |$)")
_FRAME_PEERS = ("joblib mmap", "checkpointer", "joblib", "diskcache", "cachier pickle")
_REDIS_PEERS = ("dogpile Redis", "aiocache Redis", "cashews Redis")


def _frame(title: str, kind: str, size: int, quick: int, most: float) -> Row:
    return Row(
        title,
        "hit_frame",
        ("memo",),
        "np.load mmap",
        _FRAME_PEERS,
        f"at most {most * 1e3:g} ms",
        lambda floor, peer: most,
        "store_frame",
        kind,
        size,
        quick,
    )


def _key(title: str, kind: str, size: int, quick: int) -> Row:
    return Row(
        title,
        "key",
        ("memo",),
        "BLAKE3, all cores",
        ("joblib",),
        "at most 1.5 x BLAKE3",
        lambda floor, peer: 1.5 * floor,
        kind=kind,
        size=size,
        quick_size=quick,
        notes="cashews, aiocache and dogpile make keys with `str()`: wrong hits, not measured",
    )


ROWS: Sequence[Row] = (
    Row(
        "hit, 5-field dict, memory",
        "hit_record",
        ("memo", "memo async", "memo tracking", "memo tracking async"),
        "lru_cache",
        ("cachetools", "dogpile", "cachier", "aiocache", "cashews"),
        "at most 5 µs, isolated",
        lambda floor, peer: 5e-6,
        notes="lru_cache, cachetools, cachier and aiocache hand out the stored object itself",
    ),
    Row(
        "same, disk",
        "hit_record",
        ("memo disk",),
        "open + read + loads",
        ("diskcache", "checkpointer", "joblib", "cachier pickle", "cashews disk"),
        "at most 0.8 x the best peer",
        lambda floor, peer: 0.8 * peer,
        "store_record",
    ),
    Row(
        "same, Redis",
        "hit_record",
        ("memo Redis",),
        "redis-py GET",
        ("dogpile Redis",),
        "at most 1.15 x redis-py's GET",
        lambda floor, peer: 1.15 * floor,
        "store_record",
    ),
    Row(
        "same, Redis, in an event loop",
        "hit_record",
        ("memo Redis async",),
        "redis.asyncio GET",
        ("aiocache Redis", "cashews Redis"),
        "at most 1.15 x redis.asyncio's GET",
        lambda floor, peer: 1.15 * floor,
        "store_record",
    ),
    Row(
        "1,000 hits in one gather, Redis (each)",
        "hit_many",
        ("memo Redis async",),
        "redis pipeline",
        ("redis.asyncio", "cashews Redis", "aiocache Redis"),
        "at most 20 µs a hit",
        lambda floor, peer: 20e-6,
        "store_many",
        notes="the floor is one pipeline of 1,000 GETs with loads; "
        "redis.asyncio: 100 GETs at a time",
    ),
    Row(
        "hits of 16 threads, Redis (each)",
        "hit_threads",
        ("memo Redis",),
        "redis-py GET",
        ("dogpile Redis",),
        "(no target)",
        lambda floor, peer: float("inf"),
        "store_record",
        notes="of all threads together: how long until the next one has its answer",
    ),
    _frame("hit, 100 MB float frame, disk", "floats", 100 * MB, 10 * MB, 0.3e-3),
    _frame("hit, 1 GB float frame, disk", "floats", GB, 50 * MB, 0.3e-3),
    _frame("hit, 100 MB mixed frame, disk", "mixed", 100 * MB, 10 * MB, 0.5e-3),
    Row(
        "hit, 100 MB frame, Redis configured",
        "hit_frame",
        ("memo Redis + host",),
        "redis-py GET",
        _REDIS_PEERS,
        "at most 1 ms",
        lambda floor, peer: 1e-3,
        "store_frame",
        "floats",
        100 * MB,
        10 * MB,
    ),
    Row(
        "same, first time on another host",
        "hit_elsewhere",
        ("memo Redis + host",),
        "redis-py GET",
        ("dogpile Redis",),
        "at most 0.8 x redis-py's GET",
        lambda floor, peer: 0.8 * floor,
        "store_frame",
        "floats",
        100 * MB,
        10 * MB,
    ),
    Row(
        "peak memory of a 1 GB hit",
        "hit_frame",
        ("memo",),
        "",
        ("joblib mmap", "joblib", "checkpointer", "diskcache"),
        "under 5 MB",
        lambda floor, peer: 5e6,
        "store_frame",
        "floats",
        GB,
        50 * MB,
        figure="peak_bytes",
    ),
    Row(
        "store, 1 GB float frame",
        "store_pairs",
        ("memo",),
        "write()",
        ("checkpointer", "joblib", "diskcache"),
        "at most 1.3 x write()",
        lambda floor, peer: 1.3 * floor,
        "",
        "floats",
        GB,
        50 * MB,
        notes="the floor is `write()` of the same bytes by the same process, in turns; "
        "checkpointer writes in place, not atomically",
    ),
    Row(
        "peak memory of storing it",
        "store_pairs",
        ("memo",),
        "",
        ("checkpointer", "joblib", "diskcache"),
        "under 50 MB",
        lambda floor, peer: 50e6,
        "",
        "floats",
        GB,
        50 * MB,
        figure="peak_bytes",
    ),
    _key("key of a 1 GB float frame", "floats", GB, 50 * MB),
    _key("key of a 200 MB array", "array", 200 * MB, 40 * MB),
    _key("key of a 100 MB mixed frame", "mixed", 100 * MB, 10 * MB),
    Row(
        "hit among 1,000 small entries, disk",
        "hit_all",
        ("memo disk",),
        "",
        ("diskcache",),
        "(compare the next row)",
        lambda floor, peer: float("inf"),
        "store_all",
        size=1000,
        quick_size=1000,
    ),
    Row(
        "hit among 200,000 small entries, disk",
        "hit_all",
        ("memo disk",),
        "hit among 1,000 small entries, disk",
        ("diskcache",),
        "at most 1.1 x the row above",
        lambda floor, peer: 1.1 * floor,
        "store_all",
        size=200_000,
        quick_size=3_000,
    ),
    Row(
        "set among 200,000 small entries, disk",
        "",
        ("memo disk",),
        "",
        ("diskcache",),
        "at most 1.5 x diskcache",
        lambda floor, peer: 1.5 * peer,
        "store_all",
        size=200_000,
        quick_size=3_000,
    ),
    Row(
        "stampede, 4 processes x 32 callers, 0.5 s job",
        "stampede",
        ("memo lock async",),
        "",
        ("cashews lock", "dogpile Redis"),
        "at most 0.6 s, 1 run",
        lambda floor, peer: 0.6,
        runs=1,
    ),
)
