"""A program: many callers of one cached function, in a process of their own.

It reads what to do as JSON from its arguments, prints `ready`, waits for a line on standard input,
makes its calls (and prints `waiting` where one waits for another process), and prints as JSON what
they gave and when they ended.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import limits
from checkout import ROOT, SUPPORT

import memo


def runs(log: Path) -> list[str]:
    """The runs that processes have written to the file of the fixture `log`."""
    return log.read_text().split()


class Job:
    """A job that writes down each of its runs.

    Attributes:
        seconds: how long it takes.
        log: the file that gets a line for each run.
    """

    def __init__(self, seconds: float, log: str) -> None:
        self.seconds = seconds
        self.log = log
        self.lock = threading.Lock()  # no sound key: what this is does not change a key

    def begin(self) -> str:
        with open(self.log, "a") as file:
            file.write(f"{os.getpid()}\n")
        return f"made by {os.getpid()}"


def main(plan: dict[str, Any]) -> None:
    if "lease" in plan:
        limits.change(lease=plan["lease"])  # before `cluster_leases` is imported
    memo.configure(**plan.get("settings", {}))
    job = Job(plan["seconds"], plan["log"])
    seen: list[Any] = []
    options = {"use_lock": True, "name": "callers:load", "version": "1", **plan.get("options", {})}

    @memo.cache(**options)
    def load(x: int) -> str:
        made = job.begin()
        time.sleep(job.seconds)
        return made

    @memo.cache(**options)
    async def aload(x: int) -> str:
        made = job.begin()
        await asyncio.sleep(job.seconds)
        return made

    @memo.cache(use_lock=True)
    def warm() -> int:
        return 1

    @memo.cache(use_lock=True)
    async def awarm() -> int:
        return 1

    def hear(event: Any) -> None:
        seen.append([event.kind, event.reason])
        if event.kind == "waiting":
            print("waiting", flush=True)

    async def gathered() -> list[str]:
        await awarm()  # late imports are done
        memo.on_event(hear)
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        return await asyncio.gather(*(aload(plan["key"]) for _ in range(plan["callers"])))

    def threaded() -> list[str]:
        warm()
        memo.on_event(hear)
        with ThreadPoolExecutor(plan["callers"]) as pool:
            print("ready", flush=True)
            sys.stdin.readline()
            return list(pool.map(load, [plan["key"]] * plan["callers"]))

    results = asyncio.run(gathered()) if plan["style"] == "async" else threaded()
    print(json.dumps({"results": results, "ended": time.time(), "events": seen}), flush=True)


class Process:
    """One such process."""

    def __init__(self, **plan: Any) -> None:
        plan = {"seconds": 0.5, "style": "sync", "callers": 1, "key": 7, **plan}
        paths = os.pathsep.join([str(ROOT), str(SUPPORT)])
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(plan)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )
        self.pid = self._process.pid

    def ready(self) -> Process:
        """Wait until it is about to call."""
        return self._said("ready")

    def waiting(self) -> Process:
        """Wait until one of its calls waits for another process."""
        return self._said("waiting")

    def _said(self, word: str) -> Process:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == f"{word}\n"
        return self

    def go(self) -> Process:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

    def end(self) -> dict[str, Any]:
        """The text it printed in the end."""
        output, _ = self._process.communicate(timeout=60)
        assert self._process.returncode == 0
        found: dict[str, Any] = json.loads(output.splitlines()[-1])
        return found


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
