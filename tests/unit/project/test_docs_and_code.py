"""The pages say what the code does: figures are the code's, and names that they mention exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from checkout import ROOT

from memo.coordination import leases
from memo.engine import invalidating, refreshing, replay
from memo.inspection import call_graph
from memo.keys import offloading
from memo.records import spool
from memo.runtime import blocking
from memo.settings import live_values
from memo.stores import authorities, protocols
from memo.stores.disk import sqlite_file
from memo.stores.redis import cluster_leases, loss_recovery, payload_store, tracking
from memo.stores.redis.transport import exchange
from memo.validity import check, dependencies, stamps

FIGURES = [
    ("guarantees", r"waits up to (\d+) s for a lock", authorities.INVALIDATION_LOCK_SECONDS),
    ("guarantees", r"([\d,]+) (?:other )?keys", check.MAX_LATEST_ANSWERS),
    ("guarantees", r"lease holder waits (\d+) s", leases.HOLDER_LOCK_SECONDS),
    (
        "guarantees",
        r"holds on the disk delays a store by ([\d.]+) s",
        sqlite_file.WRITER_WAIT_SECONDS,
    ),
    ("guarantees", r"at (\d+) MB/s", exchange.MIN_BYTES_PER_SECOND / 1e6),
    ("guarantees", r"arguments above (\d+) MB", offloading.OFFLOADED_FROM_BYTES / 2**20),
    ("settings", r"every ([\d.]+) s, when a cached", live_values.FILE_CHECK_SECONDS),
    ("settings", r"(\d+) s after the last hit", tracking.IDLE_CONNECTION_SECONDS),
    ("settings", r"after at most (\d+) s", tracking.MAX_OUTDATED_SECONDS),
    ("options", r"up to (\d+) %", check.TTL_JITTER * 100),
    ("options", r"lease has ended \((\d+) s\)", protocols.LEASE_SECONDS),
    ("options", r"after (\d+) s, 2 s, 4 s", refreshing.REFRESH_BACKOFF_SECONDS[0]),
    ("options", r"4 s,? (?:and so on )?up to (\d+) s", refreshing.REFRESH_BACKOFF_SECONDS[1]),
    ("options", r"refreshes get ([\d.]+) s", blocking.EXIT_GRACE_SECONDS),
    ("options", r"more than (\d+) KiB", dependencies.MAX_ARGUMENT_BYTES / 1024),
    ("options", r"first (\d+) MiB are kept", replay.MAX_KEPT_OUTPUT / 2**20),
    ("options", r"past (\d+) MiB", spool.MAX_IN_MEMORY_BYTES / 2**20),
    ("invalidation", r"Counting takes at most (\d+) ms", invalidating.COUNT_SECONDS * 1000),
    ("invalidation", r"(\d+) calls of one function", stamps.MAX_REFS_PER_GROUP),
    ("notebooks", r"counting takes at most (\d+) ms", invalidating.COUNT_SECONDS * 1000),
    ("notebooks", r"More than (\d+) calls", call_graph.MAX_SINGLE_CALLS),
    ("deployments", r"each other every (\d+) s", loss_recovery.REGISTER_SECONDS),
    ("deployments", r"in the last (\d+) s", authorities.RECENT_SECONDS),
    ("deployments", r"again every (\d+) ms", cluster_leases.EARLY_LEASE_CHECK_SECONDS * 1000),
    ("deployments", r"(\d+) to 60 days", payload_store.PAYLOAD_KEPT_SECONDS / 86_400),
]
"""Page, what it may say with the figure in a group, the figure in the code."""


def test_figures_are_those_of_the_code() -> None:
    """A wait, a bound or an interval in the pages is the one that the code has."""
    found, wrong = 0, []
    for page, pattern, figure in FIGURES:
        text = " ".join((ROOT / "docs" / f"{page}.md").read_text("utf-8").split())
        for said in re.findall(pattern, text):
            found += 1
            if float(said.replace(",", "")) != pytest.approx(figure):
                wrong.append((page, pattern, said, figure))
    assert not wrong
    assert found > len(FIGURES) // 2, "the pages say it in other words: correct the patterns"


def mentioned(page: Path) -> list[str]:
    """The texts in backquotes outside of blocks."""
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    return re.findall(r"`([^`\n]+)`", text)


@pytest.mark.parametrize(
    "page", [*(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem
)
def test_tests_and_files_that_are_named_exist(page: Path) -> None:
    """A test or a file that a page names is there, under that name."""
    tests = "\n".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("*.py"))
    places = (ROOT, ROOT / "memo", ROOT / "memo" / "keys", ROOT / "tests")
    lost = []
    for name in mentioned(page):
        if re.fullmatch(r"test_\w+", name):
            lost += [] if f"def {name}(" in tests else [name]
        elif re.fullmatch(r"[\w/]+/\w+\.(py|lua|sql|js)", name):
            lost += [] if any((place / name).exists() for place in places) else [name]
    assert not lost
