"""Elements, streams, exceptions and proofs of one host answer on another one too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from ports import ROOT
from redis_server import RedisServer

HOST = """
import json, sys
import memo

url, directory, wanted = sys.argv[1:]
memo.configure(redis_url=url, directory=directory, deadline=5)
ran = []

@memo.cache(ttl=600, name="hosts:squares", version="1", each="xs")
def squares(xs):
    ran.append(xs)
    return [x * x for x in xs]

@memo.cache(ttl=600, name="hosts:rows", version="1")
def rows(count):
    ran.append("rows")
    for i in range(count):
        yield bytes([i % 256]) * 100_000

@memo.cache(ttl=600, name="hosts:bad", version="1", cache_errors={KeyError: 60})
def bad():
    ran.append("bad")
    raise KeyError("no")

answers = [squares(json.loads(wanted)), sum(map(len, rows(1))), sum(map(len, rows(60)))]
try:
    bad()
except KeyError as error:
    answers.append(len(getattr(error, "__notes__", [])))
memo.runtime.blocking.drain_blocking(20)
print(json.dumps([answers, ran]))
"""

CUTOFF = """
import json, sys
import memo
from memo.testing import recording

url, directory, steps = sys.argv[1:]
memo.configure(redis_url=url, directory=directory, deadline=5)
ran = []

@memo.cache(ttl=600, name="hosts:raw", version="1", cutoff=True)
def raw(region):
    ran.append("raw")
    return [region]

@memo.cache(ttl="inherit", name="hosts:report", version="1")
def report():
    ran.append("report")
    return raw("EU") + raw("US")

answers = []
with recording() as heard:
    for step in json.loads(steps):
        answers.append(raw.invalidate("EU").tiers["redis"] if step == "drop" else report())
kinds = [event.kind for event in heard if event.kind == "revalidated"]
memo.runtime.blocking.drain_blocking(20)
print(json.dumps([answers, ran, kinds, [entry.ttl for entry in memo.entries(report)]]))
"""


def host(
    server: RedisServer, directory: Path, wanted: list[int] | list[str], program: str = HOST
) -> list[object]:
    """The answer of a process on a host of its own, and the runs there."""
    done = subprocess.run(
        [sys.executable, "-c", program, server.url, str(directory), json.dumps(wanted)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    found: list[object] = json.loads(done.stdout)
    return found


def test_another_host_has_them(redis_server: RedisServer, tmp_path: Path) -> None:
    """The second host computes the elements that are missing, and nothing else."""
    first = host(redis_server, tmp_path / "a", [1, 2, 3])
    assert first == [[[1, 4, 9], 100_000, 6_000_000, 0], [[1, 2, 3], "rows", "rows", "bad"]]
    second = host(redis_server, tmp_path / "b", [3, 4, 2])
    assert second == [[[9, 16, 4], 100_000, 6_000_000, 1], [[4]]]


def test_another_host_renews_what_comes_back_equal(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    """After an invalidation on one host the other asks again, once; then both hit."""
    both = ["EU", "US"]
    _, ran, _, _ = host(redis_server, tmp_path / "a", ["report"], CUTOFF)
    assert ran == ["report", "raw", "raw"]
    answers, ran, kinds, _ = host(redis_server, tmp_path / "b", ["report", "drop"], CUTOFF)
    assert (answers, ran, kinds) == ([both, "done"], [], [])
    answers, ran, kinds, _ = host(redis_server, tmp_path / "a", ["report", "report"], CUTOFF)
    assert (answers, ran, kinds) == ([both, both], ["raw"], ["revalidated"])
    answers, ran, kinds, ttls = host(redis_server, tmp_path / "b", ["report"], CUTOFF)
    assert (answers, ran, kinds) == ([both], [], [])
    assert all(0 < ttl <= 600 for ttl in ttls)
    assert ttls
