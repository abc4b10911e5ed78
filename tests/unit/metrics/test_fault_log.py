"""Faults of a store are logged: one warning for each outage, with the facts as fields."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from typing import Any

import pytest

from memo import cache
from memo.metrics.fault_log import OUTAGE_SECONDS, FaultLog
from memo.runtime.events import ERROR, Event


class Broken:
    """A store that fails, as long as it is told to."""

    def __init__(self) -> None:
        self.fails = True
        self.held: dict[str, bytes] = {}

    def _ask(self) -> None:
        if self.fails:
            raise OSError("no route to the store")

    async def get(self, key: str) -> bytes | None:
        self._ask()
        return self.held.get(key)

    async def set(self, key: str, value: bytes, ttl: float | None = None) -> None:
        self._ask()
        self.held[key] = value

    async def delete(self, key: str) -> None:
        self._ask()
        self.held.pop(key, None)

    async def clear(self, prefix: str = "") -> None:
        self._ask()
        self.held.clear()


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_an_outage_of_a_store_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    """However many calls meet it; the caller gets the results all the same."""
    store = Broken()

    @cache(ttl=60, provider=store)
    def load(x: int) -> int:
        return x

    with caplog.at_level(logging.DEBUG, "memo"):
        assert [load(x) for x in range(5)] == [0, 1, 2, 3, 4]
    [warning] = warnings_of(caplog)
    assert warning.name == "memo.stores"
    assert "no route to the store" in warning.getMessage()
    quieter = [r for r in caplog.records if "no route" in r.getMessage() and r is not warning]
    assert len(quieter) >= 4
    assert {record.levelno for record in quieter} == {logging.DEBUG}


def test_the_next_outage_is_another_warning(caplog: pytest.LogCaptureFixture) -> None:
    """A fault after a minute without one begins another outage; each kind has its own."""
    now = [100.0]
    log = FaultLog(lambda: now[0])
    fault = Event(ERROR, tier="disk", reason="error", detail="no space left on device")
    for _ in range(3):
        log.handle(fault)
        now[0] += OUTAGE_SECONDS - 1
    assert len(warnings_of(caplog)) == 1, "it went on all the time"
    log.handle(fault._replace(reason="unreadable", detail="checksum"))
    assert len(warnings_of(caplog)) == 2
    now[0] += 2
    log.handle(fault)
    assert len(warnings_of(caplog)) == 3


def test_a_record_has_the_facts_as_fields(caplog: pytest.LogCaptureFixture) -> None:
    """A handler that writes JSON needs to take no message apart."""
    FaultLog().handle(Event(ERROR, "app:load", tier="disk", reason="error", detail="disk full"))
    [record] = caplog.records
    fields: dict[str, Any] = vars(record)
    found = {name: text for name, text in fields.items() if name.startswith("memo_")}
    assert json.loads(json.dumps(found)) == {
        "memo_event": "error",
        "memo_function": "app:load",
        "memo_tier": "disk",
        "memo_reason": "error",
        "memo_detail": "disk full",
    }


def test_faults_that_are_no_stores_are_not_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    """They are events, and logged at debug level by `memo.engine`."""
    with caplog.at_level(logging.DEBUG, "memo"):
        FaultLog().handle(Event(ERROR, "app:load", reason="tags", detail="TypeError: here"))
    [record] = caplog.records
    assert (record.name, record.levelno) == ("memo.engine", logging.DEBUG)


FORKED = """
import os, sys
import memo
class Broken:
    async def get(self, key): raise OSError("gone")
    async def set(self, key, value, ttl=None): raise OSError("gone")
    async def delete(self, key): pass
    async def clear(self, prefix=""): pass
@memo.cache(ttl=60, provider=Broken())
def load(x): return x
if os.fork() == 0:
    load(1)
    os._exit(0)
os.wait()
"""


def test_a_forked_child_logs_its_own() -> None:
    """A worker that is forked from a process with memo warns like any other."""
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True)
    assert done.stderr.count("gone") == 1, done.stderr
