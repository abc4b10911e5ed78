"""Two hosts on one Redis: two directories, two processes, each by a loopback address of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ports import ROOT
from redis_server import RedisServer

HOST = """
import json, sys
import memo
from memo.testing import recording

url, directory, memory = sys.argv[1:]
memo.configure(redis_url=url, directory=directory, deadline=5, memory_limit=int(memory))

@memo.cache(ttl=600, name="hosts:load", version="1")
def load(region):
    return [region, sys.argv[2]]

for line in sys.stdin:
    verb, _, region = line.strip().partition(" ")
    with recording() as seen:
        if verb == "call":
            answer = load(region)
        else:
            answer = dict(load.invalidate(region=region).tiers)
    hits = [event.tier for event in seen if event.kind == "hit"]
    print(json.dumps([answer, hits]), flush=True)
"""


class Host:
    """One host: a process with a cache directory of its own."""

    def __init__(self, url: str, directory: Path, memory: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOST, url, str(directory), str(memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    def __call__(self, line: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        self.process.communicate()


@pytest.fixture(params=[0, 1 << 20], ids=["disk", "memory"])
def hosts(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    server = RedisServer(tmp_path / "redis", "--bind", "127.0.0.1", "127.0.0.2")
    urls = [f"redis://127.0.0.{n}:{server.port}/0" for n in (1, 2)]
    pair = [Host(url, tmp_path / f"host{n}", request.param) for n, url in enumerate(urls)]
    yield pair[0], pair[1]
    for host in pair:
        host.close()
    server.close()


def test_a_copy_that_another_host_invalidated_is_refused(hosts: tuple[Host, Host]) -> None:
    """Entries that one host invalidates are computed anew by the other, also if stored (I1)."""
    one, two = hosts
    first = one("call EU")
    assert '"hit"' not in first
    assert "host0" in first
    assert '["EU"' in two("call EU")
    assert "host0" in two("call EU")  # its own copy by now
    assert two("call US") != ""
    assert '"redis": "done"' in one("drop EU")
    anew = two("call EU")
    assert "host1" in anew
    assert anew.endswith("[]]")
    assert not two("call US").endswith("[]]")  # the other region stays
    assert "host1" in one("call EU")
