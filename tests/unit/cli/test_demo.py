"""`memo demo`: the main job on real data, with what it says checked against what it did."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkout import ROOT
from click.testing import CliRunner

from memo.cli.commands import main


def demo(*args: str, cwd: Path, quick: tuple[str, ...] = ("--quick",)) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "memo", "demo", *quick, *args],
        capture_output=True,
        text=True,
        env=environment,
        cwd=cwd,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search("Traceback|Warning", done.stderr), done.stderr
    return done.stdout


def seconds(said: str, title: str) -> float:
    found = re.search(rf"\d  {title}\s+([\d.,]+) (µs|ms|s)", said)
    assert found, said
    return float(found[1]) * {"µs": 1e-6, "ms": 1e-3, "s": 1.0}[found[2]]


def check(said: str) -> None:
    assert "✗" not in said
    assert said.count("✓ ") == 8
    assert max(map(len, said.splitlines())) <= 80
    assert len(re.findall("█+ +[\\d.]+ ", said)) == 5, "the chart has a bar for each run"
    assert "memo ui" in said.splitlines()[-1], "it ends with what to try next"
    first = seconds(said, "first run")
    assert seconds(said, "again") < first / 10
    assert seconds(said, "in a fresh process") < first / 2
    assert re.search(r"1 of \d+ packages parsed again", said)
    assert "1 package parsed, report kept" in said
    assert "definitions" in said
    rows = re.search(r"([\d,]+) definitions parsed", said)
    assert rows
    assert int(rows[1].replace(",", "")) > 2000


def test_the_demo_keeps_its_promises_without_redis(tmp_path, monkeypatch):
    """First run, again, fresh process, change: every promise held, and nothing is left behind.

    The user's own settings do not count: it brings its own directory, secret and namespace.  A
    terminal shows it in colours.
    """
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setenv("MEMO_ENABLED", "false")
    monkeypatch.setenv("MEMO_TIERS", "memory")
    directory = tmp_path / "mine"
    monkeypatch.setenv("MEMO_DIRECTORY", str(directory))
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in a terminal
    said = demo(cwd=tmp_path)
    check(re.sub("\x1b\\[\\d+m", "", said))
    assert not list(scratch.glob("memo-demo-*"))
    assert not list(tmp_path.glob("*.toml"))
    assert not directory.exists()
    assert said.count("\x1b[32m✓ ") == 8, "green ticks"
    assert "\x1b[31m" not in said, "nothing red that needs no action"
    assert len(re.findall(r"\x1b\[33m   first run +█+", said)) == 1
    assert len(re.findall(r"\x1b\[32m   [a-z ]+█+", said)) == 4
    assert "\x1b[1m   memo ls" in said


def test_the_demo_runs_on_the_chain(redis_server, tmp_path):
    """With a Redis: the same, on Redis over disk, and its entries are dropped at the end."""
    said = demo("--redis", redis_server.url, cwd=tmp_path)
    check(said)
    assert "Redis over disk" in said
    assert not redis_server.client().keys("*:{memo.demo:*")


@pytest.mark.timing
def test_a_wrong_url_is_a_usage_error_that_names_the_option():
    """The message says which option is wrong, not which setting it becomes."""
    answer = CliRunner().invoke(main, ["demo", "--redis", "localhost:6379"])
    assert answer.exit_code == 2
    assert "Invalid value for --redis: must begin with redis://" in answer.output
    assert "configure" not in answer.output


def test_the_demo_works_where_redis_is_away(tmp_path):
    """A Redis that refuses costs milliseconds, not the demo."""
    check(demo("--redis", "redis://127.0.0.1:1", cwd=tmp_path))


@pytest.mark.timing
def test_the_whole_demo_takes_seconds(tmp_path):
    """The demo as a user starts it ends within 15 s on two cores."""
    begun = time.perf_counter()
    check(demo(cwd=tmp_path, quick=()))
    assert time.perf_counter() - begun < 15
