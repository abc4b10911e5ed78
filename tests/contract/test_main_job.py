"""The main job, end to end: cached, restarted, found again, with Redis and without."""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from jupyter_client.manager import KernelManager
from jupyter_core.utils import ensure_event_loop
from ports import ROOT, run
from redis_server import RedisServer

import memo
from memo.testing import recording

CELL = """
import asyncio, pandas as pd, pathlib
from memo import cache

@cache(ttl="1h")
async def load(region: str) -> pd.DataFrame:
    with open(LOG, "a") as log:
        log.write("run\\n")
    await asyncio.sleep(0.2)
    return pd.DataFrame({"region": region, "sales": range(50_000), "note": ["n"] * 50_000})
"""


@pytest.fixture(autouse=True, scope="module")
def _jupyters_own_loop() -> None:
    """jupyter_client keeps an event loop for as long as the process lives."""
    ensure_event_loop()


class Kernel:
    """A real IPython kernel."""

    def __init__(self, home: Path) -> None:
        environment = {**os.environ, "MEMO_DIRECTORY": str(home / "memo"), "PYTHONPATH": str(ROOT)}
        environment.pop("PYTEST_CURRENT_TEST", None)
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel(env=environment, cwd=str(home))
        self._connect()

    def _connect(self) -> None:
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def restart(self) -> None:
        self.client.stop_channels()
        self.manager.restart_kernel(now=True)
        self._connect()

    def __call__(self, code: str) -> str:
        """The output of a cell."""
        printed: list[str] = []

        def hear(message: dict[str, Any]) -> None:
            content = message["content"]
            if message["msg_type"] == "stream":
                printed.append(content["text"])
            assert message["msg_type"] != "error", "\n".join(content.get("traceback", []))

        reply = self.client.execute_interactive(code, output_hook=hear, timeout=60)
        assert reply["content"]["status"] == "ok"
        return "".join(printed).strip()

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
        self.manager.cleanup_resources()


def test_hit_after_a_kernel_restart(tmp_path: Path) -> None:
    """After a restart, and from another kernel, the same DataFrame is there without a run."""
    log = tmp_path / "log"
    show = "frame = await load('EU'); print(dict(frame.dtypes), frame.sales.sum(), len(frame))"
    shown = []
    kernel = Kernel(tmp_path)
    other = Kernel(tmp_path)
    try:
        for run_in in (kernel, kernel, other):
            run_in(f"LOG = {str(log)!r}")
            run_in(CELL)
            shown.append(run_in(show))
            kernel.restart() if run_in is kernel else None
    finally:
        kernel.close()
        other.close()
    assert len(set(shown)) == 1
    assert log.read_text() == "run\n"


PROCESS = """
import asyncio, json, sys
import memo
from memo.testing import recording

log, url = sys.argv[1:]
memo.configure(redis_url=url, deadline=5)

@memo.cache(ttl=600, name="main:load")
async def load(n):
    import pandas as pd
    with open(log, "a") as file:
        file.write("run\\n")
    return pd.DataFrame({"a": range(n), "b": [str(i) for i in range(n)]})

async def main():
    with recording() as seen:
        frame = await load(30_000)
    return frame, [(e.kind, e.tier) for e in seen if e.kind == "hit"]

frame, hits = asyncio.run(main())
print(json.dumps([int(frame.a.sum()), len(frame.b.unique()), hits]))
"""


def test_second_process_through_redis(
    tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process with another disk directory gets the frame from Redis, then from its disk."""
    log = tmp_path / "log"
    answers = []
    for host in ("one", "two", "two"):
        monkeypatch.setenv("MEMO_DIRECTORY", str(tmp_path / host))
        answers.append(json.loads(run(PROCESS, log, redis_server.url)))
    assert [answer[:2] for answer in answers] == [[449_985_000, 30_000]] * 3
    assert answers[1][2] == [["hit", "redis"]]
    assert log.read_text() == "run\n"


def test_three_event_loops_in_a_row(redis_server: RedisServer) -> None:
    """One process may run one event loop after the other; each gets connections of its own."""
    memo.configure(redis_url=redis_server.url, memory_limit=0, deadline=5)
    runs: list[int] = []

    @memo.cache
    async def load(x: int) -> int:
        runs.append(x)
        return x

    with recording() as seen:
        for _ in range(3):
            assert asyncio.run(load(1)) == 1
    assert runs == [1]
    assert [e.tier for e in seen if e.kind == "hit"] == ["redis", "redis"]
    assert not [e for e in seen if e.kind == "error"]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_killing_redis_costs_milliseconds_and_no_result(
    kind: str, redis_server: RedisServer
) -> None:
    """Redis is killed between calls: every call still gives its result, and soon."""
    memo.configure(redis_url=redis_server.url)
    runs: list[int] = []

    @memo.cache
    def load(x: int) -> dict[str, int]:
        runs.append(x)
        return {"x": x}

    @memo.cache
    async def aload(x: int) -> dict[str, int]:
        runs.append(x)
        return {"x": x}

    def calls(first: int) -> float:
        if kind == "sync":
            return max(_timed(load, x) for x in range(first, first + 20))

        async def some() -> float:
            slowest = 0.0
            for x in range(first, first + 20):
                begun = time.perf_counter()
                assert await aload(x) == {"x": x}
                slowest = max(slowest, time.perf_counter() - begun)
            return slowest

        return asyncio.run(some())

    calls(0)
    redis_server.kill()
    assert calls(0) < 1.0  # a loaded machine; what it costs is measured in benchmarks
    assert calls(100) < 1.0
    assert runs == [*range(20), *range(100, 120)]


def _timed(function: Any, x: int) -> float:
    begun = time.perf_counter()
    assert function(x) == {"x": x}
    return time.perf_counter() - begun


def test_frames_come_back_equal() -> None:
    """Dtypes, index, columns and values of a frame survive memory, disk and the map."""
    frame = pd.DataFrame(
        {
            "i": range(20_000),
            "f": [0.5] * 20_000,
            "s": ["text"] * 20_000,
            "t": pd.date_range("2026-01-01", periods=20_000, freq="min"),
            "c": pd.Categorical(["a", "b"] * 10_000),
        }
    ).set_index("i")

    @memo.cache
    def load() -> pd.DataFrame:
        return frame

    load()
    for _ in range(2):
        pd.testing.assert_frame_equal(load(), frame)
        memo.decorators.assembly.reset()
    again = load()
    again.loc[0, "f"] = 9.0
    again["s"] = "changed"
    pd.testing.assert_frame_equal(load(), frame)
