"""More keys that other hosts compute than there are connections to wait on."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from redis_server import RedisServer

import memo
from memo.testing import isolated, recording

SECRET = "0123456789abcdef" * 4
LIMIT = 0.5
HOLDER = """
import asyncio, sys, memo
url, directory, secret, keys = *sys.argv[1:4], int(sys.argv[4])
memo.configure(redis_url=url, directory=directory, secret=secret, deadline="5s")
held = []

@memo.cache(use_lock=True, name="waiters:load", version="1")
async def load(x):
    held.append(x)
    if len(held) == keys:
        print("held", flush=True)
    await asyncio.sleep(600)

async def main():
    await asyncio.gather(*map(load, range(keys)))

asyncio.run(main())
"""


@memo.cache(use_lock=True, lock_timeout=LIMIT, name="waiters:load", version="1")
async def aload(x: int) -> int:
    return x


@memo.cache(use_lock=True, lock_timeout=LIMIT, name="waiters:load", version="1")
def load(x: int) -> int:
    return x


async def gathered(keys: int) -> list[int]:
    return await asyncio.gather(*map(aload, range(keys)))


def threaded(keys: int) -> list[int]:
    with ThreadPoolExecutor(keys) as pool:
        return list(pool.map(load, range(keys)))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_waiters_do_not_queue_for_connections(
    asynchronous: bool, redis_server: RedisServer, tmp_path: Path
) -> None:
    """200 callers whose keys another host computes give up in their `lock_timeout`, and compute."""
    keys = 200
    command = [sys.executable, "-c", HOLDER, redis_server.url, tmp_path, SECRET, str(keys)]
    settings = {"redis_url": redis_server.url, "secret": SECRET, "deadline": "5s"}
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder,
        isolated(**settings),
        recording() as seen,
    ):
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            given = asyncio.run(gathered(keys)) if asynchronous else threaded(keys)
        finally:
            holder.kill()
    assert given == list(range(keys))
    waits = [event.seconds for event in seen if event.kind == "lock_timeout"]
    assert len(waits) == keys
    assert max(waits) < 10 * LIMIT  # the machine may be busy
