"""Both ports, and processes of our own, for tests of what lies under the engine."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from checkout import ROOT, SUPPORT

from memo.runtime.blocking import BLOCKING, drive
from memo.runtime.native import native
from memo.runtime.port import Port

Work = Callable[[Port], Coroutine[Any, Any, Any]]


def blocking(work: Work) -> Any:
    """Run `work(port)` as sync code does."""
    return drive(work(BLOCKING))


def looping(work: Work) -> Any:
    """Run `work(port)` in an event loop."""

    async def inside() -> Any:
        return await work(native())

    return asyncio.run(inside())


RUNNERS = {"blocking": blocking, "native": looping}


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start Python code in a process of its own; its `sys.argv[1:]` are the arguments as text."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(SUPPORT)))},
    )


def run(code: str, *arguments: object, seconds: float = 60) -> str:
    """Run Python code in a process of its own, for so many seconds at most; what it printed."""
    with start(code, *arguments) as process:
        output, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, f"exit code {process.returncode}"
    return output.strip()
